"""What the package wrote before it was restructured is read by it now: shards, runs, checkpoints, converted models."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, RunRanks, read_run, recipe_on, save_recipe, train
from tests.trees import OLD_COMMIT, check_out

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def old_tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout of the old commit."""
    with check_out(OLD_COMMIT, tmp_path_factory.mktemp("old") / "tree") as tree:
        yield tree


def cli(tree: Path, *arguments: str | Path) -> str:
    """`codeparrot-ds` of a tree, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "codeparrot_ds.cli", *map(str, arguments)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def old_data(old_tree: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus, tokenizer and shards of the same files by the old code."""
    made = tmp_path_factory.mktemp("old-data")
    shutil.copytree(data / "corpus", made / "corpus")
    tokenizer = ("--vocab-size", "512", "--max-seq-len", "32")  # as in the tests' recipe, or the model contradicts it
    cli(old_tree, "tokenizer", "train", made / "corpus", *tokenizer, "-o", made / "tokenizer")
    options = ("--tokenizer", made / "tokenizer", "--valid-fraction", "0.2")
    cli(old_tree, "shards", "build", made / "corpus", *options, "-o", made / "shards")
    return made


def test_old_shards_are_verified_and_built_again_to_the_same_bytes(old_data: Path, tmp_path: Path) -> None:
    cli(ROOT, "shards", "verify", old_data / "shards", "--deep")
    options = ("--tokenizer", old_data / "tokenizer", "--valid-fraction", "0.2")
    cli(ROOT, "shards", "build", old_data / "corpus", *options, "-o", tmp_path / "shards")
    for path in (old_data / "shards").glob("*.bin"):
        assert path.read_bytes() == (tmp_path / "shards" / path.name).read_bytes()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_old_run_resumes_bit_for_bit_and_converts(
    stage: int, old_tree: Path, old_data: Path, tmp_path: Path, deepspeed: RunRanks, forked: RunRanks
) -> None:
    body: dict[str, Any] = recipe_on(old_data, tmp_path)
    body |= {"name": "run"}
    body["model"] |= {"vocab_size": 512}
    body["engine"] |= {"deepspeed": str(old_tree / "ds_configs" / f"zero{stage}.json")}
    recipe = save_recipe(body, tmp_path / "recipe.yaml")
    done = deepspeed("--module", "codeparrot_ds.train", recipe, cwd=old_tree, env={"PYTHONPATH": str(old_tree)})
    assert done.returncode == 0, done.output
    run = tmp_path / "run"
    uninterrupted = read_run(run)
    cli(old_tree, "convert", run, tmp_path / "old-model")
    cli(ROOT, "convert", run, tmp_path / "new-model", "--keep-attention-scale")
    one, other = (tmp_path / name / "model.safetensors" for name in ("old-model", "new-model"))
    assert one.read_bytes() == other.read_bytes()
    cli(ROOT, "convert", "--check", tmp_path / "old-model")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    resumed = train(forked, body, stage=stage)
    assert resumed.losses() == uninterrupted.losses()
    assert resumed.valid_losses() == uninterrupted.valid_losses()
    assert resumed.digests() == uninterrupted.digests()
