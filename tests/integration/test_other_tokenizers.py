"""Tokenizers of other families from shards to completions: Llama's, Unigram; WordPiece and others are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.errors import DataError
from codeparrot_ds.evaluation.complete import Sampling, complete, encode_prompt
from codeparrot_ds.evaluation.generate import TextStream
from codeparrot_ds.evaluation.pretrained import load_pretrained
from codeparrot_ds.export.certificate import check
from codeparrot_ds.export.convert import convert
from codeparrot_ds.export.tokenizer import write_tokenizer
from codeparrot_ds.shards.adopt import adopt
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.format import Manifest, read_index
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.tokenizer.report import report
from tests.conftest import RunRanks, train
from tests.tokenizer_kinds import KINDS, save, sources, unigram

pytestmark = pytest.mark.slow
PROMPT = "def f(a, b):\n    return"
CONFIGURATION = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}


def with_end_token(tokenizer: Tokenizer, **parts: Any) -> dict[str, Any]:
    """The content of a tokenizer whose end token is </s>."""
    return {**json.loads(tokenizer.to_str().replace("<|endoftext|>", "</s>")), **parts}


def llama(directory: Path) -> Path:
    """Bytes where there is no token, a blank in front, and <s> before each text in transformers, as Llama 2 has it."""
    content = with_end_token(KINDS["sentencepiece-bpe"]())
    vocabulary = content["model"]["vocab"]
    for token in ("<s>", "<unk>"):
        vocabulary[token] = len(vocabulary)
        content["added_tokens"].append({**content["added_tokens"][0], "id": vocabulary[token], "content": token})
    content["model"]["unk_token"] = "<unk>"
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    save(tokenizer, directory)
    config = {"tokenizer_class": "LlamaTokenizerFast", **CONFIGURATION}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def unigram_with_bytes(directory: Path) -> Path:
    """As T5 and XLNet have it, </s> after each text in transformers, but with bytes where there is no token."""
    tokenizer = Tokenizer.from_str(json.dumps(with_end_token(unigram())))
    eos_id = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", eos_id)]
    )
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    saved.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("make", [llama, unigram_with_bytes])
def test_a_tokenizer_with_bytes_is_used_as_in_training(
    make: Callable[[Path], Path], forked: RunRanks, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    encoder = Encoder(make(tmp_path / "tokenizer"))
    assert (encoder.eos_token, encoder.eos_id) != ("<|endoftext|>", None)
    texts = [text for text in sources("json") if text]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    options = BuildOptions(valid_fraction=0.3, workers=1, encoder="tokenizers")
    manifest = build(str(tmp_path / "texts.jsonl"), tmp_path / "tokenizer", tmp_path / "shards", options)
    assert manifest is not None
    assert manifest.eos_id == encoder.eos_id
    assert sorted(documents_of(manifest)) == sorted([*encoder.encode(text).tolist(), manifest.eos_id] for text in texts)
    tiny_recipe["data"]["shards"] = str(tmp_path / "shards")
    tiny_recipe["model"]["vocab_size"] = manifest.vocab_size
    tiny_recipe["schedule"]["steps"] = 3
    trained = train(forked, tiny_recipe, stage=1)
    assert len(trained.losses()) == 3
    convert([source_checkpoint(trained.run.path)], tmp_path / "hf", memory_cap_bytes=8_000_000_000)
    assert check(tmp_path / "hf")["forward"]["same_prediction"] == 1
    tokenizer, model = (kind.from_pretrained(tmp_path / "hf") for kind in (AutoTokenizer, AutoModelForCausalLM))
    assert tokenizer(PROMPT)["input_ids"] == encoder.encode(PROMPT).tolist()
    assert tokenizer.eos_token_id == model.config.eos_token_id == manifest.eos_id
    found = load_pretrained(tmp_path / "hf")
    for text in (PROMPT, ""):
        completions = complete(found, encode_prompt(found, text, 6), Sampling(num=2, max_new_tokens=6))
        assert [completion.ended is not None for completion in completions] == [True, True]


@pytest.mark.parametrize("make", [llama, unigram_with_bytes])
def test_a_converted_tokenizer_adds_no_token_and_loses_no_blank(make: Callable[[Path], Path], tmp_path: Path) -> None:
    encoder = Encoder(make(tmp_path / "tokenizer"))
    added = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")(PROMPT)["input_ids"]
    assert len(added) == len(encoder.encode(PROMPT)) + 1
    (tmp_path / "hf").mkdir()
    write_tokenizer(tmp_path / "tokenizer", tmp_path / "hf", 64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = encoder.encode(PROMPT).tolist()
    assert tokenizer(PROMPT)["input_ids"] == prompt
    ids = prompt + encoder.encode("a + b").tolist()  # with the blank that is put in front
    assert encoder.decode(np.array(ids)) == f"{PROMPT} a + b"
    stream = TextStream(encoder, prompt[-1])
    pieces = [stream.add(token) for token in ids[len(prompt) :]]
    assert "".join(pieces) + stream.finish() == " a + b"


def documents_of(manifest: Manifest) -> list[list[int]]:
    found: list[list[int]] = []
    for shard in manifest.shards:
        ends = np.cumsum(read_index(manifest.path(shard, ".idx")).lengths)
        ids = np.fromfile(manifest.path(shard, ".bin"), manifest.id_type)
        found += [part.tolist() for part in np.split(ids, ends[:-1])]
    return found


def word_piece() -> Tokenizer:
    """As BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        sources("json"), trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    return tokenizer


