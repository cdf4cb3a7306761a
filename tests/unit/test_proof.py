"""The fast encoder gives the reference ids; one that does not is detected, recorded and not used."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from codeparrot_ds.documents.inputs import Corpus
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.shards import build as building
from codeparrot_ds.shards import encoders
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.shards.verify import verify, verify_against_corpus
from codeparrot_ds.system.files import MANIFEST
from codeparrot_ds.tokenizer import proof
from codeparrot_ds.tokenizer.directory import EOS_TOKEN
from codeparrot_ds.tokenizer.encode import Encoder, FastEncoder
from codeparrot_ds.tokenizer.proof import (
    InexactError,
    choose_encoder,
    code_points,
    hard_cases,
    proof_file,
    prove,
    record_proof,
)
from tests.tokenizer_kinds import added_token, only_bytes, save


@pytest.fixture(scope="module")
def referee(data: Path) -> Encoder:
    return Encoder(data / "tokenizer")


@pytest.fixture(scope="module")
def fast(data: Path) -> FastEncoder:
    return FastEncoder(data / "tokenizer")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def split_ids(encoder: Encoder | FastEncoder, texts: Sequence[str]) -> list[list[int]]:
    ids, ends = encoder.encode_flat(texts)
    assert ids.dtype == np.uint32 and ends.dtype == np.int64
    assert len(ends) == len(texts) and (not len(ends) or ends[-1] == len(ids))
    return [part.tolist() for part in np.split(ids, ends[:-1])] if len(ends) else []


# Equal ids


def test_the_fast_encoder_gives_the_ids_of_the_reference_for_every_document(
    data: Path, referee: Encoder, fast: FastEncoder
) -> None:
    texts = [document.text for document in Corpus.open(data / "corpus")]
    assert len(texts) > 20
    expected = split_ids(referee, texts)
    assert split_ids(fast, texts) == expected
    assert [fast.encode(text).tolist() for text in texts] == expected


UNASSIGNED = "\u0378\u05ff\U0001f8ff\U000e0080\U0003ffff\ue000\U0010ffff\ufffe"
WHITE = " \t\n\r\x0b\x0c\x1c\x1f\x85\u00a0\u1680\u180e\u2003\u2028\u202f\u200b\u3000\ufeff"
MARKS = "\u0301\u0327\u0345\u093f\u0e31\u1ab0\u20dd\ufe0f\u200d\U0001f3fd"
PARTS = st.one_of(
    st.text(max_size=8),
    st.text(WHITE, max_size=12),
    st.text(MARKS + "aeé한각🦜", max_size=8),
    st.text(UNASSIGNED + " a", max_size=6),
    st.text("0123456789٣²½Ⅷ", max_size=10),
    st.text("'\u2019sS\u017ftTreRvVmMlLdDkK\u212a é1_", max_size=10),
    st.sampled_from([EOS_TOKEN, f" {EOS_TOKEN}", EOS_TOKEN[:-1], EOS_TOKEN[1:], EOS_TOKEN * 2, "<|", "\r\n", "\x00"]),
    st.tuples(
        st.sampled_from([*" \n\ta0'=_é中🦜\u0301\u0378", "\r\n", " \n", "ab", "'s", " '"]), st.integers(1, 300)
    ).map(lambda run: run[0] * run[1]),
    st.characters(exclude_categories=("Cs",)),
)
TEXT = st.lists(PARTS, max_size=8).map("".join)


@settings(deadline=None, max_examples=400)
@given(texts=st.lists(TEXT, max_size=4))
@example(texts=[])
@example(texts=[""])
@example(texts=["", "a", "", ""])
@example(texts=[" " * 5000, "\x0b" * 100, "é" * 3000])
def test_the_fast_encoder_gives_the_ids_of_the_reference_for_any_text(
    referee: Encoder, fast: FastEncoder, texts: list[str]
) -> None:
    expected = split_ids(referee, texts)
    assert split_ids(fast, texts) == expected
    assert [fast.encode(text).tolist() for text in texts] == expected
    assert referee.eos_id not in [i for ids in expected for i in ids]


@settings(deadline=None, max_examples=100)
@given(numbers=st.lists(st.integers(0, 511), max_size=200))
def test_the_fast_encoder_gives_the_ids_of_the_reference_for_tokens_in_any_order(
    referee: Encoder, fast: FastEncoder, numbers: list[int]
) -> None:
    tokens = referee.tokens()
    text = "".join(tokens[number] for number in numbers)
    assert fast.encode(text).tolist() == referee.encode(text).tolist()


# The proof


def test_the_proof_asks_for_every_code_point() -> None:
    asked: set[str] = set()
    for text in code_points():
        asked.update(text)
    assert len(asked) == 0x110000 - 0x800  # all except surrogates, which are not characters


@pytest.mark.slow
def test_the_fast_encoder_is_proved(data: Path, referee: Encoder, fast: FastEncoder) -> None:
    texts = [document.text for document in Corpus.open(data / "corpus")]
    checked = prove(fast, referee, texts)
    assert checked["documents"] == sum(map(len, texts))
    assert checked["code points"] > 7 * (0x110000 - 0x800)
    assert checked["hard cases"] > 500_000


class Mutant(FastEncoder):
    """The fast encoder with a defect: the last id of a text that matches `pattern` is wrong."""

    def __init__(self, directory: Path, pattern: str) -> None:
        super().__init__(directory)
        self._pattern = re.compile(pattern)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, ends = super().encode_flat(texts)
        wrong = [i for i, text in enumerate(texts) if self._pattern.search(text)]
        ids = ids.copy()
        ids[ends[wrong] - 1] ^= 1
        return ids, ends


class StandIn:
    """The fast encoder as its own reference, eight times as fast as the real one.

    `test_the_fast_encoder_is_proved` shows that both agree on all texts of the proof, so whether a mutant is detected
    depends only on those texts.
    """

    def __init__(self, referee: Encoder, fast: FastEncoder) -> None:
        self.encode_flat, self.encode = fast.encode_flat, fast.encode
        self.tokens, self.decode, self.parts = referee.tokens, referee.decode, referee.parts


@pytest.fixture(scope="module")
def stand_in(referee: Encoder, fast: FastEncoder) -> Any:
    return StandIn(referee, fast)


@pytest.fixture(scope="module")
def early_code_points() -> list[str]:
    """The proof's texts on the first 2,048 code points."""
    return [text for text in code_points() if max(text) < "\u0800"]


