"""Training a tokenizer, exact encoding, and agreement with transformers."""

import json
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.documents.inputs import Corpus
from codeparrot_ds.errors import DataError
from codeparrot_ds.tokenizer import train as training
from codeparrot_ds.tokenizer import trainers
from codeparrot_ds.tokenizer.directory import EOS_TOKEN, require_same_encoding
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.tokenizer.train import TrainOptions, train
from codeparrot_ds.tokenizer.trainers import RESERVED_TOKENS
from tests.conftest import VOCAB_SIZE

SLOW = TrainOptions(trainer="tokenizers", workers=1)


@pytest.fixture(scope="module")
def encoder(data: Path) -> Encoder:
    return Encoder(data / "tokenizer")


def test_the_end_token_is_id_0_and_all_bytes_are_there(encoder: Encoder) -> None:
    assert encoder.eos_id == 0
    assert encoder.vocab_size == VOCAB_SIZE
    assert all(len(encoder.encode(chr(code))) >= 1 for code in range(1, 0x250))


@settings(deadline=None)
@given(text=st.text())
def test_any_text_round_trips(encoder: Encoder, text: str) -> None:
    ids = encoder.encode(text)
    assert encoder.decode(ids) == text


def test_a_literal_end_token_in_a_document_is_text(encoder: Encoder) -> None:
    ids = encoder.encode(f"a{EOS_TOKEN}b")
    assert encoder.eos_id not in ids
    assert encoder.decode(ids) == f"a{EOS_TOKEN}b"


def test_transformers_reads_it_with_the_same_ids(encoder: Encoder, data: Path) -> None:
    from transformers import AutoTokenizer

    text = "def area(width, height):\n\treturn width * height  # ¬é🦜\n"
    loaded = AutoTokenizer.from_pretrained(data / "tokenizer")
    assert loaded(text).input_ids == encoder.encode(text).tolist()
    assert loaded.decode(loaded("x  ,  y !").input_ids) == "x  ,  y !"
    assert (loaded.eos_token, loaded.eos_token_id, len(loaded)) == (EOS_TOKEN, 0, VOCAB_SIZE)


def test_training_twice_gives_the_same_merges(data: Path, tmp_path: Path) -> None:
    again = train(data / "corpus", tmp_path / "tokenizer", VOCAB_SIZE, 32, SLOW)
    assert again["digest"] == Encoder(data / "tokenizer").digest


def test_too_large_a_vocabulary_is_refused_and_leaves_nothing(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too small for 1,000,000 tokens"):
        train(data / "corpus", tmp_path / "tokenizer", 1_000_000)
    assert not (tmp_path / "tokenizer").exists()


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        Encoder(tmp_path)
    with pytest.raises(DataError, match="codeparrot-ds tokenizer train"):
        Encoder(tmp_path / "absent")


def test_texts_end_to_end_and_where_they_end(encoder: Encoder) -> None:
    texts = ["def f():", "", "x", "\n\n"]
    ids, ends = encoder.encode_flat(texts)
    assert ids.dtype == np.uint32
    assert [part.tolist() for part in np.split(ids, ends[:-1])] == [encoder.encode(text).tolist() for text in texts]


# Pair counts of `tokenizers` overflow at 2**31


def merges_of(directory: Path) -> list[list[str]]:
    merges: list[list[str]] = json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]
    return merges


def by_digest(corpus: Path) -> list[bytes]:
    """Texts of a corpus, by content digest."""
    documents = sorted(Corpus.open(corpus), key=lambda document: document.digest())
    return [document.text.encode() for document in documents]


def test_the_default_limit_is_below_every_possible_overflow() -> None:
    assert trainers.MAX_TEXT_BYTES < 2**31


def test_a_small_corpus_is_used_whole(data: Path) -> None:
    texts = [text for text in by_digest(data / "corpus") if text]
    manifest = json.loads((data / "tokenizer" / "manifest.json").read_text())
    assert manifest["trained_on"] == {"documents": len(texts), "bytes": sum(map(len, texts))}


def test_of_a_larger_corpus_the_first_by_digest_are_used(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text for text in by_digest(data / "corpus") if text]
    limit = sum(map(len, texts)) // 3
    monkeypatch.setattr(trainers, "MAX_TEXT_BYTES", limit)
    fitting = [total for total in accumulate(map(len, texts)) if total <= limit]
    manifest = train(data / "corpus", tmp_path / "a", 300, options=SLOW)
    assert manifest["trained_on"] == {"documents": len(fitting), "bytes": fitting[-1]}
    assert 0.8 * limit < fitting[-1] <= limit
    assert f"note: training on {len(fitting):,} of {len(texts):,} documents" in capsys.readouterr().err
    assert train(data / "corpus", tmp_path / "b", 300, options=SLOW)["digest"] == manifest["digest"]

    reference = trained_on([text.decode() for text in texts[: len(fitting)]], 300)
    assert merges_of(tmp_path / "a") == json.loads(reference.to_str())["model"]["merges"]


def written_corpus(directory: Path, *texts: str) -> Path:
    (directory / "src").mkdir()
    for number, text in enumerate(texts):
        (directory / "src" / f"{number}.py").write_text(text)
    collect(directory / "corpus", [directory / "src"])
    return directory / "corpus"


