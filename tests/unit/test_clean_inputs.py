"""`corpus clean` and bad input: as in `shards build`, it is refused by name, or counted and listed."""

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from codeparrot_ds.corpus import clean as cleaning_module
from codeparrot_ds.corpus.clean import CleanOptions, clean
from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.corpus.options import Cleaning, NearDuplicates
from codeparrot_ds.corpus.stats import summarize
from codeparrot_ds.documents.inputs import Corpus, find_inputs
from codeparrot_ds.documents.walk import REMOVED
from codeparrot_ds.errors import ClusterError, ConfigError, DataError
from codeparrot_ds.system import files
from codeparrot_ds.system.files import MANIFEST, as_user_error
from codeparrot_ds.system.jobs import Slice
from tests.unit.test_inputs import BAD, BAD_PARQUET, _inputs, limit, lines, many, mixed, row, write
from tests.unit.test_skipped_files import _refuse_to_list, archive, table

__all__ = ["mixed"]  # a fixture
# Nothing but reading, exact duplicates and accounting.
READING = Cleaning.model_validate(
    {"heuristics": None, "near_duplicates": None, "secrets": None, "decontamination": {"enabled": False}}
)


def run(inputs: Sequence[Path | str], output: Path, **how: Any) -> dict[str, Any]:
    manifest = clean(inputs, output, CleanOptions(**{"cleaning": READING, "workers": 1, **how}))
    assert manifest is not None
    assert manifest["read"] == manifest["documents"] + sum(manifest["removed"].values())
    if (output / REMOVED).exists():
        listed: Counter[str] = Counter()
        for row in pq.read_table(output / REMOVED).to_pylist():
            listed[row["reason"]] += row["documents"]
        assert listed == manifest["removed"]
    return manifest


def unreadable(output: Path) -> dict[str, str]:
    """Place and reason."""
    rows = pq.read_table(output / REMOVED).to_pylist()
    return {each["path"]: each["value"] for each in rows if each["reason"] == "unreadable"}


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("case", [*BAD, *BAD_PARQUET])
def test_a_bad_document_is_refused_or_counted_and_listed(case: str, tmp_path: Path) -> None:
    """Fault 25."""
    bad = (BAD | BAD_PARQUET)[case]
    inputs, path, good = _inputs(bad, tmp_path)
    with pytest.raises(DataError, match=bad.reason) as caught:
        run(inputs, tmp_path / "fail", suffix=bad.suffix)
    assert str(caught.value).startswith(f"{path}{bad.where}: ")
    assert not (tmp_path / "fail" / MANIFEST).exists()
    manifest = run(inputs, tmp_path / "skip", suffix=bad.suffix, on_bad_document="skip")
    assert manifest["removed"]["unreadable"] == bad.documents
    ((where, reason),) = unreadable(tmp_path / "skip").items()
    assert where == f"{path}{bad.where}" and re.search(bad.reason.partition(".*copy")[0], reason)
    copies = manifest["removed"].get("exact duplicate", 0) + manifest["removed"].get("empty", 0)
    readable = manifest["documents"] + copies
    assert readable == good + bad.good if bad.good is not None else readable >= good
    assert len(list(Corpus.open(tmp_path / "skip"))) == manifest["documents"]


OTHER_READERS: dict[str, tuple[str, bytes, int]] = {  # name, content, documents that can be read
    "xz, cut": ("a.jsonl.xz", lzma.compress(lines(many()))[:-20], 0),
    "bzip2, cut": ("a.jsonl.bz2", bz2.compress(lines(many()))[:-20], 0),
    "zip, cut": ("a.zip", archive({"a.jsonl": lines(many())})[:-30], 0),
    "zip, a bad member": ("a.zip", archive({"a.jsonl": lines(many()), "b.csv": b"content,content\nx,y\n"}), 40),
    "CSV, a short row": ("a.csv", table(100) + b"x\n", 50),
    "CSV, without the column": ("a.csv", b"text,path\nx,p\n", 0),
    "CSV, an open quote": ("a.csv", b'content\nx\n"open\ny\n', 1),
    "JSON, an array without an end": ("a.json", b'[{"content": "x"}', 1),
    "JSON Lines in gzip, an array in a line": ("a.jsonl.gz", gzip.compress(b"[]\n" + row("x")), 1),
}


@pytest.mark.parametrize("case", OTHER_READERS)
def test_every_reader_refuses_or_counts_and_lists(case: str, tmp_path: Path) -> None:
    name, content, readable = OTHER_READERS[case]
    inputs = [write(tmp_path / "in" / name, content), write(tmp_path / "in" / "good.jsonl", lines(many(10, 900)))]
    with pytest.raises(DataError, match=re.escape(str(inputs[0]))):
        run(inputs, tmp_path / "fail")
    manifest = run(inputs, tmp_path / "skip", on_bad_document="skip")
    assert manifest["removed"]["unreadable"] == 1
    (where,) = unreadable(tmp_path / "skip")
    assert where.startswith(str(inputs[0]))
    assert manifest["documents"] >= 10 + readable