@pytest.fixture
def short_proof(monkeypatch: pytest.MonkeyPatch, early_code_points: list[str]) -> None:
    """A part of the proof, about fifty times as fast; the full proof detects everything it detects."""
    monkeypatch.setattr(proof, "code_points", lambda: iter(early_code_points))


# From all groups of characters on which Unicode versions or library tables have differed.
CODE_POINTS = [0x00, 0x0B, 0x1F, 0x85, 0xA0, 0x17F, 0x378, 0x180E, 0x1C89, 0x2028, 0x3000, 0xA7CB, 0xAC01, 0xE000]
CODE_POINTS += [0xFEFF, 0xFFFE, 0x10D40, 0x1E5F0, 0x1F99C, 0x323B0, 0xE0100, 0x10FFFF]


@pytest.mark.parametrize("code_point", CODE_POINTS, ids=hex)
def test_one_wrong_id_for_one_code_point_is_found(data: Path, stand_in: Any, code_point: int) -> None:
    mutant = Mutant(data / "tokenizer", re.escape(chr(code_point)))
    with pytest.raises(InexactError, match=r"differs from tokenizers \(code points\) at token \d+ of a text of"):
        prove(mutant, stand_in, [])


def test_one_wrong_id_for_one_code_point_is_found_by_the_reference_itself(data: Path, referee: Encoder) -> None:
    with pytest.raises(InexactError, match=r"differs from tokenizers \(code points\) at token \d+"):
        prove(Mutant(data / "tokenizer", " \x0b"), referee, [])


PATTERNS = {
    "U+000B after a space": " \x0b",
    "U+000B after two spaces": "  \x0b",
    "a no-break space before a letter": "\u00a0[a-z]",
    "a word longer than 64 bytes": "[A-Za-z]{65}",
    "a word of 64 bytes": "(?<![A-Za-z])[A-Za-z]{64}(?![A-Za-z])",
    "a word of 63 bytes": "(?<![A-Za-z])[A-Za-z]{63}(?![A-Za-z])",
    "a word of 128 bytes": "(?<![A-Za-z])[A-Za-z]{128}(?![A-Za-z])",
    "a word longer than 4,096 bytes": "[A-Za-z]{4097}",
    "a number longer than 64 bytes": "[0-9]{65}",
    "letters of two bytes, longer than 64": "é{33}",
    "letters of three bytes, longer than 64": "中{22}",
    "emoji, longer than 64 bytes": "🦜{17}",
    "a run of 65 spaces": "(?<! ) {65}(?! )",
    "200,000 spaces": " {200000}",
    "65 line ends": "\n{65}",
    "65 signs": "={65}",
    "a contraction in capitals": "'S",
    "a contraction behind a letter of another script": "é's",
    "a contraction behind a digit": "1'[sS]",
    "a contraction with a long s": "'\u017f",
    "a contraction with a Kelvin sign": "\u212a",
    "'ll at the end of a text": "'ll$",
    "a line end of two characters": "[^\r\n]\r\n",
    "a tab behind a blank": " \t",
    "a combining mark behind a blank": " \u0301",
    "a digit of another script behind a letter": "[a-z]٣",
    "a joined emoji": "👩\u200d👩",
    "the literal end token": re.escape(EOS_TOKEN),
    "the literal end token behind a letter": f"[a-z]{re.escape(EOS_TOKEN)}",
    "half of the end token": r"<\|endoftext\|(?!>)",
    "two control characters": "\x01\x02",
    "a Hangul syllable of several code points": "\u1100|\uac01",
}