def test_the_limit_holds_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = written_corpus(tmp_path, "ab " * 100, "é" * 150 + "é", "cd " * 400)  # 300, 302 and 1,200 bytes
    sizes = [*accumulate(map(len, by_digest(corpus)))]
    assert sizes[-1] == 1802
    for documents, size in enumerate(sizes, 1):
        for limit, expected in ((size, documents), (size - 1, documents - 1), (size + 1, documents)):
            if expected:
                monkeypatch.setattr(trainers, "MAX_TEXT_BYTES", limit)
                trained = train(corpus, tmp_path / str(limit), 262, options=SLOW)["trained_on"]
                assert trained == {"documents": expected, "bytes": sizes[expected - 1]}


def test_nothing_to_train_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = written_corpus(tmp_path, "ab " * 100)
    monkeypatch.setattr(trainers, "MAX_TEXT_BYTES", 299)
    with pytest.raises(DataError, match="too small for 262 tokens; 0 documents yield 261"):
        train(corpus, tmp_path / "tokenizer", 262, options=SLOW)
    assert not list(tmp_path.glob("*tokenizer*"))


def trained_on(texts: list[str], vocab_size: int, reserved: Sequence[str] = RESERVED_TOKENS) -> Tokenizer:
    """A tokenizer of the library itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(reserved), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def test_a_frequent_pair_that_was_not_merged_is_found(data: Path) -> None:
    """As after an overflow: the commonest pair, two blanks, was left out."""
    assert merges_of(data / "tokenizer")[0] == ["Ġ", "Ġ"]
    texts = [text.decode() for text in by_digest(data / "corpus")]
    wrong = trained_on([text.replace("  ", " \n") for text in texts], VOCAB_SIZE)
    assert ["Ġ", "Ġ"] not in json.loads(wrong.to_str())["model"]["merges"]
    with pytest.raises(DataError, match=r"' ' \+ ' ' occurs at least [\d,]+ times and was never merged, but"):
        trainers.require_frequent_pairs_merged(wrong, texts, texts)
    right = trained_on(texts, VOCAB_SIZE)
    trainers.require_frequent_pairs_merged(right, texts, texts)


def test_a_tokenizer_that_fails_the_check_is_not_stored(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tokenizer: Tokenizer, texts: Iterable[str], some: Iterable[str]) -> None:
        assert tokenizer.get_vocab_size() == 300
        expected = [document.text for document in Corpus.open(data / "corpus") if document.text]
        assert list(texts) == list(some) == expected
        raise DataError("a pair was not merged")

    monkeypatch.setattr(training, "require_frequent_pairs_merged", refuse)
    with pytest.raises(DataError, match="a pair was not merged"):
        train(data / "corpus", tmp_path / "tokenizer", 300, options=SLOW)
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("vocab_size", [261, 262, 300, 1000])
def test_a_right_tokenizer_passes_the_check(tmp_path: Path, vocab_size: int) -> None:
    """Also where all text is one long word, blanks, or of the same characters."""
    words = " ".join(f"w{n}x{n * n}" for n in range(4000))
    corpus = written_corpus(tmp_path, " " * 5000, "a" * 5000, "ab" * 2000, "'s 'd " * 300, "é🦜" * 500, words)
    slow = train(corpus, tmp_path / "slow", vocab_size, options=SLOW)
    assert slow["vocab_size"] == vocab_size
    assert train(corpus, tmp_path / "default", vocab_size, options=TrainOptions(workers=1))["digest"] == slow["digest"]


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_pair_counts_of_tokenizers_overflow_at_2_to_the_31_and_the_check_finds_it() -> None:
    """8,591 words of 249,999 pairs of blanks are 2,147,741,409 pairs, 0.012 % more than 2**31. 8,589 are fewer."""
    word, rest = " " * 250_000, "abab " * 50_000
    assert 8589 * 249_999 < 2**31 < 8591 * 249_999
    tokenizer = trained_on([word] * 8591 + [rest], 260, [EOS_TOKEN])
    assert ["Ġ", "Ġ"] not in json.loads(tokenizer.to_str())["model"]["merges"]  # if it is, the library counts further
    with pytest.raises(DataError, match=r"' ' \+ ' ' occurs at least 249,999 times and was never merged"):
        trainers.require_frequent_pairs_merged(tokenizer, [word, rest], [word, rest])


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}}, True),
        ({"post_processor": None}, True),
        ({"normalizer": {"type": "NFC"}}, False),
        ({"added_tokens": []}, False),
        ({"vocab": None}, False),
    ],
)
def test_tokenizers_are_the_same_if_they_give_the_same_ids(
    data: Path, tmp_path: Path, change: dict[str, Any], same: bool
) -> None:
    body = json.loads((data / "tokenizer" / "tokenizer.json").read_text())
    if "vocab" in change:  # two tokens have changed places: no size differs
        vocab = body["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        change = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**body, **change}))
    if same:
        require_same_encoding(data / "tokenizer", tmp_path, "Fix it.")
    else:
        with pytest.raises(DataError, match=r"tokenizer\.json: gives other ids than .*tokenizer\.json\. Fix it\."):
            require_same_encoding(data / "tokenizer", tmp_path, "Fix it.")
