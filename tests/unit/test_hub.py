"""Pushes over real HTTP to a small local Hub, with and without faults."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.inputs import Corpus, find_inputs
from codeparrot_ds.documents.read import read_documents
from codeparrot_ds.documents.splits import split_of
from codeparrot_ds.export.certificate import CERTIFICATE
from codeparrot_ds.system.files import digest_bytes, digest_file, write_json
from tests.conftest import ROOT
from tests.hub_server import TOKEN, Fault, Hub, serve


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


def push(hub: Hub, *arguments: str | Path, token: str = TOKEN, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "codeparrot_ds.cli", "push", *map(str, arguments)],
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert token not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def model(directory: Path, value: float = 1.0, name: str = "model.safetensors") -> Path:
    """Create a directory with a valid certificate."""
    directory.mkdir()
    weight = torch.full((4, 2), value)
    save_file({"weight": weight}, directory / name)
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    (directory / "README.md").write_text("---\nlibrary_name: transformers\n---\n# a model\n")
    digest = digest_bytes(weight.view(-1).view(torch.uint8).numpy().data)
    if name != "model.safetensors":
        index = {"metadata": {}, "weight_map": {"weight": name}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    certificate = {
        "format_version": 1,
        "kind": "certificate",
        "dtype": "float32",
        "source": [],
        "tied": {},
        "tensors": {"weight": {"shape": [4, 2], "master": digest, "written": digest}},
        "files": {file.name: digest_file(file) for file in directory.iterdir()},
    }
    write_json(directory / CERTIFICATE, certificate)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_model_goes_to_a_branch_and_then_to_main(hub: Hub, tmp_path: Path) -> None:
    first = model(tmp_path / "first", 1.0, "model-00001-of-00001.safetensors")
    done = push(hub, first, "me/parrot")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["models/me/parrot"]
    assert repository.private
    assert repository.branches == {"main": contents(first)}

    second = model(tmp_path / "second", 2.0)
    done = push(hub, second, "me/parrot", "--branch", "run-2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["branches"] == ["run-2"]
    assert repository.branches == {"main": contents(first), "run-2": contents(second)}

    done = push(hub, second, "me/parrot", "--branch", "run-2", "--merge")
    assert done.returncode == 0, done.stderr
    assert repository.branches == {"main": contents(second), "run-2": contents(second)}  # the first's weights are gone
    assert len(hub.sent) == len(set(hub.sent)) == 2  # no large file twice
    commits = len(repository.commits)
    assert push(hub, second, "me/parrot", "--branch", "run-2", "--merge").returncode == 0
    assert len(repository.commits) == commits  # nothing has changed


def test_shards_and_a_tokenizer_go_too(hub: Hub, data: Path) -> None:
    done = push(hub, data / "shards", "me/data", "--public")
    assert done.returncode == 0, done.stderr
    there = hub.repositories["datasets/me/data"]
    assert not there.private
    files = {path.relative_to(data / "shards").as_posix(): path.read_bytes() for path in (data / "shards").rglob("*.*")}
    del files["inputs.json"]  # paths and times of this machine
    pushed = dict(there.branches["main"])
    card = pushed.pop("README.md").decode()
    assert card.startswith("---\nviewer: false\n---\n") and "hf download" in card
    assert pushed == {name: content for name, content in files.items() if not name.startswith(".")}
    assert push(hub, data / "tokenizer", "me/tokenizer").returncode == 0
    assert "tokenizer.json" in hub.repositories["models/me/tokenizer"].branches["main"]


# What is pushed can be loaded


def corpus(root: Path) -> tuple[Path, list[str]]:
    """A corpus with files that were rejected, and the texts of its documents, sorted."""
    for number in range(30):
        path = root / "src" / f"{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"value = {number}\n")
    (root / "src" / "notes.txt").write_text("no")
    (root / "src" / "copy.py").write_text("value = 1\n")
    collect(root / "corpus", [root / "src"])
    return root / "corpus", sorted(f"value = {number}\n" for number in range(30))


def load_dataset(name: str | Path, cache: Path) -> list[str]:
    """Texts of the only split, for training, as the real library loads it, sorted."""
    found = load_splits(name, cache)
    assert list(found) == ["train"]
    return found["train"]


def load_splits(name: str | Path, cache: Path, **environment: str) -> dict[str, list[str]]:
    """Texts of each split as the real library loads it, sorted."""
    code = (
        "import sys, json, datasets; found = datasets.load_dataset(sys.argv[1])\n"
        "print(json.dumps({split: sorted(found[split]['content']) for split in found}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(name)],
        env={**os.environ, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def online(hub: Hub) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


def test_a_corpus_is_loaded_by_datasets_from_its_directory(tmp_path: Path) -> None:
    directory, texts = corpus(tmp_path)
    assert load_dataset(directory, tmp_path / "cache") == texts


def test_a_corpus_is_read_through_hub(tmp_path: Path) -> None:
    directory, texts = corpus(tmp_path)
    for argument in (f"hub:{directory}", str(directory)):
        reads = [read for piece in find_inputs([argument]) for read in read_documents(piece)]
        assert sorted(read.text for read in reads if isinstance(read, Document)) == texts
        assert len(reads) == 30


@pytest.mark.slow
def test_a_pushed_corpus_is_loaded_by_datasets(hub: Hub, tmp_path: Path) -> None:
    """As train and validation; without the second, which is told, if no document is in it."""
    directory, texts = corpus(tmp_path)
    done = push(hub, directory, "me/corpus", "--valid-fraction", "0.3")
    assert done.returncode == 0, done.stderr
    there = hub.repositories["datasets/me/corpus"].branches["main"]
    beside = ["README.md", "manifest.json", "rejected.jsonl"]
    assert sorted(there) == [*beside, "train-00000.jsonl.gz", "validation-00000.jsonl.gz"]
    assert str(tmp_path).encode() not in there["rejected.jsonl"] + there["README.md"]
    assert not list(directory.glob(".push*"))
    documents = list(Corpus.open(directory))
    split = {"train": "train", "valid": "validation"}
    wanted = {
        split[name]: sorted(each.text for each in documents if split_of(each, 0.3) == name)
        for name in ("train", "valid")
    }
    assert load_splits("me/corpus", tmp_path / "cache", **online(hub)) == wanted
    done = push(hub, directory, "me/corpus", "--valid-fraction", "1e-6")
    assert done.returncode == 0 and "no document is in validation at --valid-fraction 1e-06" in done.stderr
    there = hub.repositories["datasets/me/corpus"].branches["main"]
    assert sorted(there) == [*beside, "train-00000.jsonl.gz"]  # what was there would be loaded too
    assert load_splits("me/corpus", tmp_path / "again", **online(hub)) == {"train": texts}


@pytest.mark.slow
def test_a_pushed_corpus_becomes_shards(hub: Hub, data: Path, tmp_path: Path) -> None:
    directory, _ = corpus(tmp_path)
    assert push(hub, directory, "me/corpus", "--valid-fraction", "0.3").returncode == 0
    how = ["--tokenizer", str(data / "tokenizer"), "-o", str(tmp_path / "shards"), "--valid-fraction", "0.3", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "codeparrot_ds.cli", "shards", "build", "hub:me/corpus?split=train+validation", *how],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), **online(hub)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["documents"]["written"] == 30


@pytest.mark.parametrize("card", ["", "# Mine\n", "---\nlicense: mit\n---\n# Mine\n", "---\nlicense: mit\n---\n"])
def test_a_card_gets_its_configs(tmp_path: Path, card: str) -> None:
    from codeparrot_ds.corpus.card import complete_card

    directory, texts = corpus(tmp_path)
    complete = complete_card(card)
    assert complete.count("configs:") == 1 and "documents-*.jsonl.gz" in complete
    assert ("license: mit" in complete) == ("license" in card) and ("# Mine" in complete) == ("Mine" in card)
    assert complete_card(complete) == complete
    (directory / "README.md").write_text(complete)
    reads = [read for piece in find_inputs([f"hub:{directory}"]) for read in read_documents(piece)]
    assert sorted(read.text for read in reads if isinstance(read, Document)) == texts


@pytest.mark.slow
def test_a_card_of_the_owner_is_kept(hub: Hub, tmp_path: Path) -> None:
    directory, _ = corpus(tmp_path)
    own = "---\nlicense: mit\nconfigs:\n- config_name: mine\n  data_files: documents-00000.jsonl.gz\n---\n# Mine\n"
    (directory / "README.md").write_text(own)
    repository = hub.repositories

    def pushed(name: str) -> str:
        assert push(hub, directory, name, "--valid-fraction", "0.3").returncode == 0
        return repository[f"datasets/{name}"].branches["main"]["README.md"].decode()

    card = pushed("me/corpus")
    assert "license: mit" in card and "# Mine" in card  # the files have other names on the Hub
    assert "documents-" not in card and "path: validation-*.jsonl.gz" in card
    assert (directory / "README.md").read_text() == own
    (directory / "README.md").unlink()
    old = own.replace("# Mine", "# By hand")  # written on the Hub, or by an older version
    repository["datasets/me/corpus"].branches["main"]["README.md"] = old.encode()
    assert pushed("me/corpus") == card.replace("# Mine", "# By hand")
    assert "# Source code corpus" in pushed("me/other")


def test_a_tokenizer_is_loaded_by_transformers(data: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(data / "tokenizer")
    assert loaded.decode(loaded("def f():\n")["input_ids"]) == "def f():\n"


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("how", ["unavailable", "cut", "silent"])
def test_transient_faults_are_retried(hub: Hub, tmp_path: Path, how: str, times: int) -> None:
    """Every call fails once, or twice: with an error status, cut off in the middle, or without a response."""
    directory = model(tmp_path / "model")
    calls = [
        ("POST", "/api/repos/create"),
        ("POST", "/branch/"),
        ("GET", "/tree/"),
        ("POST", "/preupload/"),
        ("POST", "/batch"),
        ("PUT", "/store/"),
        ("POST", "/commit/"),
    ]
    status = 503 if how == "unavailable" else None
    hub.faults = [Fault(method, path, times, status, silent=how == "silent") for method, path in calls]
    done = push(hub, directory, "me/parrot", "--branch", "run", "--timeout", "1")
    assert done.returncode == 0, done.stderr
    assert not any(fault.times for fault in hub.faults)
    repository = hub.repositories["models/me/parrot"]
    assert repository.branches == {"main": {}, "run": contents(directory)}
    assert len(repository.commits) == len(hub.sent) == 1


def test_an_unavailable_hub_is_reported_and_the_next_call_continues(hub: Hub, tmp_path: Path) -> None:
    directory = model(tmp_path / "model")
    hub.faults = [Fault("POST", "/commit/", 99, 500)]
    done = push(hub, directory, "me/parrot", "--tries", "2")
    assert done.returncode == 1
    assert "note: me/parrot: attempt 1 of 2 failed" in done.stderr
    assert "error: me/parrot: the Hub cannot be reached, or fails" in done.stderr
    assert "run the same command again" in done.stderr
    assert hub.repositories["models/me/parrot"].branches == {"main": {}}  # whole or not at all
    hub.faults = []
    assert push(hub, directory, "me/parrot").returncode == 0
    assert hub.repositories["models/me/parrot"].branches == {"main": contents(directory)}
    assert len(hub.sent) == 1  # it had arrived before


def test_what_cannot_work_is_refused_at_once(hub: Hub, tmp_path: Path) -> None:
    directory = model(tmp_path / "model")
    secret = "hf_" + "Wr0ng" * 6
    refused = [
        (push(hub, directory, "me/parrot", token=secret), "the Hub denies access (401). Log in with `hf auth login`"),
        (push(hub, directory, "no/such/name"), "not a valid repository name"),
        (push(hub, tmp_path, "me/parrot"), "not a converted model"),
        (push(hub, directory, "me/parrot", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set"),
    ]
    (directory / "config.json").write_text("{}")
    refused.append((push(hub, directory, "me/parrot"), "config.json: its digest differs from the certificate"))
    for done, said in refused:
        assert done.returncode == 1, said
        assert done.stderr.count("error: ") == 1
        assert said in done.stderr
    assert all(not repository.commits for repository in hub.repositories.values())
