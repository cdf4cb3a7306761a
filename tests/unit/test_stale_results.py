"""A finished directory is returned only for the files that it was made from."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.documents.inputs import Corpus
from codeparrot_ds.errors import DataError
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.tokenizer.train import train as train_tokenizer


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def json_lines(start: int) -> str:
    return "".join(json.dumps({"content": f"value = {n}\n"}) + "\n" for n in range(start, start + 50))


def make(data: Path, inputs: Any, output: Path) -> Manifest:
    manifest = build(inputs, data / "tokenizer", output, BuildOptions(valid_fraction=0.3, workers=1))
    assert manifest is not None
    return manifest


def texts(corpus: Path) -> set[str]:
    return {document.text for document in Corpus.open(corpus)}


# Corpora


def test_another_working_directory_is_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        write(tmp_path / name / "src" / "a.py", f"name = '{name}'\n")  # of equal size
    monkeypatch.chdir(tmp_path / "one")
    collect(tmp_path / "corpus", [Path("src")])
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(DataError, match=r"other input files .*one/src/a\.py") as caught:
        collect(tmp_path / "corpus", [Path("src")])
    assert "1 new" in str(caught.value) and "1 no longer there" in str(caught.value)
    assert texts(tmp_path / "corpus") == {"name = 'one'\n"}
    collect(tmp_path / "other", [Path("src")])
    assert texts(tmp_path / "other") == {"name = 'two'\n"}


def test_the_same_source_may_be_named_in_several_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "src" / "a.py", "a = 1\n")
    manifest = collect(tmp_path / "corpus", [tmp_path / "src"])
    monkeypatch.chdir(tmp_path)
    assert collect(Path("corpus"), [Path("src")]) == manifest
    monkeypatch.chdir(tmp_path / "src")
    assert collect(tmp_path / "corpus", [Path()]) == manifest


def _add(root: Path) -> None:
    write(root / "new.py", "new = 1\n")


def _remove(root: Path) -> None:
    (root / "b.py").unlink()


def _grow(root: Path) -> None:
    write(root / "b.py", "b = 2222\n")


def _rewrite(root: Path) -> None:
    """The same size, at another time."""
    before = (root / "b.py").stat()
    write(root / "b.py", "b = 3\n")
    os.utime(root / "b.py", ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def _replace_by_an_older_file(root: Path) -> None:
    write(root / "b.tmp", "b = 4\n")
    os.utime(root / "b.tmp", (1_000_000, 1_000_000))
    (root / "b.tmp").replace(root / "b.py")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_add, r"1 new: .*new\.py"),
        (_remove, r"1 no longer there: .*b\.py"),
        (_grow, r"1 changed: .*b\.py"),
        (_rewrite, r"1 changed: .*b\.py"),
        (_replace_by_an_older_file, r"1 changed: .*b\.py"),
    ],
)
def test_a_changed_source_is_not_the_old_corpus(change: Any, said: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "src" / f"{name}.py", f"{name} = 1\n")
    collect(tmp_path / "corpus", [tmp_path / "src"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "corpus").iterdir()}
    change(tmp_path / "src")
    with pytest.raises(DataError, match=said) as caught:
        collect(tmp_path / "corpus", [tmp_path / "src"])
    assert "remove this one" in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "corpus").iterdir()} == before
    shutil.rmtree(tmp_path / "corpus")
    collect(tmp_path / "corpus", [tmp_path / "src"])
    assert texts(tmp_path / "corpus") == {path.read_text() for path in (tmp_path / "src").glob("*.py")}


def test_files_that_are_not_collected_do_not_matter(tmp_path: Path) -> None:
    write(tmp_path / "src" / "a.py", "a = 1\n")
    manifest = collect(tmp_path / "corpus", [tmp_path / "src"])
    write(tmp_path / "src" / "notes.txt", "")
    write(tmp_path / "src" / ".git" / "b.py", "b = 1\n")
    assert collect(tmp_path / "corpus", [tmp_path / "src"]) == manifest


def test_a_package_that_was_installed_since_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "lib" / "os.py", "import abc\n")
    write(tmp_path / "site" / "one.py", "one = 1\n")
    paths = {"stdlib": tmp_path / "lib", "purelib": tmp_path / "site", "platlib": tmp_path / "site"}
    monkeypatch.setattr("sysconfig.get_path", lambda key: str(paths[key]))
    manifest = collect(tmp_path / "corpus", [], installed_python=True)
    assert manifest["documents"] == 2
    assert collect(tmp_path / "corpus", [], installed_python=True) == manifest
    write(tmp_path / "site" / "two.py", "two = 2\n")
    with pytest.raises(DataError, match=r"1 new: .*two\.py"):
        collect(tmp_path / "corpus", [], installed_python=True)


def test_the_record_is_no_part_of_the_digest(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name / "src" / "a.py", "a = 1\n")
        collect(tmp_path / name / "corpus", [tmp_path / name / "src"])
    one, two = (json.loads((tmp_path / name / "corpus" / "manifest.json").read_text()) for name in ("one", "two"))
    assert one["digest"] == two["digest"]
    assert (tmp_path / "one" / "corpus" / "inputs.json").read_text() != (
        tmp_path / "two" / "corpus" / "inputs.json"
    ).read_text()


def test_a_corpus_without_a_record_is_kept_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "src" / "a.py", "a = 1\n")
    manifest = collect(tmp_path / "corpus", [tmp_path / "src"])
    (tmp_path / "corpus" / "inputs.json").unlink()
    assert collect(tmp_path / "corpus", [tmp_path / "src"]) == manifest
    assert "not checked for changes" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": [1]}', '{"a": ["x", "y"]}'])
def test_a_damaged_record_is_named(content: str, tmp_path: Path) -> None:
    write(tmp_path / "src" / "a.py", "a = 1\n")
    collect(tmp_path / "corpus", [tmp_path / "src"])
    write(tmp_path / "corpus" / "inputs.json", content)
    with pytest.raises(DataError, match=r"inputs\.json: damaged"):
        collect(tmp_path / "corpus", [tmp_path / "src"])


# Shards and tokenizers


@pytest.mark.parametrize("change", [_rewrite, _replace_by_an_older_file])
def test_input_of_the_same_size_is_not_the_same_input(change: Any, data: Path, tmp_path: Path) -> None:
    write(tmp_path / "d" / "b.py", "b = 1\n")
    for n in range(40):
        write(tmp_path / "d" / f"{n}.py", f"n = {n}\n")
    build(
        tmp_path / "d",
        data / "tokenizer",
        tmp_path / "shards",
        how := BuildOptions(valid_fraction=0.3, workers=1, suffix=".py"),
    )
    change(tmp_path / "d")
    with pytest.raises(DataError, match=r"finished shards of other input files \(1 changed: b\.py\)"):
        build(tmp_path / "d", data / "tokenizer", tmp_path / "shards", how)


def test_shards_of_another_working_directory_are_not_taken(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, start in (("one", 100), ("two", 200)):  # of equal size
        write(tmp_path / name / "d" / "a.jsonl", json_lines(start))
    monkeypatch.chdir(tmp_path / "one")
    make(data, "d", tmp_path / "shards")
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(DataError, match=r"other input files \(1 changed: a\.jsonl\)"):
        make(data, "d", tmp_path / "shards")


def test_input_that_was_moved_is_the_same(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "one" / "a.jsonl", json_lines(0))
    manifest = make(data, tmp_path / "one", tmp_path / "shards")
    (tmp_path / "one").rename(tmp_path / "two")
    assert make(data, tmp_path / "two", tmp_path / "shards").digest == manifest.digest


def test_both_of_two_inputs_with_one_name_are_recorded(data: Path, tmp_path: Path) -> None:
    for name, start in (("one", 100), ("two", 200)):
        write(tmp_path / name / "a.jsonl", json_lines(start))
    inputs = [tmp_path / "one", tmp_path / "two"]
    make(data, inputs, tmp_path / "shards")
    write(tmp_path / "one" / "a.jsonl", json_lines(300))
    with pytest.raises(DataError, match=r"1 changed: a\.jsonl\)"):
        make(data, inputs, tmp_path / "shards")


def test_a_member_of_an_archive_that_changed_is_noticed(data: Path, tmp_path: Path) -> None:
    import zipfile

    for start, time in ((100, 1), (200, 1)):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as target:
            target.writestr("a.jsonl", json_lines(start))
        os.utime(tmp_path / "a.zip", (time, time))  # the same size and time: the checksum tells
        if start == 100:
            make(data, tmp_path / "a.zip", tmp_path / "shards")
    with pytest.raises(DataError, match=r"1 changed: a\.zip/a\.jsonl"):
        make(data, tmp_path / "a.zip", tmp_path / "shards")


def test_a_tokenizer_of_another_corpus_is_not_taken(tmp_path: Path, data: Path) -> None:
    shutil.copytree(data / "corpus", tmp_path / "corpus")
    train_tokenizer(tmp_path / "corpus", tmp_path / "tokenizer", 300)
    shutil.rmtree(tmp_path / "corpus")
    write(tmp_path / "src" / "a.py", "value = 1\n" * 200)
    collect(tmp_path / "corpus", [tmp_path / "src"])
    with pytest.raises(DataError, match=r"finished tokenizer of other input files \(1 changed: documents-"):
        train_tokenizer(tmp_path / "corpus", tmp_path / "tokenizer", 300)
