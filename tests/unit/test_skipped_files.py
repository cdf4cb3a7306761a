"""Every file found is read, refused, or counted by reason in the manifest and named in `rejected.jsonl`."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import socket
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard

from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.documents.document import BadDocument, Document
from codeparrot_ds.documents.inputs import Corpus, deal, find_inputs
from codeparrot_ds.documents.read import read_documents
from codeparrot_ds.errors import DataError
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.shards.verify import verify, verify_against_corpus
from codeparrot_ds.system.files import MANIFEST

REJECTED = "rejected.jsonl"
ENCRYPTED_BIT = 1


def row(text: str, **fields: Any) -> bytes:
    return json.dumps({"content": text, **fields}, ensure_ascii=False).encode()


def texts(start: int, count: int = 50) -> list[str]:
    return [f"value_{n} = {n}\n" for n in range(start, start + count)]


def json_lines(start: int, count: int = 50) -> bytes:
    return b"".join(row(text) + b"\n" for text in texts(start, count))


def table(start: int, count: int = 50, delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["path", "content", "stars"])
    writer.writerows([f"p{n}.py", text, n] for n, text in enumerate(texts(start, count)))
    return out.getvalue().encode()


def archive(members: dict[str, bytes], **how: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, **how) as target:
        for name, content in members.items():
            target.writestr(name, content)
    return out.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read_all(*arguments: Path | str, suffix: str | None = None) -> list[Document | BadDocument]:
    pieces = find_inputs([str(argument) for argument in arguments], suffix)
    return [read for piece in pieces for read in read_documents(piece)]


def texts_of(*arguments: Path | str, suffix: str | None = None) -> list[str]:
    found = read_all(*arguments, suffix=suffix)
    assert [read for read in found if isinstance(read, BadDocument)] == []
    return [read.text for read in found if isinstance(read, Document)]


def make(data: Path, inputs: Any, output: Path, **how: Any) -> Manifest:
    manifest = build(inputs, data / "tokenizer", output, BuildOptions(valid_fraction=0.3, workers=1, **how))
    assert manifest is not None
    return manifest


def rejected(directory: Path) -> list[dict[str, Any]]:
    path = directory / REJECTED
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def skipped_in(directory: Path) -> dict[str, int]:
    """Counts of the manifest; the list must have as many of each."""
    counts = json.loads((directory / MANIFEST).read_text())["skipped_files"]
    listed = rejected(directory)
    assert dict(Counter(each["reason"] for each in listed)) == counts
    assert listed == sorted(listed, key=lambda each: (each["input"], each["path"]))
    return counts


@pytest.fixture
def formats(tmp_path: Path) -> Path:
    """Six files of 50 documents, each of another format."""
    root = tmp_path / "data"
    write(root / "a.jsonl.gz", gzip.compress(json_lines(0)))
    write(root / "b.jsonl.bz2", bz2.compress(json_lines(100)))
    write(root / "c.jsonl.xz", lzma.compress(json_lines(200)))
    write(root / "d.ndjson", json_lines(300))
    write(root / "e.csv", table(400))
    write(root / "f.zip", archive({"inner/g.jsonl": json_lines(500, 25), "inner/h.csv": table(600, 25)}))
    return root


def test_a_directory_of_six_formats_is_read_completely(data: Path, formats: Path, tmp_path: Path) -> None:
    manifest = make(data, formats, tmp_path / "shards")
    assert manifest.documents == {"read": 300, "written": 300, "empty": 0, "quarantined": 0}
    assert skipped_in(tmp_path / "shards") == {}
    expected = [text for start, count in ((0, 50), (100, 50), (200, 50), (300, 50), (400, 50)) for text in texts(start)]
    assert texts_of(formats) == [*expected, *texts(500, 25), *texts(600, 25)]
    assert verify_against_corpus(verify(tmp_path / "shards", deep=True)) > 0


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("compression", ["", ".gz", ".bz2", ".xz", ".zst", ".zstd"])
def test_every_kind_is_read_in_every_compression(kind: str, compression: str, tmp_path: Path) -> None:
    content = table(0, delimiter="\t" if kind == ".tsv" else ",") if kind in (".csv", ".tsv") else json_lines(0)
    compress: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.compress,
        ".zstd": zstandard.compress,
    }
    for name in (f"a{kind}{compression}", f"A{kind}{compression}".upper()):
        path = write(tmp_path / name, compress[compression](content))
        assert texts_of(path) == texts(0)
        parts = [piece for task in deal(find_inputs([str(path)]), 100.0) for piece in task]
        assert [read.text for piece in parts for read in read_documents(piece) if isinstance(read, Document)] == texts(
            0
        )


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_streams_one_after_the_other_are_one_file(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz", zstandard.compress: "zst"}[compress]
    whole = json_lines(0)
    parts = [whole[:333], b"", whole[333:1001], whole[1001:]]
    assert texts_of(write(tmp_path / f"a.jsonl.{suffix}", b"".join(map(compress, parts)))) == texts(0)


# What is not read


def _of_all_sorts(root: Path) -> None:
    write(root / "a.jsonl", json_lines(0, 40))
    for name in (
        "notes.txt",
        "README.md",
        "model.arrow",
        "b.jsonl.lz4",
        "c.jsonl.br",
        "d.tar",
        "e.tar.gz",
        "no-suffix",
    ):
        write(root / name, b"not read")
    write(root / ".hidden.jsonl", json_lines(900))
    write(root / ".cache" / "x.jsonl", json_lines(901))
    write(root / ".cache" / "y.jsonl", json_lines(902))
    write(root / "node_modules" / "z.jsonl", json_lines(903))
    write(root / MANIFEST, b"{}")
    write(root / "below" / "also.jsonl", json_lines(100, 40))
    write(root / "below" / "f.doc", b"")


EXPECTED = {
    "unsupported file type": [
        *("README.md", "b.jsonl.lz4", "below/f.doc", "c.jsonl.br", "d.tar", "e.tar.gz", "model.arrow", "no-suffix"),
        "notes.txt",
    ],
    "hidden file": [".hidden.jsonl"],
    "hidden directory": [".cache"],
    "directory of caches or dependencies": ["node_modules"],
    "manifest": ["manifest.json"],
}


def test_what_is_not_read_is_counted_and_named(data: Path, tmp_path: Path) -> None:
    _of_all_sorts(tmp_path / "d")
    manifest = make(data, tmp_path / "d", tmp_path / "shards")
    assert manifest.documents["written"] == 80
    assert skipped_in(tmp_path / "shards") == {reason: len(names) for reason, names in EXPECTED.items()}
    listed = rejected(tmp_path / "shards")
    assert {reason: [each["path"] for each in listed if each["reason"] == reason] for reason in EXPECTED} == EXPECTED
    assert {each["input"] for each in listed} == {0}
    assert str(tmp_path) not in (tmp_path / "shards" / REJECTED).read_text()


def test_links_and_what_is_no_file_are_named(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "d"
    write(root / "a.jsonl", json_lines(0, 40))
    write(tmp_path / "elsewhere" / "b.jsonl", json_lines(50, 40))
    (root / "linked.jsonl").symlink_to(tmp_path / "elsewhere" / "b.jsonl")  # as in the cache of the Hub: read
    (root / "tree").symlink_to(tmp_path / "elsewhere")
    (root / "self").symlink_to(root)
    (root / "loop").symlink_to(root / "loop")
    (root / "gone.txt").symlink_to(root / "nothing")
    os.mkfifo(root / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(root / "socket.jsonl"))
        manifest = make(data, root, tmp_path / "shards")
    assert manifest.documents["written"] == 80
    assert skipped_in(tmp_path / "shards") == {"broken link": 2, "link to a directory": 2, "not a regular file": 2}


def test_a_broken_link_to_a_data_file_is_refused(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.jsonl", json_lines(0, 40))
    (tmp_path / "d" / "b.parquet").symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(DataError, match=r"b\.parquet: broken link"):
        make(data, tmp_path / "d", tmp_path / "shards")


def _refuse_to_list(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make directories of these names unreadable, which permissions do not for root."""
    usual = os.scandir

    def scandir(path: Any = ".") -> Any:
        if Path(os.fsdecode(path)).name in names:
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_unreadable_directories_are_refused_all_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("d/a.jsonl", "d/one/b.jsonl", "d/below/two/c.jsonl"):
        write(tmp_path / name, json_lines(0, 40))
    _refuse_to_list(monkeypatch, "one", "two")
    for suffix in (None, ".jsonl"):
        with pytest.raises(DataError, match="2 problems") as caught:
            make(data, tmp_path / "d", tmp_path / "shards", suffix=suffix)
        assert "d/one: unreadable directory (Permission denied)" in str(caught.value)
        assert "d/below/two: unreadable directory (Permission denied)" in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_permissions_that_bind_are_noticed_too() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)
        write(root / "a.jsonl", json_lines(0))
        write(root / "closed" / "b.jsonl", json_lines(50))
        (root / "closed").chmod(0)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setgid(65_534)
                os.setuid(65_534)
                find_inputs([directory])
            except DataError as error:
                code = 0 if "closed: unreadable directory (Permission denied)" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_glob_names_what_it_matches_and_does_not_read(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "d"
    _of_all_sorts(root)
    manifest = make(data, root / "*", tmp_path / "one")
    assert manifest.documents["written"] == 80  # the directory below/ is searched
    counts = {reason: len(names) for reason, names in EXPECTED.items()}
    assert skipped_in(tmp_path / "one") == counts
    manifest = make(data, root / "**", tmp_path / "two")
    assert manifest.documents["written"] == 80
    assert skipped_in(tmp_path / "two") == counts
    assert texts_of(root / ".cache" / "*.jsonl") == [*texts(901), *texts(902)]  # named explicitly


def test_source_files_of_another_suffix_are_named(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    for n in range(40):
        write(root / f"{n}.py", texts(n, 1)[0].encode())
    write(root / "data.jsonl", json_lines(0))
    write(root / ".git" / "hook.py", b"never")
    write(root / ".hidden.py", b"never")
    (root / "link.py").symlink_to(root / "1.py")
    expected = {
        "directory of caches or dependencies": 1,
        "hidden file": 1,
        "other suffix": 1,
        "symbolic link": 1,
    }
    make(data, root, tmp_path / "shards", suffix=".py")
    assert skipped_in(tmp_path / "shards") == expected
    make(data, root / "*", tmp_path / "glob", suffix=".py")
    assert skipped_in(tmp_path / "glob")["other suffix"] == 1


def test_several_inputs_are_told_apart(data: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        write(tmp_path / name / "a.jsonl", json_lines(100 * number))
        write(tmp_path / name / "b.txt", b"")
    make(data, [tmp_path / "one", tmp_path / "two"], tmp_path / "shards")
    assert rejected(tmp_path / "shards") == [
        {"input": number, "path": "b.txt", "reason": "unsupported file type"} for number in (0, 1)
    ]


def test_a_directory_with_nothing_to_read_says_what_is_there(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.txt", b"")
    write(tmp_path / "d" / "b.lz4", b"")
    with pytest.raises(DataError, match=r"contains no data files .*not read: 2 unsupported file type"):
        make(data, tmp_path / "d", tmp_path / "shards")


def test_a_pipe_that_is_named_is_refused_and_not_waited_for(data: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl: not a regular file"):
        make(data, tmp_path / "a.jsonl", tmp_path / "shards")


def test_the_records_of_a_corpus_are_no_data(data: Path, tmp_path: Path) -> None:
    """Below a directory, matched by a glob, or at a URL, where the corpus's manifest does not decide what is read."""
    write(tmp_path / "all" / "rejected.jsonl", json_lines(100))  # data: there is no manifest beside it
    for n, text in enumerate(texts(0)):
        write(tmp_path / "src" / f"{n}.py", text.encode())
    write(tmp_path / "src" / "notes.txt", b"")
    collect(tmp_path / "all" / "corpus", [tmp_path / "src"])
    assert sorted(texts_of(tmp_path / "all")) == sorted([*texts(0), *texts(100)])
    assert sorted(texts_of(tmp_path / "all" / "corpus" / "*.json*")) == sorted(texts(0))
    fsspec.filesystem("memory").put(str(tmp_path / "all"), "/all", recursive=True)
    assert sorted(texts_of("memory://all")) == sorted([*texts(0), *texts(100)])
    make(data, tmp_path / "all", tmp_path / "shards")
    assert skipped_in(tmp_path / "shards") == {
        "manifest": 1,
        "record of a corpus or of shards": 2,
        "unsupported file type": 1,
    }


def test_the_list_of_an_earlier_build_does_not_stay(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.jsonl", json_lines(0))
    write(tmp_path / "d" / "b.txt", b"")
    make(data, tmp_path / "d", tmp_path / "shards")
    assert len(rejected(tmp_path / "shards")) == 1
    (tmp_path / "shards" / MANIFEST).unlink()
    (tmp_path / "d" / "b.txt").unlink()
    make(data, tmp_path / "d", tmp_path / "shards")
    assert skipped_in(tmp_path / "shards") == {}
    assert not (tmp_path / "shards" / REJECTED).exists()


def test_a_name_that_is_not_utf8_is_named(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.jsonl", json_lines(0))
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/d/caf\xe9.txt")), b"")
    make(data, tmp_path / "d", tmp_path / "shards")
    assert rejected(tmp_path / "shards") == [{"input": 0, "path": "caf\\udce9.txt", "reason": "unsupported file type"}]


# Zip archives


def test_each_member_is_read_by_its_own_suffix(data: Path, tmp_path: Path) -> None:
    members = {
        "a.jsonl": json_lines(0, 10),
        "deep/b.csv": table(10, 10),
        "c.jsonl.gz": gzip.compress(json_lines(20, 10)),
        "d.ndjson.xz": lzma.compress(json_lines(30, 10)),
        "notes.txt": b"",
        "__MACOSX/a.jsonl": b"\0",
        ".DS_Store": b"\0",
        "inner.zip": archive({"x.jsonl": json_lines(900)}),
        "empty/": b"",
    }
    path = write(tmp_path / "d" / "all.zip", archive(members))
    manifest = make(data, path.parent, tmp_path / "shards")
    assert manifest.documents["written"] == 40
    assert [source["name"] for source in manifest.sources] == [
        f"all.zip/{name}" for name in ("a.jsonl", "deep/b.csv", "c.jsonl.gz", "d.ndjson.xz")
    ]
    assert {each["path"]: each["reason"] for each in rejected(tmp_path / "shards")} == {
        "all.zip/notes.txt": "unsupported file type",
        "all.zip/__MACOSX": "directory of caches or dependencies",
        "all.zip/.DS_Store": "hidden file",
        "all.zip/inner.zip": "archive inside an archive",
    }
    assert skipped_in(tmp_path / "shards")["hidden file"] == 1
    places = [read.path for read in read_all(path) if isinstance(read, Document)]
    assert places[0] == "all.zip/a.jsonl#1"
    assert verify_against_corpus(verify(tmp_path / "shards", deep=True)) == 40


def test_parquet_in_an_archive_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"content": texts(0)}), sink, row_group_size=7)
    path = write(tmp_path / "a.zip", archive({"a.parquet": sink.getvalue().to_pybytes()}))
    assert texts_of(path) == texts(0)
    parts = [piece for task in deal(find_inputs([str(path)]), 10.0) for piece in task]
    assert sum(1 for piece in parts for _ in read_documents(piece)) == 50


def _encrypted() -> bytes:
    """Mark the member as encrypted, in its own header (byte 6) and in the directory (byte 8)."""
    whole = bytearray(archive({"a.jsonl": json_lines(0)}))
    whole[6] |= ENCRYPTED_BIT
    whole[whole.index(b"PK\x01\x02") + 8] |= ENCRYPTED_BIT
    return bytes(whole)


def _bad_member() -> bytes:
    """Stored without compression, one letter changed: only the checksum tells."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        target.writestr("a.jsonl", json_lines(0))
    return out.getvalue().replace(b"value_7 ", b"value_8 ")


def _twice() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target, pytest.warns(UserWarning, match="Duplicate"):
        target.writestr("a.jsonl", json_lines(0))
        target.writestr("a.jsonl", json_lines(50))
    return out.getvalue()


def _unknown_method() -> bytes:
    """Zip method 93, zstandard."""
    whole = bytearray(archive({"a.jsonl": json_lines(0)}))
    whole[8] = 93
    whole[whole.index(b"PK\x01\x02") + 10] = 93
    return bytes(whole)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_encrypted, "encrypted"),
        (_bad_member, "Bad CRC-32"),
        (_twice, "two members are named 'a.jsonl'"),
        (_unknown_method, "zip method 93, which is not supported"),
        (lambda: archive({"a.jsonl": json_lines(0)})[:-30], "damaged zip archive"),
        (lambda: json_lines(0), "not zip, which its name promises, but text"),
        (lambda: gzip.compress(json_lines(0)), "not zip, which its name promises, but gzip"),
    ],
)
def test_an_archive_that_cannot_be_read_is_named(
    content: Callable[[], bytes], reason: str, data: Path, tmp_path: Path
) -> None:
    write(tmp_path / "d" / "bad.zip", content())
    write(tmp_path / "d" / "good.jsonl", json_lines(100))
    with pytest.raises(DataError, match=reason) as caught:
        make(data, tmp_path / "d", tmp_path / "shards")
    assert "bad.zip" in str(caught.value)
    manifest = make(data, tmp_path / "d", tmp_path / "shards", on_bad_document="skip")
    counts = manifest.documents
    assert counts["written"] >= 50 and counts["quarantined"] == 1
    assert counts["read"] == counts["written"] + counts["quarantined"]


# CSV


def csv_of(tmp_path: Path, content: bytes) -> list[str]:
    """Texts, or for a bad document "bad: " and the reason."""
    reads = read_all(write(tmp_path / "a.csv", content))
    return [read.text if isinstance(read, Document) else f"bad: {read.reason}" for read in reads]


def test_fields_in_quotes_hold_anything(tmp_path: Path) -> None:
    content = b'content,path\r\n"a ""quoted""\r\nline, and\na comma",p.py\r\n\r\nplain,q.py\r\n"",r.py\n\x00nul,s.py'
    assert csv_of(tmp_path, content) == ['a "quoted"\r\nline, and\na comma', "plain", "", "\x00nul"]


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    assert csv_of(tmp_path, b'\xef\xbb\xbf"content"\nx\n') == ["x"]


def test_a_field_may_be_longer_than_the_modules_default(tmp_path: Path) -> None:
    assert csv_of(tmp_path, b"content\n" + b"x" * 200_000 + b"\n") == ["x" * 200_000]


def test_bad_rows_are_named_and_the_others_read(tmp_path: Path) -> None:
    assert csv_of(tmp_path, b"content,path\nx,p\ny\nz,p,more\ncaf\xe9,p\nlast,p\n") == [
        "x",
        "bad: 1 fields, the header has 2",
        "bad: 3 fields, the header has 2",
        "bad: not UTF-8",
        "last",
    ]


def test_an_open_quote_does_not_swallow_the_rest(tmp_path: Path) -> None:
    first, bad = csv_of(tmp_path, b'content\nx\n"open\ny\nz\n')
    assert first == "x"
    assert bad.startswith("bad: not valid CSV after row 1") and "the rest of the file cannot be read" in bad


def test_a_table_without_the_column_counts_its_rows(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.csv", b"text,path\nx,p\ny,q\nz,r\n")
    write(tmp_path / "d" / "b.jsonl", json_lines(0))
    with pytest.raises(DataError, match=r"no column 'content' \(its columns: 'text', 'path'; select one with --text-f"):
        make(data, tmp_path / "d", tmp_path / "shards")
    manifest = make(data, tmp_path / "d", tmp_path / "shards", on_bad_document="skip")
    assert manifest.documents == {"read": 53, "written": 50, "empty": 0, "quarantined": 3}


def test_two_columns_of_the_text_are_refused(tmp_path: Path) -> None:
    assert csv_of(tmp_path, b"content,content\nx,y\n") == ["bad: 2 columns are named 'content'; rename all but one"]


def test_an_empty_table_holds_no_document(tmp_path: Path) -> None:
    for content in (b"", b"content,path\n", b"content,path\n\n\n"):
        assert csv_of(tmp_path, content) == []


# JSON that is not one object to a line


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_an_array_of_objects_is_read(name: str, indent: int | None, tmp_path: Path) -> None:
    rows = [{"content": text, "more": [{}, "]"]} for text in texts(0)]
    content = json.dumps(rows, indent=indent).encode()
    path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else b"\xef\xbb\xbf" + content)
    assert texts_of(path) == texts(0)
    parts = [piece for task in deal(find_inputs([str(path)]), 100.0) for piece in task]
    assert [read.text for piece in parts for read in read_documents(piece) if isinstance(read, Document)] == texts(0)


def test_objects_spread_over_lines_are_read(tmp_path: Path) -> None:
    content = "\n".join(json.dumps({"content": text}, indent=1) for text in texts(0))
    assert texts_of(write(tmp_path / "a.json", content.encode())) == texts(0)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (b"", "the array has no end"),
        (b"] []", "something follows the array"),
        (b', {"content": ]', "not valid JSON"),
        (b' {"content": "y"}]', "no comma"),
    ],
)
def test_a_damaged_array_keeps_what_is_before(end: bytes, reason: str, tmp_path: Path) -> None:
    reads = read_all(write(tmp_path / "a.json", b'[{"content": "x"}, {"content": "caf\xe9"}, {"content": "z"}' + end))
    assert [read.text for read in reads if isinstance(read, Document)] == ["x", "z"]
    first, second = (read.reason for read in reads if isinstance(read, BadDocument))
    assert "surrogate" in first or "UTF-8" in first
    assert reason in second


# Collecting


def _collected(output: Path) -> dict[str, str]:
    """Path -> reason of what a corpus rejects, after a comparison with the counts."""
    listed = rejected(output)
    counts = json.loads((output / MANIFEST).read_text())["skipped"]
    assert dict(Counter(each["reason"] for each in listed)) == counts
    return {f"{each['repository']}/{each['path']}": each["reason"] for each in listed}


def test_what_is_not_collected_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "src"
    for name, content in {
        "a.py": b"print('a')\n",
        "copy.py": b"print('a')\n",
        "empty.py": b" \n",
        "latin.py": b"# caf\xe9\n",
        "big.py": b"x = 1\n" * 1000,
        "notes.txt": b"no",
        ".git/hook.py": b"never",
        ".hidden/a.py": b"never",
        "closed/a.py": b"never",
        ".dot.py": b"never",
    }.items():
        write(root / name, content)
    (root / "link.py").symlink_to(root / "a.py")
    (root / "broken.py").symlink_to(root / "nothing")
    os.mkfifo(root / "pipe.py")
    _refuse_to_list(monkeypatch, "closed")
    collect(tmp_path / "corpus", [root], max_file_bytes=1000)
    assert _collected(tmp_path / "corpus") == {
        "src/copy.py": "duplicate",
        "src/empty.py": "empty",
        "src/latin.py": "not UTF-8",
        "src/big.py": "too large",
        "src/notes.txt": "other suffix",
        "src/.git": "directory of caches or dependencies",
        "src/.hidden": "hidden directory",
        "src/closed": "unreadable directory",
        "src/.dot.py": "hidden file",
        "src/link.py": "symbolic link",
        "src/broken.py": "symbolic link",
        "src/pipe.py": "not a regular file",
    }
    (duplicate,) = (each for each in rejected(tmp_path / "corpus") if each["reason"] == "duplicate")
    assert duplicate["detail"] == "src a.py"
    assert str(tmp_path) not in (tmp_path / "corpus" / REJECTED).read_text()


def test_what_a_sample_leaves_out_is_named(tmp_path: Path) -> None:
    for n, text in enumerate(texts(0)):
        write(tmp_path / "src" / f"{n}.py", text.encode())
    collect(tmp_path / "corpus", [tmp_path / "src"], sample_bytes=300)
    kept = {document.path for document in Corpus.open(tmp_path / "corpus")}
    left = {name.removeprefix("src/") for name in _collected(tmp_path / "corpus")}
    assert len(kept) > 10 and not kept & left and len(kept | left) == 50


def test_the_list_does_not_decide_the_digest(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name / "src" / "a.py", b"print('a')\n")
    write(tmp_path / "two" / "src" / "notes.txt", b"")
    digests = {collect(tmp_path / f"{name}-c", [tmp_path / name / "src"])["digest"] for name in ("one", "two")}
    assert len(digests) == 1
    assert rejected(tmp_path / "one-c") == [] and len(rejected(tmp_path / "two-c")) == 1