def trained_unigram() -> Tokenizer:
    """As SentencePiece trains it by default: characters that it has not seen are unknown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(sources("json"), trainer)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (word_piece, r"(?s)model WordPiece: has no tokens for words outside.*or train one: `codeparrot-ds tokenizer"),
        (trained_unigram, r"(?s)model Unigram has no tokens for.*encodes as <unk>.*or train one: `codeparrot-ds"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(make: Callable[[], Tokenizer], message: str, tmp_path: Path) -> None:
    saved = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="[SEP]" if make is word_piece else "</s>")
    saved.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(DataError, match=message):
        build(str(tmp_path / "a.jsonl"), tmp_path / "tokenizer", tmp_path / "shards")
    np.array([5, 3, 6, 3], "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=message):
        adopt(tmp_path / "train", tmp_path / "tokenizer")
    assert not (tmp_path / "shards").exists()


def test_a_report_takes_what_transformers_takes(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "def", "x", "(", ")", ":", "##s"]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "bert" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "a.py").write_text("def xs(x): x\n")
    (found,) = report(tmp_path / "bert", [str(tmp_path / "a.py")], suffix=".py").as_json()["tokenizers"]
    assert (found["vocab_size"], found["tokens"], found["words"], found["fertility"]) == (11, 8, 4, 5 / 4)


def test_training_without_validation(forked: RunRanks, tiny_recipe: dict[str, Any], data: Path, tmp_path: Path) -> None:
    options = BuildOptions(valid_fraction=0, workers=1)
    build(data / "corpus", data / "tokenizer", tmp_path / "shards", options)
    tiny_recipe["data"]["shards"] = str(tmp_path / "shards")
    tiny_recipe["evaluation"]["sequences"] = 0
    tiny_recipe["schedule"]["steps"] = 3
    trained = train(forked, tiny_recipe, stage=1)
    assert len(trained.losses()) == 3
    assert (trained.valid_losses(), trained.run.newest_checkpoint().loss_valid) == ({}, None)
    certificate = convert([source_checkpoint(trained.run.path)], tmp_path / "hf", memory_cap_bytes=8_000_000_000)
    assert certificate["forward"] is None
    assert certificate["engine"]["not_compared"] == "training recorded no validation loss for this step"