@pytest.mark.parametrize("on_bad_document", ["fail", "skip"])
def test_too_long_a_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_bad_document: str) -> None:
    limit(monkeypatch, document_bytes=2_000, block=512)
    path = write(tmp_path / "a.jsonl", lines(many()) + row("x" * 3_000) + b"\n" + row("last"))
    if on_bad_document == "fail":
        with pytest.raises(DataError, match=rf"{path}:41: not a document: a line of .* the limit for one document"):
            run([path], tmp_path / "out")
        return
    assert run([path], tmp_path / "out", on_bad_document="skip")["documents"] == 41
    assert [where.partition(":")[0] for where in unreadable(tmp_path / "out")] == [str(path)]


def test_workers_and_slices_list_the_same_bad_documents(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gzip, zstandard, parquet and plain files in one directory, in several tasks."""
    monkeypatch.setattr("codeparrot_ds.corpus.clean._TASK_BYTES", 2_000)
    one = run([mixed], tmp_path / "one", on_bad_document="skip", file_bytes=2_000)
    assert one["removed"]["unreadable"] == len(unreadable(tmp_path / "one")) == 6
    run([mixed], tmp_path / "two", on_bad_document="skip", file_bytes=2_000, workers=2)
    for index in (2, 0, 1):
        part = Slice(index, 3)
        clean(
            [mixed],
            tmp_path / "sliced",
            CleanOptions(cleaning=READING, workers=1, on_bad_document="skip", file_bytes=2_000, part=part),
        )
    assert len(one["files"]) > 2
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(tmp_path / "sliced")


def test_tasks_without_documents_are_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task each for an empty file, a file with nothing but bad documents, and documents with some duplicates."""
    monkeypatch.setattr("codeparrot_ds.corpus.clean._TASK_BYTES", 1)
    words = " ".join(f"name_{i}" for i in range(40))
    write(tmp_path / "in" / "empty.jsonl", b"")
    write(tmp_path / "in" / "empty.jsonl.gz", gzip.compress(b""))
    write(tmp_path / "in" / "bad.jsonl.gz", gzip.compress(b"bad\n"))
    for name, text in (("a", words), ("b", f"{words} more"), ("c", f"{words} \n"), ("d", "other")):
        write(tmp_path / "in" / f"{name}.jsonl.gz", gzip.compress(row(text)))
    cleaning = READING.model_copy(update={"near_duplicates": NearDuplicates()})
    manifest = run([tmp_path / "in"], tmp_path / "out", on_bad_document="skip", cleaning=cleaning)
    assert manifest["removed"] == {"exact duplicate": 1, "near-duplicate": 1, "unreadable": 1}
    assert manifest["documents"] == 2


@pytest.mark.parametrize("on_bad_document", ["fail", "skip"])
@pytest.mark.parametrize("content", [b"", b"\n\n", row(""), b"bad"])
def test_input_without_a_document_is_named(tmp_path: Path, content: bytes, on_bad_document: str) -> None:
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(DataError) as caught:
        run([path], tmp_path / "out", on_bad_document=on_bad_document)
    # A document that is empty has been read, and removed.
    said = "every document was removed" if content == row("") else str(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_directories_without_documents_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d" / "a.txt", b"")
    write(tmp_path / "e" / "closed" / "a.jsonl", b"")
    write(tmp_path / "e" / "b.jsonl", lines(many()))
    with pytest.raises(DataError, match=r"d: contains no data files .*not read: 1 unsupported file type"):
        run([tmp_path / "d"], tmp_path / "out")
    with pytest.raises(DataError, match=r"d: contains no files ending in \.py"):
        run([tmp_path / "d"], tmp_path / "out", suffix=".py")
    with pytest.raises(DataError, match="missing"):
        run([tmp_path / "missing"], tmp_path / "out")
    _refuse_to_list(monkeypatch, "closed")
    with pytest.raises(DataError, match=r"closed: unreadable directory \(Permission denied\)"):
        run([tmp_path / "e"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("closed", ["input", "output"])
def test_a_file_that_may_not_be_read_and_a_directory_that_may_not_be_written_are_named(closed: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)
        path = write(root / "a.jsonl", lines(many()))
        path.chmod(0 if closed == "input" else 0o644)
        (root / "out").mkdir()
        (root / "out").chmod(0o777 if closed == "input" else 0o755)
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                os.setgid(65_534)
                os.setuid(65_534)
                run([path], root / "out" / "corpus")
            except Exception as error:
                os.write(writer, str(as_user_error(error)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader) as pipe:
            said = pipe.read()
        os.wait()
    expected = {
        "input": f"{path}: cannot be read (Permission denied",
        "output": f"{root}/out/corpus: cannot write here (Permission denied",
    }
    assert expected[closed] in said


def test_a_directory_that_holds_something_else_is_not_written_to(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(many()))
    readme = write(tmp_path / "project" / "README.md", b"mine")
    with pytest.raises(ConfigError, match=r"project: holds other files \(README\.md\)\. Name another output"):
        run([path], tmp_path / "project")
    assert readme.read_bytes() == b"mine"
    assert [each.name for each in (tmp_path / "project").iterdir()] == ["README.md"]
    (tmp_path / "empty").mkdir()
    assert run([path], tmp_path / "empty")["documents"] == 40


@pytest.mark.parametrize("url", ["s3://bucket/corpus", "gs://bucket", "memory://x"])
def test_a_url_is_no_directory_to_write_to(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.jsonl", lines(many()))
    write(tmp_path / "a.py", b"x = 1\n")
    for write_it in (partial(run, [path]), partial(collect, directories=[tmp_path])):
        with pytest.raises(ConfigError, match="is a URL, but must be a local directory"):
            write_it(output=Path(url))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl", "a.py"]


@pytest.mark.parametrize("output", [".", "out", "below/out"])
def test_a_result_that_would_be_read_as_input_is_refused(output: str, tmp_path: Path) -> None:
    """The next run would read the files of this one."""
    write(tmp_path / "in" / "a.jsonl", lines(many()))
    for source in (str(tmp_path / "in"), f"file://{tmp_path}/in", f"{tmp_path}/in/../in"):
        with pytest.raises(ConfigError, match="is inside the input"):
            run([source], tmp_path / "in" / output)
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["a.jsonl"]


def test_the_list_of_removed_documents_is_no_input(tmp_path: Path) -> None:
    """Below a directory, or matched by a glob, where the manifest does not decide what is read."""
    run([write(tmp_path / "a.jsonl", lines([*many(), many()[0]]))], tmp_path / "all" / "corpus")
    for argument in (tmp_path / "all", tmp_path / "all" / "corpus" / "*"):
        assert [piece.name.rpartition("/")[2] for piece in find_inputs([str(argument)])] == [
            "documents-00000.jsonl.zst"
        ]


def test_results_that_do_not_arrive_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with hosts of a Ray cluster that have no disk in common."""
    path = write(tmp_path / "a.jsonl", lines(many()))
    monkeypatch.setattr("codeparrot_ds.corpus.clean.measure_task", lambda task: task.number)
    for dry_run, mend in ((False, "Name an output directory"), (True, "Set TMPDIR to a directory")):
        with pytest.raises(ClusterError, match=rf"1 of 1 tasks ran \(measuring\), but .*{mend} on a disk that all"):
            run([path], tmp_path / "out", dry_run=dry_run)


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cleaned")
    run([write(root / "a.jsonl", lines([*many(), many()[0]]))], root / "corpus")
    return root / "corpus"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def other_kind(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "shards"}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (MANIFEST, cut),
        (MANIFEST, Path.unlink),
        (MANIFEST, other_kind),
        (REMOVED, cut),
        (REMOVED, Path.unlink),
        (REMOVED, lambda path: path.write_bytes(b"")),
        (REMOVED, lambda path: shutil.copy(path.parent / MANIFEST, path)),
    ],
)
def test_statistics_of_a_damaged_corpus_are_refused(
    name: str, damage: Callable[[Path], object], cleaned: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(cleaned, tmp_path / "corpus"))
    assert summarize(copy, 2).removed == {"exact duplicate": 1}
    damage(copy / name)
    with pytest.raises(DataError, match=re.escape(str(copy))) as caught:
        summarize(copy, 2)
    assert "\n" not in str(caught.value)


def test_what_was_measured_before_a_bad_document_is_kept_when_it_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaning_module, "_TASK_BYTES", 1)  # a task for each file
    write(tmp_path / "in" / "a.jsonl.gz", gzip.compress(lines(many())))
    write(tmp_path / "in" / "b.jsonl.gz", gzip.compress(b"broken\n"))
    found: list[list[str]] = []

    def open_work(parent: Path, name: str, same: str) -> Path:
        work = files.open_work(parent, name, same)
        found.append(sorted(path.name for path in work.iterdir()))
        return work

    monkeypatch.setattr(cleaning_module, "open_work", open_work)
    with pytest.raises(DataError, match=r"b\.jsonl\.gz:1"):
        run([tmp_path / "in"], tmp_path / "out")
    manifest = run([tmp_path / "in"], tmp_path / "out", on_bad_document="skip")
    assert found == [[], ["measured-00000"]]
    assert manifest["removed"]["unreadable"] == 1


@pytest.mark.parametrize(("same", "kept"), [("one", True), ("other", False), ("two", False)])
def test_work_is_continued_under_another_name(tmp_path: Path, same: str, kept: bool) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "task").write_text("done")
    (tmp_path / ".lock").write_text("")
    work = files.open_work(tmp_path, "two", same)
    assert (work / "task").exists() is kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "two"]