@pytest.mark.usefixtures("short_proof")
@pytest.mark.parametrize("defect", PATTERNS)
def test_a_wrong_id_in_a_rare_context_is_found(data: Path, stand_in: Any, defect: str) -> None:
    mutant = Mutant(data / "tokenizer", PATTERNS[defect])
    with pytest.raises(InexactError, match=r"differs from tokenizers \((code points|hard cases)\) at token \d+"):
        prove(mutant, stand_in, [])


def test_a_wrong_id_for_any_token_of_the_vocabulary_is_found(data: Path, referee: Encoder, fast: FastEncoder) -> None:
    """A missing merge: each token of the vocabulary must occur among the compared ids."""
    occurring: set[int] = set()
    for texts in ([text] for text in hard_cases(referee)):
        occurring.update(fast.encode_flat(texts)[0].tolist())
    reachable = {i for i, token in enumerate(referee.tokens()) if referee.encode(token).tolist() == [i]}
    assert len(reachable) > 350
    assert reachable <= occurring


class EndTokenMutant(FastEncoder):
    """Treats a literal end token as the end."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        ends = []
        for text in texts:
            for number, part in enumerate(text.split(EOS_TOKEN)):
                ids += [0] if number else []
                ids += super().encode_flat([part])[0].tolist()
            ends.append(len(ids))
        return np.array(ids, np.uint32), np.array(ends, np.int64)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_flat([text])[0]


@pytest.mark.usefixtures("short_proof")
def test_an_end_token_read_in_a_document_is_found(data: Path, stand_in: Any) -> None:
    with pytest.raises(InexactError, match=r"\(hard cases\) at token 0 of a text of 13 characters"):
        prove(EndTokenMutant(data / "tokenizer"), stand_in, [])


Flat = tuple[np.ndarray, np.ndarray]


def _ends_moved(ids: np.ndarray, ends: np.ndarray) -> Flat:
    return ids, ends - np.eye(1, len(ends), dtype=np.int64)[0]


def _last_text_lost(ids: np.ndarray, ends: np.ndarray) -> Flat:
    return ids[: ends[-2]] if len(ends) > 1 else ids[:0], ends[:-1]


def _last_token_lost(ids: np.ndarray, ends: np.ndarray) -> Flat:
    return ids[:-1], np.minimum(ends, len(ids) - 1)


def _token_added(ids: np.ndarray, ends: np.ndarray) -> Flat:
    return np.append(ids, ids[-1:]), ends + np.eye(1, len(ends), len(ends) - 1, dtype=np.int64)[0]


def _wrong_only_together(ids: np.ndarray, ends: np.ndarray) -> Flat:
    return (ids[::-1], ends) if len(ends) > 1 else (ids, ends)


@pytest.mark.parametrize("defect", [_ends_moved, _last_text_lost, _last_token_lost, _token_added, _wrong_only_together])
def test_ids_or_ends_that_are_wrong_for_a_batch_are_found(
    data: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch, defect: Callable[[np.ndarray, np.ndarray], Flat]
) -> None:
    mutant = FastEncoder(data / "tokenizer")
    right = mutant.encode_flat
    monkeypatch.setattr(mutant, "encode_flat", lambda texts: defect(*right(texts)))
    with pytest.raises(InexactError, match="fastokens differs from tokenizers"):
        prove(mutant, stand_in, [])


@pytest.mark.usefixtures("short_proof")
def test_a_wrong_id_in_a_real_document_is_found(data: Path, stand_in: Any) -> None:
    mutant = Mutant(data / "tokenizer", "only_this_document_says_so")
    with pytest.raises(InexactError, match=r"\(documents\) at token \d+ of a text of 31 characters"):
        prove(mutant, stand_in, ["x = 1\n" * 50, "def only_this_document_says_so:"])


@pytest.mark.usefixtures("short_proof")
def test_the_text_that_differs_is_shown_in_ascii_and_in_short(data: Path, stand_in: Any) -> None:
    with pytest.raises(InexactError) as caught:
        prove(Mutant(data / "tokenizer", "🦜{9000}"), stand_in, [])
    assert "of a text of 10,000 characters" in str(caught.value)
    assert str(caught.value).isascii() and len(str(caught.value)) < 300


# Cases made from the tokenizer's components


ADDED = [added_token("<x>", 257), added_token("yz", 258), added_token("z<x", 259)]
NFC = {"type": "NFC"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SEVEN = {
    "type": "Split",
    "pattern": {"Regex": r"#\p{N}{1,37}|[~\u0416]\s?|\s+"},
    "behavior": "Isolated",
    "invert": False,
}
REPLACE = {"type": "Replace", "pattern": {"String": "@@"}, "content": "~!"}
END = added_token(EOS_TOKEN, 0, special=True)


def pre(*components: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [*components, BYTE_LEVEL]}


COMPONENTS: dict[str, tuple[dict[str, Any], str]] = {
    "an added token": ({"added_tokens": [END, *ADDED]}, "<x>"),
    "an added token behind a tab": ({"added_tokens": [END, *ADDED]}, "\tyz"),
    "added tokens side by side": ({"added_tokens": [END, *ADDED]}, "<x>yz"),
    "added tokens around a line end": ({"added_tokens": [END, *ADDED]}, "yz\n<x>"),
    "added tokens that overlap": ({"added_tokens": [END, *ADDED]}, "yz<x>"),
    "an added token cut off": ({"added_tokens": [END, *ADDED]}, "a<xb"),
    "an added token in capitals": ({"added_tokens": [END, *ADDED]}, " YZ "),
    "a special token next to an added one": ({"added_tokens": [END, *ADDED]}, re.escape(EOS_TOKEN) + "yz"),
    "a composition": ({"normalizer": NFC}, "e\u0327\u0301"),
    "marks in the wrong order": ({"normalizer": NFC}, "q\u0301\u0323"),
    "a Hangul syllable from its letters": ({"normalizer": NFC}, "\u1100\u1161\u11a8"),
    "a singleton": ({"normalizer": {"type": "Sequence", "normalizers": [NFC]}}, "\u0958"),
    "many marks": ({"normalizer": NFC}, "e\u0301{31}"),
    "what is replaced": ({"normalizer": {"type": "Replace", "pattern": {"String": "@@"}, "content": "~~"}}, "7@@7"),
    "what it is replaced by": (
        {"normalizer": {"type": "Replace", "pattern": {"String": "@@"}, "content": "~!"}},
        "@@~!",
    ),
    "what is put first": ({"normalizer": {"type": "Prepend", "prepend": "@#"}}, "\n@#"),
    "a string to split by": ({"pre_tokenizer": pre({**SEVEN, "pattern": {"String": "@#"}})}, "@#@#\n"),
    "as many digits as a pattern counts": ({"pre_tokenizer": pre(SEVEN)}, "(?<!0)#*7{37}(?!7)"),
    "more digits than a pattern counts": ({"pre_tokenizer": pre(SEVEN)}, "(?<!7)7{112}(?!7)"),
    "a letter of a pattern": ({"pre_tokenizer": pre(SEVEN)}, "\u0416\t"),
    "a sign of a pattern before a digit": ({"pre_tokenizer": pre(SEVEN)}, "~#٣"),
    "the unknown token": ({"model": {"unk_token": "<?>"}}, r"<\?>\t"),
}


@pytest.mark.usefixtures("short_proof")
@pytest.mark.parametrize("defect", COMPONENTS)
def test_a_wrong_id_for_what_a_component_treats_in_a_special_way_is_found(
    tmp_path: Path, defect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, pattern = COMPONENTS[defect]
    directory = save(only_bytes(**parts), tmp_path)
    stand_in: Any = StandIn(Encoder(directory), FastEncoder(directory))
    monkeypatch.setattr(proof, "hard_cases", lambda referee: iter(()))
    with pytest.raises(InexactError, match=r"\(components\) at token \d+"):
        prove(Mutant(directory, pattern), stand_in, [])


# "<x>" is matched first in the first two, because it is not normalized. As a byte, "<" is 3D and "y" 7A.
LONGER = {"special": True, "normalized": True}
OVERLAPPING = {
    "special and longer": ([added_token("<x>", 257), added_token("<x>y", 258, **LONGER)], [257, 0x7A]),
    "normalized and longer": ([added_token("<x>", 257), added_token("<x>y", 258, normalized=True)], [257, 0x7A]),
    "normalized and earlier": ([added_token("x>y", 257), added_token("<x>", 258, normalized=True)], [0x3D, 257]),
}


@pytest.mark.usefixtures("short_proof", "cache")
@pytest.mark.parametrize("what", OVERLAPPING)
def test_added_tokens_that_the_fast_encoder_matches_in_another_order_are_encoded_by_the_referee(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    added, ids = OVERLAPPING[what]
    directory = save(only_bytes(added_tokens=[END, *added]), tmp_path / "tokenizer")
    referee = Encoder(directory)
    assert choose_encoder(directory, referee, "auto", []) == "tokenizers"
    assert referee.encode("<x>y").tolist() == ids
    assert re.search(r"fastokens differs from tokenizers \((hard cases|components)\)", capsys.readouterr().err)


UNCOVERED: dict[str, tuple[dict[str, Any], str]] = {
    "normalizer": ({"normalizer": {"type": "NFD"}}, "component NFD"),
    "pre-tokenizer": ({"pre_tokenizer": pre({"type": "Punctuation", "behavior": "Isolated"})}, "component Punctuation"),
    "one in a sequence": ({"normalizer": {"type": "Sequence", "normalizers": [NFC, {"type": "Nmt"}]}}, "component Nmt"),
    "look-behind": ({"pre_tokenizer": pre({**SEVEN, "pattern": {"Regex": r"(?<=a)b|c"}})}, r"expression '\(\?<=a\)"),
    "anchor": ({"pre_tokenizer": pre({**SEVEN, "pattern": {"Regex": r"^a|b"}})}, "regular expression"),
    "possessive": ({"pre_tokenizer": pre({**SEVEN, "pattern": {"Regex": r"\p{L}++|b"}})}, "regular expression"),
    "nested class": ({"pre_tokenizer": pre({**SEVEN, "pattern": {"Regex": r"[a-z&&[^b]]+"}})}, "regular expression"),
    "word boundary": ({"pre_tokenizer": pre({**SEVEN, "pattern": {"Regex": r"\bx"}})}, "regular expression"),
    "replaced pattern": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        "regular expression ' \\+' of Replace",
    ),
    "prefix": ({"model": {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix"),
    "suffix": ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
    "dropout": ({"model": {"dropout": 0.5}}, "dropout"),
    **{
        flag: ({"added_tokens": [END, added_token("<x>", 257, **{flag: True})]}, f"'<x>' is matched by the rule {flag}")
        for flag in ("single_word", "lstrip", "rstrip")
    },
}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("what", UNCOVERED)
def test_what_the_proof_does_not_cover_is_encoded_by_the_referee(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, reason = UNCOVERED[what]
    directory = save(only_bytes(**parts), tmp_path / "tokenizer")
    referee = Encoder(directory)
    record_proof(referee, None, {})  # an outcome of an older version must not help
    assert choose_encoder(directory, referee, "auto", _no_sample()) == "tokenizers"
    assert re.search(f"^note: encoding with tokenizers, because .*{reason}", capsys.readouterr().err)
    with pytest.raises(ConfigError, match=reason):
        choose_encoder(directory, referee, "fastokens", _no_sample())


# Choosing


@pytest.fixture
def proves_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of a full proof without its seconds of computation."""
    monkeypatch.setattr(proof, "prove", lambda fast, referee, sample: {"documents": sum(map(len, sample))})


