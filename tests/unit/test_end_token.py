"""The token that ends a document: its name, and what the copy of the tokenizer says about it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from codeparrot_ds.errors import DataError
from codeparrot_ds.export.tokenizer import write_tokenizer
from codeparrot_ds.shards import build as building
from codeparrot_ds.shards.adopt import adopt
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.shards.verify import verify, verify_against_corpus
from codeparrot_ds.tokenizer.directory import copy_tokenizer, load_tokenizer, tokenizer_digest, tokenizer_files
from codeparrot_ds.tokenizer.encode import Encoder, FastEncoder
from codeparrot_ds.tokenizer.lossless import require_lossless
from tests.tokenizer_kinds import added_token, only_bytes

LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}


def save(directory: Path, eos_token: Any = "</s>", **config: Any) -> Path:
    """A tokenizer of bytes with the special tokens <s> (257), </s> (258) and, in the vocabulary, <|endoftext|> (0)."""
    directory.mkdir()
    added = [added_token(content, 257 + i, special=True) for i, content in enumerate(("<s>", "</s>"))]
    only_bytes(added_tokens=[added_token("<|endoftext|>", 0, special=True), *added]).save(
        str(directory / "tokenizer.json")
    )
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token, **config}))
    return directory


def documents(directory: Path) -> Path:
    directory.mkdir()
    for number in range(40):
        (directory / f"{number}.py").write_text(f"x = {number}  # </s> <|endoftext|>\n")
    return directory


def last_ids(manifest: Manifest) -> set[int]:
    """The last id of every document."""
    found: set[int] = set()
    for shard in manifest.shards:
        ids = np.fromfile(manifest.path(shard, ".bin"), manifest.id_type)
        ends = np.flatnonzero(np.isin(ids, [0, 257, 258]))
        assert len(ends) == shard.documents and ends[-1] == len(ids) - 1
        found |= set(ids[ends].tolist())
    return found


@pytest.mark.parametrize("eos_token", ["</s>", {"content": "</s>", "special": True}])
def test_it_is_what_the_configuration_says(tmp_path: Path, eos_token: Any) -> None:
    directory = save(tmp_path / "tokenizer", eos_token)
    assert (Encoder(directory).eos_token, Encoder(directory).eos_id) == ("</s>", 258)
    (directory / "tokenizer_config.json").rename(directory / "special_tokens_map.json")
    assert Encoder(directory).eos_id == 258
    (directory / "special_tokens_map.json").unlink()
    assert Encoder(directory).eos_id == 0
    assert Encoder(directory, "<s>").eos_id == 257


def test_shards_end_their_documents_with_the_token_that_is_named(tmp_path: Path) -> None:
    tokenizer, source = save(tmp_path / "tokenizer", **LLAMA), documents(tmp_path / "source")
    options = {"suffix": ".py", "valid_fraction": 0.3, "workers": 1, "encoder": "tokenizers"}
    by_default = build(source, tokenizer, tmp_path / "a", BuildOptions(**options))
    assert by_default is not None and by_default.eos_id == 258 and last_ids(by_default) == {258}
    assert (tmp_path / "a" / "tokenizer" / "tokenizer_config.json").read_bytes() == (
        tokenizer / "tokenizer_config.json"
    ).read_bytes()

    named = build(source, tokenizer, tmp_path / "b", BuildOptions(**options, eos="<|endoftext|>"))
    assert named is not None and named.eos_id == 0 and last_ids(named) == {0}
    assert Encoder(tmp_path / "b" / "tokenizer").eos_id == 0  # the copy needs no option
    assert verify(tmp_path / "b", deep=True).eos_id == 0 and verify_against_corpus(named) > 0
    assert build(source, tokenizer, tmp_path / "b", BuildOptions(**options, eos="<|endoftext|>")) == named
    with pytest.raises(DataError, match=r"different options \(differing: eos_id\)"):
        build(source, tokenizer, tmp_path / "b", BuildOptions(**options))

    (model := tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "b" / "tokenizer", model, 32)
    config = json.loads((model / "tokenizer_config.json").read_text())
    assert config["eos_token"] == config["bos_token"] == "<|endoftext|>"


def test_an_interrupted_build_does_not_keep_documents_that_end_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, source = save(tmp_path / "tokenizer"), documents(tmp_path / "source")
    options = {"suffix": ".py", "valid_fraction": 0.3, "workers": 1, "encoder": "tokenizers"}
    with monkeypatch.context() as interrupted, pytest.raises(ZeroDivisionError):
        interrupted.setattr(building, "_finish", lambda *arguments, **more: 1 // 0)  # all tasks are done by then
        build(source, tokenizer, tmp_path / "shards", BuildOptions(**options))
    assert list((tmp_path / "shards").glob(".task-*.json"))
    again = build(source, tokenizer, tmp_path / "shards", BuildOptions(**options, eos="<s>"))
    assert again is not None and last_ids(again) == {257}


def test_a_token_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "tokenizer", "</end>")
    listed = r"Name one of its special tokens with --eos: '<\|endoftext\|>', '<s>', '</s>'\."
    with pytest.raises(DataError, match=rf"no token '</end>', which its configuration names as eos_token\. {listed}"):
        _ = Encoder(tokenizer).eos_id
    with pytest.raises(DataError, match=rf"no token '<eos>', which must end every document\. {listed}"):
        build(documents(tmp_path / "source"), tokenizer, tmp_path / "shards", BuildOptions(suffix=".py", eos="<eos>"))
    assert not (tmp_path / "shards").exists()


def test_an_end_token_that_is_not_special_is_refused(tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "tokenizer")
    body = json.loads((tokenizer / "tokenizer.json").read_text())
    body["added_tokens"][2]["special"] = False
    (tokenizer / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match="added token </s>: not special"):
        require_lossless(Encoder(tokenizer), tokenizer)
    assert require_lossless(Encoder(tokenizer, "<s>"), tokenizer) == []


def test_a_dataset_of_another_tool_is_adopted_with_its_end_token(tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "other", "<s>")
    np.array([1, 2, 258, 3, 258, 4, 258], np.uint16).tofile(tmp_path / "tokens.bin")
    with pytest.raises(DataError, match=r"no end token \(id 257\)"):
        adopt(tmp_path / "tokens", tokenizer, valid_fraction=0.4)
    manifest = adopt(tmp_path / "tokens", tokenizer, eos="</s>", valid_fraction=0.4)
    assert manifest.eos_id == 258 and manifest.documents["written"] == 3
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "</s>"


# vocab.json and merges.txt


def save_vocabulary(data: Path, directory: Path) -> Path:
    """The vocabulary of `data`'s tokenizer, as GPT-2's files."""
    directory.mkdir()
    Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json")).model.save(str(directory))
    assert sorted(path.name for path in directory.iterdir()) == ["merges.txt", "vocab.json"]
    return directory


def test_a_vocabulary_with_merges_is_read_as_transformers_reads_it(data: Path, tmp_path: Path) -> None:
    from transformers import GPT2TokenizerFast

    directory = save_vocabulary(data, tmp_path / "tokenizer")
    encoder, reference = Encoder(directory), Encoder(data / "tokenizer")
    text = "def area(width, height):\n\treturn width * height  # ¬é🦜 <|endoftext|>\n"
    assert encoder.encode(text).tolist() == reference.encode(text).tolist()
    assert FastEncoder(directory).encode(text).tolist() == reference.encode(text).tolist()
    theirs = GPT2TokenizerFast.from_pretrained(directory)
    assert (encoder.eos_token, encoder.eos_id) == (theirs.eos_token, theirs.eos_token_id) == ("<|endoftext|>", 0)
    assert json.loads(load_tokenizer(directory).to_str()) == json.loads(theirs.backend_tokenizer.to_str())

    manifest = build(
        documents(tmp_path / "source"),
        directory,
        tmp_path / "shards",
        BuildOptions(suffix=".py", valid_fraction=0.3, workers=1, encoder="tokenizers"),
    )
    assert manifest is not None and manifest.tokenizer_digest == tokenizer_digest(directory)
    assert (tmp_path / "shards" / "tokenizer" / "tokenizer.json").is_file()
    assert verify(tmp_path / "shards", deep=True) and verify_against_corpus(manifest) > 0


def test_beside_a_configuration_they_are_read_by_the_class_that_it_names(data: Path, tmp_path: Path) -> None:
    directory = save_vocabulary(data, tmp_path / "tokenizer")
    plain = tokenizer_digest(directory)
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = Encoder(directory)
    assert encoder.digest != plain  # read again, although the directory is the same
    assert encoder.eos_token == "</s>" and encoder.parts.prefixes_blank
    assert sorted(tokenizer_files(directory)) == ["tokenizer.json", "tokenizer_config.json"]
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    with pytest.raises(DataError, match=r"transformers cannot read vocab\.json and merges\.txt here"):
        Encoder(directory)


def test_half_of_the_files_is_no_tokenizer(data: Path, tmp_path: Path) -> None:
    directory = save_vocabulary(data, tmp_path / "tokenizer")
    (directory / "merges.txt").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file, and no vocab\.json and merges\.txt"):
        Encoder(directory)


@pytest.mark.parametrize(("eos_id", "named"), [(0, "<|endoftext|>"), (258, "</s>")])
def test_the_copy_in_a_run_names_the_token_of_its_shards(tmp_path: Path, eos_id: int, named: str) -> None:
    """Shards of earlier versions used <|endoftext|>, whatever the configuration of their tokenizer says."""
    copy_tokenizer(save(tmp_path / "tokenizer"), tmp_path / "run", eos_id)
    assert (Encoder(tmp_path / "run").eos_token, Encoder(tmp_path / "run").eos_id) == (named, eos_id)
