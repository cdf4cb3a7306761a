"""Paths that are written to files hold wherever a command is typed, and after the files were moved or copied."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from codeparrot_ds.corpus.clean import CleanOptions, clean
from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.corpus.options import Cleaning
from codeparrot_ds.errors import ConfigError
from codeparrot_ds.report.status import run_status
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.shards.verify import verify_against_corpus
from codeparrot_ds.system.files import exclusive_lock, is_locked
from codeparrot_ds.system.paths import found_address, stored_address
from codeparrot_ds.tokenizer.train import train as train_tokenizer
from tests.conftest import SEQ_LEN, save_recipe


@pytest.fixture
def run(tiny_recipe: dict[str, Any], tmp_path: Path) -> RunDirectory:
    """A run directory as training leaves it, except for checkpoints."""
    recipe = load_recipe(save_recipe(tiny_recipe, tmp_path / "r.yaml"))
    run = RunDirectory(recipe.run_directory)
    run.path.mkdir(parents=True)
    run.recipe.write_text(recipe.resolved(run.ds_config).to_yaml())
    shutil.copyfile(recipe.engine.deepspeed, run.ds_config)
    run.write_status("finished", checkpoint="checkpoints/step-00000006")
    return run


@pytest.mark.parametrize("name", ["tiny", "other", "not a name"])
@pytest.mark.parametrize("how", [shutil.copytree, shutil.move])
def test_the_recipe_of_a_run_is_that_of_its_directory(how: Any, name: str, run: RunDirectory, tmp_path: Path) -> None:
    before = load_recipe(run.recipe)
    assert before.run_directory == run.path
    there = tmp_path / "elsewhere" / name
    there.parent.mkdir()
    how(run.path, there)
    recipe = load_recipe(there / "recipe.yaml")
    assert recipe.engine.deepspeed == there / "ds_config.json"
    assert recipe.run_directory == (there if name != "not a name" else there.with_name("tiny"))
    assert recipe.data == before.data
    assert load_recipe(there / "recipe.yaml", ["name=next", "runs=/r"]).run_directory == Path("/r/next")


def test_a_recipe_that_names_another_configuration_keeps_it(run: RunDirectory) -> None:
    body = yaml.safe_load(run.recipe.read_text())
    body["engine"]["deepspeed"] = "ds_configs/zero1.json"
    run.recipe.write_text(yaml.safe_dump({**body, "runs": "there"}))
    assert load_recipe(run.recipe).run_directory == Path("there/tiny")
    assert load_recipe(run.recipe).engine.deepspeed == Path("ds_configs/zero1.json")


@pytest.mark.parametrize(
    "stored", ["checkpoints/step-00000006", "runs/tiny/checkpoints/step-00000006", "../x/step-00000006"]
)
def test_the_checkpoint_of_a_status_is_in_its_run(stored: str, run: RunDirectory, tmp_path: Path) -> None:
    run.write_status("finished", checkpoint=stored)  # also as older versions wrote it: from the working directory
    moved = RunDirectory(tmp_path / "moved")
    run.path.rename(moved.path)
    assert moved.read_status()["checkpoint"] == str(moved.checkpoint(6))


def test_status_needs_no_write_permission(run: RunDirectory) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        other = RunDirectory(Path(directory) / "run")
        shutil.copytree(run.path, other.path)
        with exclusive_lock(other.lock, "busy"):
            other.lock.chmod(0o444)
            other.path.chmod(0o555)
            root = os.geteuid() == 0
            if root:
                os.seteuid(65534)  # to whom the permissions apply
            try:
                assert not os.access(other.lock, os.W_OK, effective_ids=True)
                assert run_status(other).in_use
            finally:
                if root:
                    os.seteuid(0)
        assert not run_status(other).in_use
        assert not is_locked(other.path / "absent")
        other.path.chmod(0o755)


def test_a_test_of_the_lock_does_not_take_it(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path / "lock", "busy"):
        assert is_locked(tmp_path / "lock")
        with pytest.raises(ConfigError, match="busy"), exclusive_lock(tmp_path / "lock", "busy"):
            pass
    assert not is_locked(tmp_path / "lock")


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("corpus", "../corpus"),
        ("./corpus/*.jsonl", "../corpus/*.jsonl"),
        ("../x", "../../x"),
        ("/data/corpus", "/data/corpus"),
        ("~/corpus", "/home/me/corpus"),
        ("s3://bucket/corpus", "s3://bucket/corpus"),
        ("hub:owner/name?split=train", "hub:owner/name?split=train"),
    ],
)
def test_an_input_is_named_from_the_file_that_names_it(
    given: str, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert stored_address(given, "shards") == stored
    monkeypatch.chdir("/")
    found = found_address(stored, tmp_path / "shards")
    assert found == (os.path.normpath(tmp_path / given) if stored.startswith("..") else stored)


def test_inputs_that_an_older_version_stored_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "shards").mkdir()
    monkeypatch.chdir(tmp_path)
    assert found_address("corpus", "shards") == "corpus"
    assert found_address("corp*", "shards") == "corp*"
    assert found_address("absent", "shards") == str(tmp_path / "shards" / "absent")


def test_a_chain_of_directories_can_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Corpus, clean corpus, tokenizer and shards, each made with relative paths, looked at after a move of all."""
    here = tmp_path / "here"
    source = here / "source"
    source.mkdir(parents=True)
    for number in range(60):
        (source / f"f{number}.py").write_text(
            "".join(f"def f{number}_{i}(a, b):\n    return a + {i}\n" for i in range(9))
        )
    (here / "problems.jsonl").write_text(
        json.dumps(
            {"task_id": "own/0", "prompt": "x = 1\n" * 20, "canonical_solution": "pass", "test": "", "entry_point": "f"}
        )
    )
    monkeypatch.chdir(here)
    collect(Path("corpus"), [Path("source")])
    train_tokenizer(Path("corpus"), Path("tokenizer"), 300, SEQ_LEN)
    rules = Cleaning.model_validate(
        {"heuristics": None, "near_duplicates": None, "decontamination": {"problems": ["problems.jsonl"]}}
    )
    clean(["corpus"], Path("clean"), CleanOptions(cleaning=rules, workers=1))
    build("clean", Path("tokenizer"), "shards", BuildOptions(valid_fraction=0.2, workers=1))
    stored = {
        "corpus": json.loads(Path("corpus/manifest.json").read_text(encoding="utf-8"))["options"]["directories"],
        "tokenizer": json.loads(Path("tokenizer/manifest.json").read_text(encoding="utf-8"))["inputs"],
        "clean": json.loads(Path("clean/manifest.json").read_text(encoding="utf-8"))["options"]["cleaning"][
            "decontamination"
        ]["problems"],
        "shards": json.loads(Path("shards/manifest.json").read_text(encoding="utf-8"))["inputs"],
    }
    assert stored == {
        "corpus": ["../source"],
        "tokenizer": ["../corpus"],
        "clean": ["../problems.jsonl"],
        "shards": ["../clean"],
    }
    monkeypatch.chdir("/")  # the same calls from elsewhere find their results finished
    build(f"{here}/clean", here / "tokenizer", here / "shards", BuildOptions(valid_fraction=0.2, workers=1))
    there = tmp_path / "there"
    here.rename(there)
    manifest = Manifest.read(there / "shards")
    assert manifest.inputs == [str(there / "clean")]
    assert verify_against_corpus(manifest) > 40