@pytest.fixture
def wrong_after_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast encoder has a defect with U+000B after a space, which the proof detects in its first texts."""
    right = FastEncoder.encode_flat

    def encode_flat(self: FastEncoder, texts: Sequence[str]) -> Flat:
        ids, ends = right(self, texts)
        ids = ids.copy()
        ids[ends[[i for i, text in enumerate(texts) if " \x0b" in text]] - 1] ^= 1
        return ids, ends

    monkeypatch.setattr(FastEncoder, "encode_flat", encode_flat)


def _no_sample() -> Iterator[str]:
    raise AssertionError("no sample is looked at where the outcome is known")
    yield


@pytest.mark.usefixtures("proves_equal")
def test_a_proof_is_made_once(data: Path, referee: Encoder, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_encoder(data / "tokenizer", referee, "auto", ["abc", "de"]) == "fastokens"
    said = capsys.readouterr()
    assert re.search(r"^verified fastokens against tokenizers on this tokenizer in [\d.]+ s: equal$", said.err, re.M)
    assert said.out == ""
    (kept,) = (path for path in cache.rglob("*") if path.is_file())
    assert kept == proof_file(referee)
    assert json.loads(kept.read_bytes()) == {"difference": None, "checked": {"documents": 5}}
    for wanted in ("auto", "fastokens"):
        assert choose_encoder(data / "tokenizer", referee, wanted, _no_sample()) == "fastokens"
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("cache", "wrong_after_a_space")
def test_a_difference_selects_the_reference_encoder_and_is_recorded(
    data: Path, referee: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_encoder(data / "tokenizer", referee, "auto", []) == "tokenizers"
    first = capsys.readouterr().err
    assert "verified fastokens against tokenizers" in first
    assert "note: encoding with tokenizers" in first
    assert choose_encoder(data / "tokenizer", referee, "auto", _no_sample()) == "tokenizers"
    second = capsys.readouterr().err
    assert "verified" not in second
    assert re.fullmatch(
        r"note: encoding with tokenizers, .* fastokens differs from tokenizers \(code points\) .*\n", second
    )
    with pytest.raises(
        ConfigError, match=r"tokenizer: fastokens cannot be used .*differs .*Use --encoder auto"
    ) as caught:
        choose_encoder(data / "tokenizer", referee, "fastokens", _no_sample())
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("cache")
def test_a_recorded_difference_selects_the_reference_encoder(
    data: Path, referee: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    record_proof(referee, "it differs on the document a.py", {})
    assert choose_encoder(data / "tokenizer", referee, "auto", _no_sample()) == "tokenizers"
    said = capsys.readouterr()
    assert said.err.startswith("note: encoding with tokenizers") and "it differs on the document a.py" in said.err
    assert said.out == ""
    with pytest.raises(ConfigError, match=r"it differs on the document a\.py"):
        choose_encoder(data / "tokenizer", referee, "fastokens", _no_sample())
    assert choose_encoder(data / "tokenizer", referee, "tokenizers", _no_sample()) == "tokenizers"
    assert capsys.readouterr().err == ""


TORN = [b"", b"{", b'{"difference": nu', bytes(64), b"\xff\xfe", b"{}", b"[]", b"null", b'"equal"', b'{"checked": {}}']


@pytest.mark.parametrize("content", TORN, ids=ascii)
@pytest.mark.usefixtures("cache", "wrong_after_a_space")
def test_a_truncated_outcome_is_proved_again(
    data: Path, referee: Encoder, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    record_proof(referee, None, {})
    proof_file(referee).write_bytes(content)
    assert choose_encoder(data / "tokenizer", referee, "auto", []) == "tokenizers"
    assert "verified fastokens against tokenizers" in capsys.readouterr().err
    assert "differs" in json.loads(proof_file(referee).read_bytes())["difference"]


@pytest.mark.usefixtures("cache")
def test_an_outcome_applies_only_to_its_tokenizer_and_versions(
    referee: Encoder, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    content = (data / "tokenizer" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(content + "\n")
    files = {proof_file(referee), proof_file(Encoder(tmp_path / "other"))}
    newer = Encoder(data / "tokenizer")
    newer.label = "tokenizers 99.0.0"
    files.add(proof_file(newer))
    for name, value in (
        ("fast_label", lambda: "fastokens 99.0.0"),
        ("cpu_digest", lambda: "another"),
        ("PROOF_VERSION", 99),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(proof, name, value)
            files.add(proof_file(referee))
    assert len(files) == 6


@pytest.mark.usefixtures("proves_equal")
def test_an_unwritable_cache_only_repeats_the_proof(
    data: Path, referee: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert choose_encoder(data / "tokenizer", referee, "auto", []) == "fastokens"
        said = capsys.readouterr().err
        assert "cannot be written" in said and "verified fastokens" in said


@pytest.mark.usefixtures("cache")
def test_without_fastokens_the_reference_encoder_is_used(
    data: Path, referee: Encoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert choose_encoder(data / "tokenizer", referee, "auto", []) == "tokenizers"
    assert re.search(r"note: encoding with tokenizers, .*fastokens is not installed", capsys.readouterr().err)
    with pytest.raises(ConfigError, match="fastokens is not installed"):
        choose_encoder(data / "tokenizer", referee, "fastokens", [])
    assert choose_encoder(data / "tokenizer", referee, "tokenizers", []) == "tokenizers"
    assert not proof_file(referee).exists()  # it may be installed tomorrow


@pytest.mark.usefixtures("cache")
def test_without_fastokens_the_reference_encoder_is_used_even_after_a_proof(
    data: Path, referee: Encoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache may be in a home directory shared by hosts, and the library may load on only some of them."""
    record_proof(referee, None, {})
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert choose_encoder(data / "tokenizer", referee, "auto", []) == "tokenizers"
    assert "note: encoding with tokenizers" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="fastokens"):
        choose_encoder(data / "tokenizer", referee, "fastokens", [])


