"""Contents and provenance of a sequence; datasets of other software used in place."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codeparrot_ds.documents.inputs import Corpus
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.shards.adopt import adopt
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.shards.inspect import inspect_sequence, sequences_of_step
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.shards.sequences import Dataset, PackedSequences
from codeparrot_ds.shards.verify import verify, verify_against_corpus
from codeparrot_ds.tokenizer.encode import Encoder
from tests.conftest import SEQ_LEN, save_recipe


def test_the_documents_of_all_sequences_put_together_are_the_corpus(data: Path) -> None:
    shards = data / "shards"
    packed = PackedSequences.open(shards, "valid", 64)
    texts: dict[tuple[str, int], str] = {}
    whole: dict[tuple[str, int], tuple[int, Any]] = {}
    encoder = Encoder(data / "tokenizer")
    for number in range(len(packed)):
        excerpts = inspect_sequence({shards: 1.0}, "valid", 64, number)
        ids = packed.read(number)
        assert sum(excerpt.stop - excerpt.start for excerpt in excerpts) == len(ids) == 65
        for excerpt in excerpts:
            key = (excerpt.shard, excerpt.document)
            piece = ids[: excerpt.stop - excerpt.start]
            ids = ids[len(piece) :]
            assert encoder.decode(piece) == excerpt.text
            whole[key] = (excerpt.tokens, excerpt.provenance)
            texts.setdefault(key, "")
    by_path = {(d.repository, d.path): d for d in Corpus.open(data / "corpus")}
    assert len(whole) > 5
    for tokens, provenance in whole.values():
        assert provenance is not None
        assert len(encoder.encode(by_path[provenance.repository, provenance.path].text)) + 1 == tokens


def test_a_sequence_across_shards_is_shown_completely(data: Path, tmp_path: Path) -> None:
    shards, sources = tmp_path / "shards", Path(asyncio.__file__).parent
    options = {"suffix": ".py", "shard_tokens": 1, "valid_fraction": 0.1, "workers": 1}  # one shard per file
    build(sources, data / "tokenizer", shards, BuildOptions(**options))
    one = inspect_sequence({shards: 1.0}, "train", 15_000, 3)
    assert len({excerpt.shard for excerpt in one}) > 1
    assert sum(excerpt.stop - excerpt.start for excerpt in one) == 15_001
    for excerpt in one[1:-1]:
        assert excerpt.provenance is not None
        assert excerpt.provenance.repository == "asyncio"
        assert excerpt.text == (sources / excerpt.provenance.path).read_text() + "<|endoftext|>"


def test_a_step_of_a_recipe_is_what_its_ranks_read(data: Path, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(save_recipe(tiny_recipe, tmp_path / "recipe.yaml"))
    numbers = sequences_of_step(recipe, 3, None, 1)
    expected = Dataset.open(recipe.data.sources, SEQ_LEN).order(recipe.seed).take(12, 4).tolist()
    assert numbers == expected
    assert sequences_of_step(recipe, 3, 0, 2) + sequences_of_step(recipe, 3, 1, 2) == expected
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        sequences_of_step(recipe, 3, 2, 2)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "codeparrot_ds.cli", "shards", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_command_shows_text_and_provenance(data: Path, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    done = run("inspect", data / "shards", "--sequence", "0", "--seq-len", "50")
    assert done.returncode == 0, done.stderr
    assert "--- " in done.stdout
    assert ".py | " in done.stdout
    recipe = save_recipe(tiny_recipe, tmp_path / "recipe.yaml")
    as_json = json.loads(run("inspect", recipe, "--step", "2", "--rank", "1", "--world-size", "2", "--json").stdout)
    assert len(as_json) == 2
    head = f"{sys.executable} -m codeparrot_ds.cli shards inspect {recipe} --step 0 | head -n 1"
    cut = subprocess.run(["bash", "-c", head], capture_output=True, text=True, check=True, timeout=60)
    assert cut.stdout.startswith("=== train sequence")
    assert cut.stderr == ""
    wrong = run("inspect", data / "shards", "--sequence", "999999999")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ")
    assert "Choose one from 0 to" in wrong.stderr


@pytest.fixture
def megatron(data: Path, tmp_path: Path) -> Path:
    """PREFIX of a Megatron-LM dataset: one of our shards under another name, without our additional files."""
    (tmp_path / "theirs").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(data / "shards" / f"train-00000{suffix}", tmp_path / "theirs" / f"code_text_document{suffix}")
    return tmp_path / "theirs" / "code_text_document"


def test_a_megatron_dataset_is_adopted_in_place(data: Path, megatron: Path) -> None:
    before = {path.name: path.read_bytes() for path in megatron.parent.iterdir()}
    manifest = adopt(megatron, data / "tokenizer", valid_fraction=0.1)
    for name, content in before.items():
        assert (megatron.parent / name).read_bytes() == content
    verify(megatron.parent, deep=True)
    ids = np.fromfile(f"{megatron}.bin", "<u2")
    opened = Dataset.open({megatron.parent: 1.0}, 16)
    train, valid = manifest.split("train")[0], manifest.split("valid")[0]
    assert train.tokens + valid.tokens == len(ids)
    assert 0.05 < valid.tokens / len(ids) < 0.2
    assert ids[train.tokens - 1] == manifest.eos_id  # cut between documents
    assert opened.train.batch(np.array([0]))[0].tolist() == ids[:17].tolist()
    assert opened.valid.batch(np.array([1]))[0].tolist() == ids[train.tokens + 16 : train.tokens + 33].tolist()
    shown = inspect_sequence({megatron.parent: 1.0}, "valid", 16, 0)
    assert shown[0].provenance is None
    assert shown[0].document == train.documents
    with pytest.raises(ConfigError, match="already exists"):
        adopt(megatron, data / "tokenizer")
    with pytest.raises(DataError, match="adopted, not built"):
        verify_against_corpus(manifest)


def test_nanogpt_files_are_adopted_with_their_own_split(data: Path, tmp_path: Path) -> None:
    encoder = Encoder(data / "tokenizer")
    documents = [encoder.encode(f"x = {n}\n" * (n + 3)) for n in range(40)]
    stream = np.concatenate([np.append(ids, encoder.eos_id) for ids in documents]).astype("<u2")
    stream.tofile(tmp_path / "train.bin")
    stream[:500].tofile(tmp_path / "val.bin")
    manifest = adopt(tmp_path / "train.bin", data / "tokenizer", valid_prefix=tmp_path / "val")
    verify(tmp_path, deep=True)
    assert manifest.split("train")[0].documents == 40
    assert manifest.tokens("valid") == 500
    assert "x = 0" in inspect_sequence({tmp_path: 1.0}, "train", 20, 0)[0].text
    assert Manifest.read(tmp_path).digest == manifest.digest


def test_what_cannot_be_adopted_is_named(data: Path, megatron: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        adopt(tmp_path / "absent", data / "tokenizer")
    with pytest.raises(ConfigError, match="must be in"):
        adopt(megatron, data / "tokenizer", valid_prefix=tmp_path / "val")
    content = Path(f"{megatron}.bin").read_bytes()
    Path(f"{megatron}.bin").write_bytes(content[:-2])
    with pytest.raises(DataError, match="by its index"):
        adopt(megatron, data / "tokenizer")
    Path(f"{megatron}.bin").write_bytes(b"\xff\xff" * (len(content) // 2))
    with pytest.raises(DataError, match="built with another tokenizer"):
        adopt(megatron, data / "tokenizer")
    np.ones(100, "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match="no end token"):
        adopt(tmp_path / "train", data / "tokenizer")
    assert not (megatron.parent / "manifest.json").exists()


def test_several_shard_directories_are_read_by_weight(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(data / "shards", other)
    blend = Dataset.open({data / "shards": 3.0, other: 1.0}, SEQ_LEN)
    one = Dataset.open({data / "shards": 1.0}, SEQ_LEN)
    assert len(blend.train) == 2 * len(one.train)
    numbers = blend.order(seed=1).take(0, 400)
    assert int((numbers < len(one.train)).sum()) == 300
    expected = one.train.batch(numbers % len(one.train))
    assert np.array_equal(blend.train.batch(numbers), expected)
    assert blend.digest != one.digest
    with pytest.raises(IndexError):
        blend.train.batch(np.array([2 * len(one.train)]))


def test_shards_of_two_tokenizers_are_not_blended(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(data / "shards", other)
    tokenizer = (other / "tokenizer" / "tokenizer.json").read_text() + "\n"
    (other / "tokenizer" / "tokenizer.json").write_text(tokenizer)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer_digest"] = Encoder(other / "tokenizer").digest
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="built with a different tokenizer than"):
        Dataset.open({data / "shards": 1.0, other: 1.0}, SEQ_LEN)


def test_shards_are_compared_with_their_input(data: Path, tmp_path: Path) -> None:
    corpus = shutil.copytree(data / "corpus", tmp_path / "corpus")
    shards = tmp_path / "shards"
    manifest = build(corpus, data / "tokenizer", shards, BuildOptions(valid_fraction=0.1, workers=1))
    assert manifest is not None
    assert verify_against_corpus(manifest) > 30
    assert verify_against_corpus(Manifest.read(shards), [str(data / "corpus")]) > 30  # its new location
    ids = np.memmap(shards / "train-00000.bin", "<u2", "r+")
    ids[5] += 1
    ids.flush()
    with pytest.raises(DataError, match="does not contain"):
        verify_against_corpus(manifest)
