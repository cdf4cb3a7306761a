"""A validation set of one's own, or none: what `shards build` does with them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from codeparrot_ds.cli import app
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.format import SPLITS, Manifest, read_provenance
from codeparrot_ds.shards.inspect import inspect_sequence
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.shards.verify import verify_against_corpus
from codeparrot_ds.system.jobs import Slice
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.training.preflight import check_shards
from tests.conftest import SEQ_LEN, save_recipe


def write(path: Path, name: str, count: int, text: str = "x = {}  # a line of code\n") -> str:
    """JSON Lines of `count` documents that differ."""
    path.parent.mkdir(exist_ok=True)
    rows = ({"content": text.format(i), "path": f"{name}{i}.py"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def paths_of(manifest: Manifest) -> dict[str, list[str]]:
    """The documents of each split."""
    return {
        split: [
            document.path
            for shard in manifest.split(split)
            for document in read_provenance(manifest.path(shard, ".docs.parquet").read_bytes(), shard.name)
        ]
        for split in SPLITS
    }


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["shards", *map(str, arguments)])


def built(manifest: Manifest | None) -> Manifest:
    assert manifest is not None
    return manifest


def test_all_of_it_is_validation_and_nothing_else_is(data: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "a" / "data.jsonl", "t", 300)
    valid = [write(tmp_path / "b" / "data.jsonl", "v", 20), write(tmp_path / "c" / "more.jsonl", "w", 5)]
    arguments = ["build", train, "-o", tmp_path / "s", "--tokenizer", data / "tokenizer"]
    flags = ["--valid-input", valid[0], "--valid-input", valid[1]]
    result = run(*arguments, *flags, "--json")
    assert result.exit_code == 0, result.output
    manifest = Manifest.read(tmp_path / "s")
    assert paths_of(manifest) == {
        "train": [f"t{i}.py" for i in range(300)],
        "valid": [*(f"v{i}.py" for i in range(20)), *(f"w{i}.py" for i in range(5))],
    }
    assert (manifest.inputs, manifest.valid_inputs) == ([train], valid)
    assert [source.get("split") for source in manifest.sources] == [None, "valid", "valid"]
    assert manifest.options["valid_fraction"] == 0
    assert verify_against_corpus(manifest) == 64 + 25
    assert run(*arguments, *flags).exit_code == 0, "finished shards are kept"
    # The same files in other roles are other shards.
    for other in (["--valid-input", valid[0]], [valid[1], "--valid-input", valid[0]], [*valid, "--valid-fraction", 0]):
        assert run(*arguments, *other).exit_code == 1
    moved = Path(valid[0]).rename(tmp_path / "moved.jsonl")
    with pytest.raises(DataError, match=r"b/data\.jsonl: no such file"):
        verify_against_corpus(manifest)
    checked = run("verify", tmp_path / "s", "--valid-input", moved, "--valid-input", valid[1], "--json")
    assert json.loads(checked.stdout)["documents"]["compared with the input"] == 89


def test_slices_and_interruptions_agree(data: Path, tmp_path: Path) -> None:
    train, valid = (write(tmp_path / f"{split}.jsonl", split[0], 60) for split in SPLITS)
    how: dict[str, Any] = {"shard_tokens": 300, "workers": 1, "valid_inputs": (valid,)}
    whole = built(build(train, data / "tokenizer", tmp_path / "whole", BuildOptions(**how)))
    assert min(len(whole.split(split)) for split in SPLITS) > 1
    for index in (1, 0):
        sliced = build(train, data / "tokenizer", tmp_path / "sliced", BuildOptions(**how, part=Slice(index, 2)))
    assert built(sliced).digest == whole.digest
    # What a slice has built for validation alone is not taken for what would be split by content.
    assert build(train, data / "tokenizer", tmp_path / "other", BuildOptions(**how, part=Slice(1, 2))) is None
    how |= {"valid_inputs": (), "valid_fraction": 0.0}
    again = built(build([train, valid], data / "tokenizer", tmp_path / "other", BuildOptions(**how)))
    assert (len(paths_of(again)["train"]), again.split("valid")) == (120, ())


def test_two_ways_to_say_what_is_validated_on_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--valid-fraction 0\.1 and --valid-input both"):
        BuildOptions(valid_fraction=0.1, valid_inputs=("a",))
    for fraction in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"must be at least 0 and less than 1"):
            BuildOptions(valid_fraction=fraction)
    train = write(tmp_path / "t.jsonl", "t", 9)
    with pytest.raises(DataError, match=r"t\.jsonl: named twice among the inputs"):
        build(str(tmp_path), data / "tokenizer", tmp_path / "s", BuildOptions(valid_inputs=(train,)))
    valid = write(tmp_path / "v" / "v.jsonl", "v", 3, "")
    with pytest.raises(DataError, match=r"v\.jsonl: no document with text for validation"):
        build(train, data / "tokenizer", tmp_path / "s", BuildOptions(valid_inputs=(valid,), workers=1))


@pytest.mark.parametrize(
    ("documents", "fraction", "message"),
    [
        (
            3,
            None,
            r"t\.jsonl: 3 documents with text, too few for --valid-fraction 0\.005, which takes about one in 200",
        ),
        (1, 0.999999, r"t\.jsonl: 1 document with text, and --valid-fraction 0\.999999 put all of them"),
    ],
)
def test_a_small_corpus_is_described(
    data: Path, tmp_path: Path, documents: int, fraction: float | None, message: str
) -> None:
    train = write(tmp_path / "t.jsonl", "t", documents)
    with pytest.raises(DataError, match=message):
        build(train, data / "tokenizer", tmp_path / "s", BuildOptions(valid_fraction=fraction, workers=1))


def test_empty_documents_are_counted_where_a_corpus_is_too_small(data: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", "t", 4, "")
    with pytest.raises(DataError, match=r"no document with text \(4 empty\), so nothing to train on"):
        build(train, data / "tokenizer", tmp_path / "s", BuildOptions(workers=1))


def test_without_validation_the_recipe_must_agree(data: Path, tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    train = write(tmp_path / "t.jsonl", "t", 40)
    manifest = built(build(train, data / "tokenizer", tmp_path / "s", BuildOptions(valid_fraction=0, workers=1)))
    assert (len(paths_of(manifest)["train"]), manifest.split("valid")) == (40, ())
    assert verify_against_corpus(manifest) == 40
    tiny_recipe["data"]["shards"] = str(tmp_path / "s")
    path = save_recipe(tiny_recipe, tmp_path / "recipe.yaml")
    with pytest.raises(DataError, match=r"s: has no validation split.*evaluation\.sequences=0"):
        check_shards(load_recipe(path))
    assert len(check_shards(load_recipe(path, ["evaluation.sequences=0"])).train) > 1
    with pytest.raises(ConfigError, match=r"samples continue validation sequences"):
        load_recipe(path, ["evaluation.sequences=0", "evaluation.samples=1"])
    with pytest.raises(DataError, match=r"has no validation split"):
        inspect_sequence({tmp_path / "s": 1.0}, "valid", SEQ_LEN, 0)


def test_of_several_directories_one_may_have_none(data: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", "t", 40)
    build(train, data / "tokenizer", tmp_path / "s", BuildOptions(valid_fraction=0, workers=1))
    sources = {tmp_path / "s": 1.0, data / "shards": 1.0}
    opened = Dataset.open(sources, SEQ_LEN)
    alone = Dataset.open({data / "shards": 1.0}, SEQ_LEN)
    numbers = np.arange(len(alone.valid))
    assert np.array_equal(opened.valid.batch(numbers), alone.valid.batch(numbers))
    assert len(opened.train.parts) == 2
    shown = "".join(excerpt.text for excerpt in inspect_sequence(sources, "valid", SEQ_LEN, 3))
    assert shown == Encoder(data / "tokenizer").decode(alone.valid.batch(np.array([3]))[0])