@pytest.mark.usefixtures("cache")
def test_a_tokenizer_that_fastokens_cannot_load_uses_the_reference_encoder(
    data: Path, referee: Encoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: FastEncoder, directory: Path) -> None:
        raise ValueError("unsupported model type Unigram")

    monkeypatch.setattr(FastEncoder, "__init__", refuse)
    assert choose_encoder(data / "tokenizer", referee, "auto", []) == "tokenizers"
    assert "fastokens cannot load it (unsupported model type Unigram)" in capsys.readouterr().err


# As raised by pyo3 on a Rust panic: not an Exception.
Panic: type[BaseException] = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


@pytest.mark.parametrize("error", [ValueError("bad offset"), Panic("index out of bounds")], ids=["error", "panic"])
@pytest.mark.usefixtures("cache")
def test_a_fast_encoder_that_fails_the_proof_is_not_used(
    data: Path,
    referee: Encoder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    right = FastEncoder.encode_flat

    def encode_flat(self: FastEncoder, texts: Sequence[str]) -> Flat:
        if any("\x00" in text for text in texts):
            raise error
        return right(self, texts)

    monkeypatch.setattr(FastEncoder, "encode_flat", encode_flat)
    assert choose_encoder(data / "tokenizer", referee, "auto", []) == "tokenizers"
    assert "note: encoding with tokenizers" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", ["", "fast", "Tokenizers", "fastokens "])
@pytest.mark.usefixtures("cache")
def test_an_unknown_encoder_is_refused(data: Path, referee: Encoder, wanted: str) -> None:
    with pytest.raises(ConfigError, match="must be auto, fastokens or tokenizers"):
        choose_encoder(data / "tokenizer", referee, wanted, _no_sample())


# While building


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Three files of 40 documents each, one task per file."""
    paths = []
    for file in range(3):
        path = tmp_path / f"{file}.jsonl"
        rows = [{"content": f"n_{n} = {file}\n" * 3, "repo_name": f"o/r{file}", "path": f"{n}.py"} for n in range(40)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(path)
    return paths


def make(data: Path, inputs: Iterable[Path], output: Path, encoder: str = "auto") -> Manifest:
    manifest = build(
        [str(path) for path in inputs],
        data / "tokenizer",
        output,
        BuildOptions(
            valid_fraction=0.5,
            shard_tokens=1_500,  # 4,500 bytes of text: more than one of the files, less than two
            encoder=encoder,
            workers=1,
        ),
    )
    assert manifest is not None
    return manifest


def files_of(directory: Path) -> dict[str, bytes]:
    """All files but the record of the input's modification times."""
    files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    files.pop("inputs.json", None)
    return files


@pytest.fixture
def proved(cache: Path, referee: Encoder) -> None:
    """Store an outcome in the cache, because a full proof takes seconds."""
    record_proof(referee, None, {})


def break_encoder(monkeypatch: pytest.MonkeyPatch, *marks: str) -> None:
    """Make the fast encoder wrong on texts that contain one of `marks`."""
    right = FastEncoder.encode_flat

    def encode_flat(self: FastEncoder, texts: Sequence[str]) -> Flat:
        ids, ends = right(self, texts)
        ids = ids.copy()
        wrong = [i for i, text in enumerate(texts) if any(mark in text for mark in marks)]
        ids[ends[wrong] - 2] ^= 1
        return ids, ends

    monkeypatch.setattr(FastEncoder, "encode_flat", encode_flat)


@pytest.mark.usefixtures("proved")
def test_both_encoders_make_the_same_bytes_and_every_check_passes(
    data: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "_REFEREE_EVERY", 1)
    manifest = make(data, inputs, tmp_path / "fast", "fastokens")
    assert len(manifest.split("train")) == 3
    make(data, inputs, tmp_path / "slow", "tokenizers")
    make(data, inputs, tmp_path / "auto")
    assert files_of(tmp_path / "fast") == files_of(tmp_path / "slow") == files_of(tmp_path / "auto")


@pytest.mark.usefixtures("proved")
def test_a_build_loads_each_encoder_once(
    data: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading is most of the start-up time, which is not parallel."""
    loaded: list[type] = []
    for encoder in (Encoder, FastEncoder):

        def load(self: Encoder, *directory: Any, right: Callable[..., None] = encoder.__init__) -> None:
            loaded.append(type(self))
            right(self, *directory)

        monkeypatch.setattr(encoder, "__init__", load)
    encoders.load_referee.cache_clear()
    encoders._fast_encoder.cache_clear()
    make(data, inputs, tmp_path / "shards")
    assert sorted(each.__name__ for each in loaded) == ["Encoder", "FastEncoder"]


@pytest.mark.usefixtures("proved")
def test_a_spot_check_that_differs_ends_the_job_and_names_the_document(
    data: Path, inputs: list[Path], tmp_path: Path, referee: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "_REFEREE_EVERY", 1)
    break_encoder(monkeypatch, "n_17 = 1\n")
    with pytest.raises(DataError, match=r"differs from tokenizers .* on the document o/r1 17\.py") as caught:
        make(data, inputs, tmp_path / "shards")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "shards" / MANIFEST).exists()
    recorded = json.loads(proof_file(referee).read_bytes())["difference"]
    assert "o/r1 17.py" in recorded


@pytest.mark.usefixtures("proved")
def test_after_a_difference_the_same_command_gives_the_right_bytes(
    data: Path,
    inputs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(data, inputs, tmp_path / "right", "tokenizers")
    monkeypatch.setattr(building, "_REFEREE_EVERY", 1)
    break_encoder(monkeypatch, "n_17 = 1\n")
    with pytest.raises(DataError, match="run the same command again"):
        make(data, inputs, tmp_path / "shards")
    capsys.readouterr()
    make(data, inputs, tmp_path / "shards")
    assert "note: encoding with tokenizers" in capsys.readouterr().err
    assert files_of(tmp_path / "shards") == files_of(tmp_path / "right")
    with pytest.raises(ConfigError, match=r"o/r1 17\.py"):
        make(data, inputs, tmp_path / "by-name", "fastokens")


@pytest.mark.usefixtures("proved")
def test_shards_that_a_refuted_encoder_finished_are_rebuilt(
    data: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks finish with undetected wrong ids; the third is checked and refutes the encoder."""
    right = make(data, inputs, tmp_path / "right", "tokenizers")
    output = tmp_path / "shards"
    good = inputs[2].read_bytes()
    facts = inputs[2].stat()
    break_encoder(monkeypatch, "n_3 = 0\n", "n_5 = 1\n", "n_7 = 2\n")
    with monkeypatch.context() as patch:
        patch.setattr(building, "_REFEREE_EVERY", 1 << 100)
        inputs[2].write_bytes(good[:-5])
        with pytest.raises(DataError, match=r"2\.jsonl:40: not a document"):
            make(data, inputs, output)
        inputs[2].write_bytes(good)
    assert inputs[2].stat().st_size == facts.st_size
    finished = sorted(path.name for path in output.glob("*.bin"))
    assert {name.partition("-")[2] for name in finished} == {"00000.bin", "00001.bin"}
    wrong = [n for n in finished if (output / n).read_bytes() != (tmp_path / "right" / n).read_bytes()]
    assert {name.partition("-")[2] for name in wrong} == {"00000.bin", "00001.bin"}
    before = {name: (output / name).read_bytes() for name in finished}

    monkeypatch.setattr(building, "_REFEREE_EVERY", 1)
    with pytest.raises(DataError, match=r"on the document o/r2 7\.py"):
        make(data, inputs, output)
    assert {name: (output / name).read_bytes() for name in finished} == before  # they were kept until then

    manifest = make(data, inputs, output)
    assert files_of(output) == files_of(tmp_path / "right")
    assert manifest.digest == right.digest
    verify(output, deep=True)
    assert verify_against_corpus(manifest) == 120


@pytest.mark.usefixtures("proved")
def test_shards_of_the_reference_encoder_are_kept_when_the_fast_one_is_refuted(
    data: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "shards"
    good = inputs[2].read_bytes()
    inputs[2].write_bytes(good[:-5])
    with pytest.raises(DataError, match=r"2\.jsonl:40: not a document"):
        make(data, inputs, output, "tokenizers")
    inputs[2].write_bytes(good)
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("*.bin")}
    assert len(kept) >= 2
    monkeypatch.setattr(building, "_REFEREE_EVERY", 1)
    break_encoder(monkeypatch, "n_7 = 2\n")
    with pytest.raises(DataError, match=r"on the document o/r2 7\.py"):
        make(data, inputs, output)
    make(data, inputs, output)
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept
    make(data, inputs, tmp_path / "right", "tokenizers")
    assert files_of(output) == files_of(tmp_path / "right")


def test_verification_against_the_input_finds_ids_that_no_check_saw(
    data: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proved: None
) -> None:
    monkeypatch.setattr(building, "_REFEREE_EVERY", 1 << 100)
    break_encoder(monkeypatch, "n_5 = 1\n")
    manifest = make(data, inputs, tmp_path / "shards")
    verify(tmp_path / "shards", deep=True)  # whole, and yet wrong
    with pytest.raises(DataError, match=r"does not contain o/r1 5\.py of the input"):
        verify_against_corpus(manifest)


@pytest.mark.slow
def test_the_first_build_proves_the_encoder_and_the_second_does_not(
    data: Path, inputs: list[Path], tmp_path: Path, cache: Path, referee: Encoder
) -> None:
    """In processes of their own: the fork server of this one, if any, knows another cache directory."""
    code = (
        "import sys; from pathlib import Path; from codeparrot_ds.shards.build import BuildOptions, build; "
        "options = BuildOptions(valid_fraction=0.5, workers=1); "
        "build(sys.argv[3:], Path(sys.argv[1]), sys.argv[2], options)"
    )

    def said_by_build(output: Path) -> str:
        command = [sys.executable, "-c", code, data / "tokenizer", output, *inputs]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "verified fastokens against tokenizers" in said_by_build(tmp_path / "first")
    outcome = json.loads(proof_file(referee).read_bytes())
    assert outcome["difference"] is None
    assert outcome["checked"]["documents"] > 1_000
    assert "verified" not in said_by_build(tmp_path / "second")
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")
