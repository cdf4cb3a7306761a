"""Reading and planning input: every container gives the same documents, and bad documents are named, never lost."""

import gzip
import json
import os
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from codeparrot_ds.documents import compression, tables
from codeparrot_ds.documents import document as documents
from codeparrot_ds.documents import lines as json_lines
from codeparrot_ds.documents import read as reading
from codeparrot_ds.documents.document import BadDocument, Document
from codeparrot_ds.documents.fields import PROVENANCE_FIELDS
from codeparrot_ds.documents.inputs import deal, find_inputs
from codeparrot_ds.documents.read import Piece, Read, read_documents, require_document
from codeparrot_ds.errors import DataError
from codeparrot_ds.shards.build import QUARANTINE, build
from codeparrot_ds.shards.format import Manifest, read_provenance
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.shards.verify import verify, verify_against_corpus
from codeparrot_ds.system.files import MANIFEST, write_json
from codeparrot_ds.system.jobs import Slice
from codeparrot_ds.tokenizer import proof as proving
from codeparrot_ds.tokenizer.encode import Encoder

BOM = b"\xef\xbb\xbf"
TEXTS = ["def f():\n\treturn 1\n", "s = 'naïve 🦜'\r\n", "\u2028\x0b", " ", "x" * 70, "</s>\\n\"'\n"]
VALID_FRACTION = 0.5  # so that each split gets some of the few documents


def limit(patch: pytest.MonkeyPatch, *, block: int | None = None, document_bytes: int | None = None) -> None:
    """Reduce the size of the blocks that are read, and of the largest document."""
    if block is not None:
        for module in (compression, json_lines):
            patch.setattr(module, "BLOCK_BYTES", block)
    if document_bytes is not None:
        for module in (json_lines, reading, tables, documents):
            patch.setattr(module, "MAX_DOCUMENT_BYTES", document_bytes)


def row(text: str, **fields: Any) -> bytes:
    """A row as a JSON line, without the newline."""
    return json.dumps({"content": text, **fields}, ensure_ascii=False).encode()


def lines(texts: Iterable[str] = TEXTS, end: bytes = b"\n") -> bytes:
    return b"".join(row(text, path=f"p{n}") + end for n, text in enumerate(texts))


def many(count: int = 40, start: int = 0) -> list[str]:
    """Enough distinct texts for both splits."""
    return [f"value_{n} = {n * n}  # é{n}\n" for n in range(start, start + count)]


def members(data: bytes, parts: int) -> list[bytes]:
    """`data` in equal parts, cut anywhere, even within a character."""
    bounds = [len(data) * part // parts for part in range(parts + 1)]
    return [data[a:b] for a, b in pairwise(bounds)]


def parquet(columns: dict[str, Any], **how: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, **how)
    return sink.getvalue().to_pybytes()


def read_all(*arguments: Path | str, text_field: str = "content", suffix: str | None = None) -> list[Read]:
    pieces = find_inputs([str(argument) for argument in arguments], suffix)
    return [read for piece in pieces for read in read_documents(piece, text_field)]


def texts_of(reads: Iterable[Read]) -> list[str]:
    found = list(reads)
    assert [read for read in found if isinstance(read, BadDocument)] == []
    return [read.text for read in found if isinstance(read, Document)]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def make(data: Path, inputs: Sequence[Path | str] | Path | str, output: Path, **how: Any) -> Manifest:
    options = {"valid_fraction": VALID_FRACTION, "workers": 1, **how}
    manifest = build(inputs, data / "tokenizer", output, BuildOptions(**options))
    assert manifest is not None
    return manifest


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def quarantine_of(shards: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (shards / QUARANTINE).read_text().splitlines()]


def provenance_of(manifest: Manifest) -> list[Document]:
    paths = [manifest.path(shard, ".docs.parquet") for shard in manifest.shards]
    return [document for path in paths for document in read_provenance(path.read_bytes(), str(path))]


# Containers

CONTAINERS: dict[str, tuple[str, bytes]] = {
    "plain": ("a.jsonl", lines()),
    "no newline at the end": ("a.jsonl", lines().removesuffix(b"\n")),
    "CRLF": ("a.jsonl", lines(end=b"\r\n")),
    "CRLF, no newline at the end": ("a.jsonl", lines(end=b"\r\n").removesuffix(b"\r\n")),
    "byte-order mark": ("a.jsonl", BOM + lines()),
    "blank lines": ("a.jsonl", b"\n  \n\r\n" + lines(end=b"\n\n\t\n") + b"\n\n"),
    "escaped": (
        "a.jsonl",
        b"".join(json.dumps({"content": t, "path": f"p{n}"}).encode() + b"\n" for n, t in enumerate(TEXTS)),
    ),
    "spaces between": (
        "a.jsonl",
        b"".join(
            b"  " + json.dumps(json.loads(x), indent=0).replace("\n", " ").encode() + b" \n"
            for x in lines().splitlines()
        ),
    ),
    "NaN and Infinity in other fields": (
        "a.jsonl",
        b"".join(row(t, path=f"p{n}", score=float("nan"), loss=float("-inf")) + b"\n" for n, t in enumerate(TEXTS)),
    ),
    "fields of all types": (
        "a.jsonl",
        b"".join(
            row(t, path=f"p{n}", o={"content": "no"}, l=[[], None], b=True, n=1e300) + b"\n"
            for n, t in enumerate(TEXTS)
        ),
    ),
    "the text given twice": (
        "a.jsonl",
        b"".join(b'{"content": "first",' + x[1:] + b"\n" for x in lines().splitlines()),
    ),
    ".json": ("a.json", lines()),
    "gzip": ("a.jsonl.gz", gzip.compress(lines())),
    ".json.gz": ("a.json.gz", gzip.compress(lines())),
    "gzip, three members": ("a.jsonl.gz", b"".join(gzip.compress(part) for part in members(lines(), 3))),
    "gzip, an empty member within": (
        "a.jsonl.gz",
        b"".join(gzip.compress(part) for part in [members(lines(), 2)[0], b"", members(lines(), 2)[1]]),
    ),
    "gzip with a byte-order mark": ("a.jsonl.gz", gzip.compress(BOM + lines())),
    "gzip, padded with zeros": ("a.jsonl.gz", gzip.compress(lines()) + bytes(512)),
    "gzip, not compressed": ("a.jsonl.gz", gzip.compress(lines(), 0)),
    "gzip, in capitals": ("A.JSONL.GZ", gzip.compress(lines())),
    "plain, in capitals": ("A.JSONL", lines()),
    "zstandard": ("a.jsonl.zst", zstandard.compress(lines())),
    ".json.zst": ("a.json.zst", zstandard.compress(lines())),
    ".zstd": ("a.jsonl.zstd", zstandard.compress(lines())),
    "zstandard, three frames": ("a.jsonl.zst", b"".join(zstandard.compress(part) for part in members(lines(), 3))),
    "zstandard, an empty frame within": (
        "a.jsonl.zst",
        b"".join(zstandard.compress(part) for part in [members(lines(), 2)[0], b"", members(lines(), 2)[1]]),
    ),
    "zstandard, a skippable frame first": (
        "a.jsonl.zst",
        b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip" + zstandard.compress(lines()),
    ),
    "zstandard with a checksum": ("a.jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress(lines())),
    "zstandard without the content's size": (
        "a.jsonl.zst",
        zstandard.ZstdCompressor(write_content_size=False).compress(lines()),
    ),
    "zstandard, in capitals": ("A.JSONL.ZST", zstandard.compress(lines())),
    "parquet": ("a.parquet", parquet({"content": TEXTS, "path": [f"p{n}" for n in range(len(TEXTS))]})),
    "parquet, several row groups": (
        "a.parquet",
        parquet({"content": TEXTS, "path": [f"p{n}" for n in range(len(TEXTS))]}, row_group_size=2),
    ),
    "parquet, other columns too": (
        "a.parquet",
        parquet({"n": [None] * len(TEXTS), "content": TEXTS, "path": [f"p{n}" for n in range(len(TEXTS))]}),
    ),
    "parquet, large strings": (
        "a.parquet",
        parquet({"content": pa.array(TEXTS, pa.large_string()), "path": [f"p{n}" for n in range(len(TEXTS))]}),
    ),
    "parquet, a dictionary": (
        "a.parquet",
        parquet({"content": pa.array(TEXTS).dictionary_encode(), "path": [f"p{n}" for n in range(len(TEXTS))]}),
    ),
    "parquet, in capitals": ("A.PARQUET", parquet({"content": TEXTS, "path": [f"p{n}" for n in range(len(TEXTS))]})),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_every_container_gives_the_same_documents(case: str, tmp_path: Path) -> None:
    name, content = CONTAINERS[case]
    assert read_all(write(tmp_path / name, content)) == [
        Document(text, "", f"p{n}", "", "") for n, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n\r\n  \n"),
        ("a.jsonl.gz", b""),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.jsonl.zst", b""),
        ("a.jsonl.zst", zstandard.compress(b"")),
        ("a.parquet", parquet({"content": pa.array([], pa.string())})),
    ],
)
def test_an_empty_file_holds_no_document(name: str, content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    assert read_all(path) == []
    pieces = find_inputs([str(path)])
    assert [read for task in deal(pieces, 1.0) for piece in task for read in read_documents(piece)] == []


def test_a_compressed_file_of_unknown_size_is_read(tmp_path: Path) -> None:
    """Some stores do not report a file's size: 0 then means unknown, not an empty file."""
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        content = next(content for key, content in CONTAINERS.values() if key == name)
        path = write(tmp_path / name, content)
        assert texts_of(read_documents(Piece(str(path), name, "jsonl" if "json" in name else "parquet", 0))) == TEXTS


def test_lines_do_not_end_at_other_separators(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    assert texts_of(read_all(write(tmp_path / "a.jsonl", row(text)))) == [text]


@settings(deadline=None)
@given(
    texts=st.lists(st.text(max_size=12), max_size=8),
    end=st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    block=st.integers(1, 40),
    last=st.booleans(),
)
def test_documents_do_not_depend_on_the_blocks_that_are_read(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], end: bytes, block: int, last: bool
) -> None:
    content = end.join(map(row, texts)) + (end if last else b"")
    directory = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        limit(patch, block=block)
        for name, data in (
            ("blocks.jsonl", content),
            ("blocks.jsonl.gz", b"".join(map(gzip.compress, members(content, 3)))),
            ("blocks.jsonl.zst", b"".join(map(zstandard.compress, members(content, 3)))),
        ):
            assert texts_of(read_all(write(directory / name, data))) == texts


# Provenance


def _table(directory: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    if kind == "parquet":
        return write(directory / "a.parquet", parquet({key: [r.get(key) for r in rows] for key in rows[0]}))
    if kind == "slow":  # what msgspec rejects takes another path
        rows = [{**r, "score": float("nan")} for r in rows]
    return write(directory / "a.jsonl", b"".join(json.dumps(r).encode() + b"\n" for r in rows))


KINDS = ["jsonl", "slow", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("attribute", "alias"), [(attribute, alias) for attribute, names in PROVENANCE_FIELDS.items() for alias in names]
)
def test_provenance_is_found_under_each_of_its_names(kind: str, attribute: str, alias: str, tmp_path: Path) -> None:
    (document,) = read_all(_table(tmp_path, kind, [{"content": "x", alias: "naïve/ü.py"}]))
    expected = {
        "repository": "",
        "path": "a.parquet#1" if kind == "parquet" else "a.jsonl#1",
        "licence": "",
        "source": "",
    }
    assert document == Document("x", **{**expected, attribute: "naïve/ü.py"})


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_name_that_says_something_wins(kind: str, tmp_path: Path) -> None:
    rows = [
        {
            "content": "x",
            "path": None,
            "file_path": "",
            "max_stars_repo_path": "third.py",
            "repo_name": "one",
            "repo": "two",
        },
        {
            "content": "y",
            "path": "a.py",
            "file_path": "b.py",
            "max_stars_repo_path": "c.py",
            "repo_name": "",
            "repo": "two",
        },
    ]
    first, second = read_all(_table(tmp_path, kind, rows))
    assert isinstance(first, Document) and isinstance(second, Document)
    assert (first.path, first.repository, second.path, second.repository) == ("third.py", "one", "a.py", "two")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alias", PROVENANCE_FIELDS["licence"])
def test_a_list_of_licences_becomes_one_text(kind: str, alias: str, tmp_path: Path) -> None:
    rows = [
        {"content": "x", alias: ["MIT", "Apache-2.0"]},
        {"content": "y", alias: []},
        {"content": "z", alias: ["MIT"]},
    ]
    reads = read_all(_table(tmp_path, kind, rows))
    assert [read.licence for read in reads if isinstance(read, Document)] == ["MIT, Apache-2.0", "", "MIT"]


def test_provenance_that_is_no_text_is_kept_as_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row("x", path=17, repo_name=1.5, source=True) + b"\n" + row("y", path=10**30))
    first, second = read_all(path)
    assert first == Document("x", "1.5", "17", "", "True")
    assert second == Document("y", "", str(10**30), "", "")


def test_a_row_without_a_path_is_called_by_its_file_and_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "below" / "a.jsonl", b"\n" + row("x") + b"\r\n\n\n" + row("y", path="") + b"\nbad\n" + row("z")
    )
    paths = [read.path if isinstance(read, Document) else read.where for read in read_all(tmp_path)]
    assert paths == ["below/a.jsonl#2", "below/a.jsonl#5", f"{path}:6", "below/a.jsonl#7"]
    write(tmp_path / "p" / "b.parquet", parquet({"content": ["x", "y", "z"]}, row_group_size=2))
    assert [read.path for read in read_all(tmp_path / "p") if isinstance(read, Document)] == [
        "b.parquet#1",
        "b.parquet#2",
        "b.parquet#3",
    ]


def test_provenance_reaches_the_shards(data: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        b"".join(row(t, repository_name="o/r", detected_licenses=["MIT", "ISC"]) + b"\n" for t in many()),
    )
    manifest = make(data, path, tmp_path / "shards")
    found = provenance_of(manifest)
    assert sorted(d.path for d in found) == sorted(f"a.jsonl#{n}" for n in range(1, 41))
    assert {(d.repository, d.licence) for d in found} == {("o/r", "MIT, ISC")}


# The text field


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["text", "code", "a b", "é", "source", "path", "max_stars_repo_name"])
def test_the_text_is_taken_from_the_field_that_is_named(kind: str, field: str, tmp_path: Path) -> None:
    rows = [
        {"content": "not this", field: "x\n", "license": "MIT"},
        {"content": "nor this", field: "y", "license": "0BSD"},
    ]
    reads = read_all(_table(tmp_path, kind, rows), text_field=field)
    assert texts_of(reads) == ["x\n", "y"]
    assert [read.licence for read in reads if isinstance(read, Document)] == ["MIT", "0BSD"]
    assert all(
        read.path.startswith("a.") and (read.repository, read.source) == ("", "")
        for read in reads
        if isinstance(read, Document)
    )


@pytest.mark.parametrize("field", ['a"b', "a\\b", "a\nb"])
def test_a_field_of_any_name_holds_the_text(field: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({field: "x"}).encode())
    assert texts_of(read_all(path, text_field=field)) == ["x"]


def test_the_text_field_of_a_build_is_honoured(data: Path, tmp_path: Path) -> None:
    texts = many()
    (tmp_path / "a.jsonl").write_bytes(b"".join(json.dumps({"code": t, "path": "p"}).encode() + b"\n" for t in texts))
    (tmp_path / "b.jsonl").write_bytes(b"".join(row(t, path="p") + b"\n" for t in texts))
    named = make(data, tmp_path / "a.jsonl", tmp_path / "named", text_field="code")
    usual = make(data, tmp_path / "b.jsonl", tmp_path / "usual")
    assert named.documents == usual.documents == {"read": 40, "written": 40, "empty": 0, "quarantined": 0}
    assert named.digest == usual.digest


# Finding input


def test_source_files_are_documents_of_their_directory(tmp_path: Path) -> None:
    root = tmp_path / "project"
    for name in (
        "b.py",
        "a/z.py",
        "a/b.py",
        "notes.txt",
        ".hidden.py",
        ".git/x.py",
        "__pycache__/x.py",
        "a/.venv/x.py",
    ):
        write(root / name, name.encode())
    (root / "link.py").symlink_to(root / "b.py")
    write(root / "empty.py", b"")
    write(root / "bom.py", BOM + b"x = 1\r\n")
    assert read_all(root, suffix=".py") == [
        Document(text, "project", path, "", "directory")
        for path, text in [
            ("a/b.py", "a/b.py"),
            ("a/z.py", "a/z.py"),
            ("b.py", "b.py"),
            ("bom.py", "x = 1\r\n"),  # as Python reads it
            ("empty.py", ""),
        ]
    ]


def test_source_files_become_shards(data: Path, tmp_path: Path) -> None:
    for n, text in enumerate(many()):
        write(tmp_path / "project" / f"d{n % 3}" / f"{n}.py", text.encode())
    write(tmp_path / "project" / "empty.py", b"")
    manifest = make(data, tmp_path / "project", tmp_path / "shards", suffix=".py")
    assert manifest.documents == {"read": 41, "written": 40, "empty": 1, "quarantined": 0}
    assert sorted(d.path for d in provenance_of(manifest)) == sorted(f"d{n % 3}/{n}.py" for n in range(40))
    assert verify_against_corpus(verify(tmp_path / "shards", deep=True)) == 40


def test_a_directory_of_data_files_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for n, name in enumerate(
        ("d/b.jsonl", "d/a.jsonl.gz", "d/c/a.parquet", "d/z.json.zst", "d/readme.md", "d/.a.jsonl")
    ):
        write(
            tmp_path / name,
            gzip.compress(row(f"{n}"))
            if name.endswith("gz")
            else zstandard.compress(row(f"{n}"))
            if name.endswith("zst")
            else parquet({"content": [f"{n}"]})
            if name.endswith("parquet")
            else row(f"{n}"),
        )
    assert [p.name for p in find_inputs([str(tmp_path / "d")])] == [
        "a.jsonl.gz",
        "b.jsonl",
        "c/a.parquet",
        "z.json.zst",
    ]
    assert texts_of(read_all(tmp_path / "d")) == ["1", "0", "2", "3"]


def test_a_glob_takes_what_it_matches_sorted(tmp_path: Path) -> None:
    for name in ("b-2.jsonl", "b-1.jsonl", "a-1.jsonl", "below/b-3.jsonl", "other.parquet"):
        write(tmp_path / name, row(name))
    assert texts_of(read_all(tmp_path / "b-*.jsonl")) == ["b-1.jsonl", "b-2.jsonl"]
    assert texts_of(read_all(tmp_path / "**" / "b-[23].jsonl")) == ["b-2.jsonl", "below/b-3.jsonl"]


def test_a_name_that_looks_like_a_glob_is_a_name_first(tmp_path: Path) -> None:
    write(tmp_path / "a[1].jsonl", row("named"))
    write(tmp_path / "a1.jsonl", row("matched"))
    assert texts_of(read_all(tmp_path / "a[1].jsonl")) == ["named"]


def test_arguments_keep_their_order(tmp_path: Path) -> None:
    for name in ("z.jsonl", "a.jsonl", "d/m.jsonl"):
        write(tmp_path / name, row(name))
    arguments = [tmp_path / "z.jsonl", tmp_path / "d", tmp_path / "a.jsonl"]
    assert texts_of(read_all(*arguments)) == ["z.jsonl", "d/m.jsonl", "a.jsonl"]


def test_a_url_of_a_local_file_gives_what_its_path_gives(tmp_path: Path) -> None:
    for n, name in enumerate(("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet")):
        content = next(content for key, content in CONTAINERS.values() if key[1:] == name[1:])
        write(tmp_path / "d" / name, content)
        assert texts_of(read_all(f"file://{tmp_path}/d/{name}")) == TEXTS
        assert len(read_all(f"file://{tmp_path}/d")) == len(TEXTS) * (n + 1)
    assert read_all(f"file://{tmp_path}/d/*.jsonl*") == read_all(tmp_path / "d" / "*.jsonl*")


def test_a_corpus_directory_is_read_by_its_manifest(data: Path, tmp_path: Path) -> None:
    pieces = find_inputs([str(data / "corpus")])
    entries = json.loads((data / "corpus" / MANIFEST).read_text())["files"]
    assert [(p.name, p.size, p.digest) for p in pieces] == [(e["name"], e["bytes"], e["xxh3_128"]) for e in entries]
    assert all(isinstance(read, Document) and read.text for read in read_all(data / "corpus"))


def test_a_foreign_manifest_in_a_data_directory_is_no_data(data: Path, tmp_path: Path) -> None:
    """Other software also has files named manifest.json, which contain no documents."""
    write(tmp_path / "d" / "a.jsonl", lines(many()))
    write_json(tmp_path / "d" / MANIFEST, {"entries": [{"url": "a.jsonl"}], "version": 1})
    assert texts_of(read_all(tmp_path / "d")) == many()
    manifest = make(data, tmp_path / "d", tmp_path / "shards")
    assert manifest.documents == {"read": 40, "written": 40, "empty": 0, "quarantined": 0}
    assert [source["name"] for source in manifest.sources] == ["a.jsonl"]


def test_shards_are_not_taken_for_a_corpus(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a manifest of 'shards'; expected 'corpus'"):
        make(data, data / "shards", tmp_path / "shards")


def test_a_corpus_manifest_without_its_files_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.jsonl", lines(many()))
    write_json(tmp_path / "d" / MANIFEST, {"format_version": 1, "kind": "corpus"})
    with pytest.raises(DataError, match=MANIFEST):
        make(data, tmp_path / "d", tmp_path / "shards")


@pytest.mark.parametrize(
    ("argument", "suffix", "message"),
    [
        ("absent.jsonl", None, r"absent\.jsonl: no such file or directory"),
        ("absent", None, r"absent: no such file or directory"),
        ("dangling.jsonl", None, r"dangling\.jsonl: no such file or directory"),
        ("a.txt/b.jsonl", None, r"a\.txt/b\.jsonl: "),
        ("a.txt", None, r"a\.txt: not a supported file type \(\.jsonl, .*--suffix"),
        ("empty", None, r"empty: contains no data files \(\.jsonl, "),
        ("sources", None, r"sources: contains no data files .*--suffix \.py"),
        ("sources", ".rs", r"sources: contains no files ending in \.rs"),
        ("*.jsonl.lz4", None, r"\*\.jsonl\.lz4: contains no data files"),
    ],
)
def test_input_that_leads_to_nothing_is_named_in_one_message(
    data: Path, tmp_path: Path, argument: str, suffix: str | None, message: str
) -> None:
    write(tmp_path / "a.txt", b"text")
    write(tmp_path / "sources" / "a.py", b"a = 1\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=message) as caught:
        make(data, tmp_path / argument, tmp_path / "shards", suffix=suffix)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "shards").exists()


def test_a_file_that_goes_after_planning_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines())
    (piece,) = find_inputs([str(path)])
    path.unlink()
    with pytest.raises(DataError, match=rf"{path}: cannot be read \(No such file"):
        list(read_documents(piece))


def test_the_same_file_named_twice_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "d" / "a.jsonl", lines(many()))
    for pair in ([path, path], [path.parent, path], [path, path.parent / "*.jsonl"], ["d/a.jsonl", "./d/a.jsonl"]):
        with pytest.raises(DataError, match=r"a\.jsonl: named twice among the inputs"):
            make(data, pair, tmp_path / "shards")


@pytest.mark.parametrize("other", ["d/a.jsonl", "d/../d/a.jsonl", "file://{root}/d/a.jsonl", "link.jsonl"])
def test_the_same_file_under_two_names_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "d" / "a.jsonl", lines(many()))
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(DataError, match=r"(a|link)\.jsonl: named twice among the inputs"):
        make(data, [path, other.format(root=tmp_path)], tmp_path / "shards")


def test_a_hub_dataset_of_several_parts_is_read_part_by_part(tmp_path: Path) -> None:
    """A local directory that `datasets` can load, in place of the Hub."""
    for n in range(3):
        write(tmp_path / "set" / f"train-{n}.jsonl", lines(many(5, 5 * n)))
    assert sorted(texts_of(read_all(f"hub:{tmp_path / 'set'}"))) == sorted(many(15))


# Planning


def _cuts(size: int, cuts: Iterable[int]) -> list[tuple[int, int]]:
    return list(pairwise([0, *sorted(cuts), size]))


def _in_pieces(piece: Piece, bounds: Iterable[tuple[int, int]]) -> list[Read]:
    return [
        read
        for start, stop in bounds
        for read in read_documents(msgspec.structs.replace(piece, start=start, stop=stop))
    ]


def _content(reads: Iterable[Read]) -> list[tuple[str, str]]:
    """The part of the result that does not depend on the pieces: texts, and reasons for rejection."""
    return [("text", r.text) if isinstance(r, Document) else ("bad", r.reason) for r in reads]


def _places(reads: Iterable[Read]) -> list[int]:
    """Start offsets of the lines in bytes, from the documents of split files."""
    return [
        int(r.path.partition("@")[2])
        if isinstance(r, Document)
        else int(r.where.partition(" at byte ")[2].replace(",", ""))
        for r in reads
    ]


def test_a_cut_at_any_byte_loses_and_doubles_no_line(tmp_path: Path) -> None:
    content = b"\n" + row("é") + b"\n\n\n" + row("🦜\n") + b"\r\nbad\n" + row("") + b"\n \n" + row("end")
    path = write(tmp_path / "a.jsonl", content)
    (piece,) = find_inputs([str(path)])
    whole = _content(read_documents(piece))
    assert [kind for kind, _ in whole] == ["text", "text", "bad", "text", "text"]
    for first in range(len(content) + 1):
        assert _content(_in_pieces(piece, _cuts(len(content), [first]))) == whole, first
        for second in range(first, len(content) + 1, 3):
            assert _content(_in_pieces(piece, _cuts(len(content), [first, second]))) == whole, (first, second)
    assert _content(_in_pieces(piece, _cuts(len(content), range(len(content))))) == whole  # one byte each


LINES = st.one_of(
    st.just(b""),
    st.sampled_from([b" ", b"\r", b"bad", b"{}", b'{"content": 1}', b"\xff", b'"\xc3']),
    st.text(max_size=6).map(row),
    st.text('é中🦜\u2028\n\r"\\', max_size=20).map(row),
    st.integers(0, 200).map(lambda n: row("x" * n)),
)


@settings(deadline=None, max_examples=300)
@given(
    rows=st.lists(LINES, max_size=12),
    last=st.booleans(),
    cuts=st.lists(st.integers(0, 1000), max_size=8),
    block=st.sampled_from([1, 2, 7, 64, 1 << 18]),
)
def test_the_pieces_of_a_split_file_hold_each_of_its_lines_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], last: bool, cuts: list[int], block: int
) -> None:
    content = b"\n".join(rows) + (b"\n" if last else b"")
    path = write(tmp_path_factory.getbasetemp() / "split.jsonl", content)
    (piece,) = find_inputs([str(path)])
    whole = _content(read_documents(piece))
    with pytest.MonkeyPatch.context() as patch:
        limit(patch, block=block)
        for bounds in (
            _cuts(len(content), (cut % (len(content) + 1) for cut in cuts)),
            _cuts(len(content), (i for i, byte in enumerate(content) if byte == 0x0A)),  # at each newline
            _cuts(len(content), (i + 1 for i, byte in enumerate(content) if byte == 0x0A)),  # at each line's start
        ):
            pieces = _in_pieces(piece, bounds)
            assert _content(pieces) == whole
            if bounds != [(0, len(content))] or not piece.whole:
                starts = [0, *(i + 1 for i, byte in enumerate(content) if byte == 0x0A)]
                assert set(_places(pieces)) <= set(starts)
                assert _places(pieces) == sorted(set(_places(pieces)))


@settings(deadline=None, max_examples=150)
@given(rows=st.lists(LINES, max_size=12), task_bytes=st.floats(0.5, 500))
def test_the_tasks_that_a_file_is_dealt_to_hold_it_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], task_bytes: float
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "dealt.jsonl", b"\n".join(rows))
    pieces = find_inputs([str(path)])
    dealt = [piece for task in deal(pieces, task_bytes) for piece in task]
    assert dealt == [piece for task in deal(pieces, task_bytes) for piece in task]
    assert _content(read for piece in dealt for read in read_documents(piece)) == _content(read_documents(pieces[0]))
    if pieces[0].size > task_bytes:
        assert len(dealt) == -(-pieces[0].size // task_bytes)
        assert [p.start for p in dealt[1:]] == [p.stop for p in dealt[:-1]]


@settings(deadline=None, max_examples=60)
@given(groups=st.lists(st.integers(0, 5), max_size=8), task_bytes=st.floats(1, 3000))
def test_the_pieces_of_a_parquet_file_hold_each_of_its_rows_once(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], task_bytes: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "split.parquet"
    schema = pa.schema([("content", pa.string())])
    number = 0
    with pq.ParquetWriter(path, schema) as writer:
        for rows in groups:
            writer.write_table(pa.table({"content": [f"é{n}" for n in range(number, number + rows)]}, schema))
            number += rows
    pieces = find_inputs([str(path)])
    whole = [Document(f"é{n}", "", f"split.parquet#{n + 1}", "", "") for n in range(number)]
    assert list(read_documents(pieces[0])) == whole
    dealt = [piece for task in deal(pieces, task_bytes) for piece in task]
    assert [read for piece in dealt for read in read_documents(piece)] == whole
    assert len(dealt) <= max(1, len(groups))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 400), max_size=20), task_bytes=st.floats(10, 500))
def test_tasks_keep_the_order_of_the_files_and_are_not_overfull(sizes: list[int], task_bytes: float) -> None:
    pieces = [Piece(f"{n}.jsonl.gz", f"{n}", "jsonl", size) for n, size in enumerate(sizes)]
    tasks = deal(pieces, task_bytes)
    assert [piece for task in tasks for piece in task] == pieces  # gzip cannot be split
    assert all(tasks)
    for task in tasks:
        assert len(task) == 1 or sum(3.9 * piece.size for piece in task) <= task_bytes + 1e-6
    for one, after in pairwise(tasks):
        assert sum(3.9 * piece.size for piece in [*one, after[0]]) > task_bytes  # no task because of a timeout


def test_a_split_file_is_built_to_the_same_tokens_and_leads_back_to_its_bytes(data: Path, tmp_path: Path) -> None:
    content = BOM + lines(many(60), b"\r\n") + row("the last", path="")
    path = write(tmp_path / "a.jsonl", content.replace(b', "path"', b', "other"'))
    split = make(data, path, tmp_path / "split", shard_tokens=100)
    assert len(split.split("train")) > 5
    assert split.documents == {"read": 61, "written": 61, "empty": 0, "quarantined": 0}
    assert verify_against_corpus(verify(tmp_path / "split", deep=True)) == 61
    stored = path.read_bytes()
    for document in provenance_of(split):
        name, _, place = document.path.partition("@")
        assert name == "a.jsonl"
        assert stored[int(place) :].removeprefix(BOM).startswith(b'{"content"')
    whole = make(data, path, tmp_path / "whole", shard_tokens=1_000_000)
    assert {s: split.tokens(s) for s in ("train", "valid")} == {s: whole.tokens(s) for s in ("train", "valid")}


# Bad input


@dataclass(frozen=True)
class Bad:
    """A file with something bad in it.

    Attributes:
        name: file name.
        content: file content.
        where: location of the error, appended to the file's path.
        reason: pattern of the message.
        good: number of its documents that can still be read.
        suffix: --suffix of the build.
        documents: number of documents that it stands for.
    """

    name: str
    content: Callable[[], bytes] | bytes
    where: str
    reason: str
    good: int | None = None  # None: not specified, as for damaged compression
    suffix: str | None = None
    documents: int = 1

    def make(self, root: Path) -> Path:
        return write(root / self.name, self.content if isinstance(self.content, bytes) else self.content())


def _second(line: bytes) -> bytes:
    return row("first") + b"\n" + line + b"\n" + row("third") + b"\n"


def _bulk() -> bytes:
    """Text that does not compress into one block."""
    return b"".join(row(os.urandom(600).hex()) + b"\n" for _ in range(500))


def _flip(data: bytes, at: int, bits: int = 0xFF) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


def _damaged_page() -> bytes:
    texts = [os.urandom(600).hex() for _ in range(200)]
    whole = parquet({"content": texts}, row_group_size=50, compression="zstd", use_dictionary=False)
    middle = len(whole) // 2
    return whole[:middle] + bytes(200) + whole[middle + 200 :]


def _parquet_with_bad_utf8() -> bytes:
    column = pa.array([b"good", b"caf\xe9", b"good too"], pa.binary())
    return parquet({"content": pa.Array.from_buffers(pa.string(), 3, column.buffers())})


LONE = b'{"content": "a\\ud800b"}'
BAD: dict[str, Bad] = {
    "bad UTF-8": Bad("a.jsonl", _second(b'{"content": "caf\xe9"}'), ":2", "not valid JSON in UTF-8 .*0xe9", 2),
    "bad UTF-8 in provenance": Bad("a.jsonl", _second(b'{"content": "x", "path": "\xe9"}'), ":2", "UTF-8 .*0xe9", 2),
    "a character cut in two": Bad("a.jsonl", _second(row("é")[:-3]), ":2", "not valid JSON in UTF-8", 2),
    "bad JSON": Bad("a.jsonl", _second(b'{"content": "x"'), ":2", "not valid JSON in UTF-8 .*delimiter", 2),
    "two rows in a line": Bad("a.jsonl", _second(row("x") + row("y")), ":2", "not valid JSON .*Extra data", 2),
    "zeros": Bad("a.jsonl", _second(bytes(100)), ":2", "not valid JSON", 2),
    "a control character": Bad("a.jsonl", _second(b'{"content": "a\tb"}'), ":2", "control character", 2),
    "cut in the last line": Bad("a.jsonl", lines()[:-9], f":{len(TEXTS)}", "not valid JSON", len(TEXTS) - 1),
    "a list": Bad("a.jsonl", _second(b'["content"]'), ":2", "a JSON list, not an object", 2),
    "missing field": Bad(
        "a.jsonl", _second(b'{"text": "x", "n": 1}'), ":2", "no field 'content'.*'text'.*--text-field", 2
    ),
    "no fields": Bad("a.jsonl", _second(b"{}"), ":2", "no field 'content'.*--text-field", 2),
    "wrong type": Bad("a.jsonl", _second(b'{"content": ["x"]}'), ":2", "field 'content' has type list, not text", 2),
    "null": Bad("a.jsonl", _second(b'{"content": null}'), ":2", "field 'content' has type NoneType, not text", 2),
    "lone surrogate": Bad("a.jsonl", _second(LONE), ":2", "a lone surrogate", 2),
    "lone surrogate in bytes": Bad(
        "a.jsonl", _second(b'{"content": "\xed\xa0\x80"}'), ":2", "surrogate|not valid JSON", 2
    ),
    "lone surrogate in provenance": Bad(
        "a.jsonl", _second(b'{"content": "x", "repo_name": "\\udfff"}'), ":2", "a lone surrogate", 2
    ),
    "lone surrogate in a licence": Bad(
        "a.jsonl", _second(b'{"content": "x", "licenses": ["MIT", "\\ud800"]}'), ":2", "a lone surrogate", 2
    ),
    "lone surrogate in a field's name": Bad("a.jsonl", _second(b'{"\\ud800": "x"}'), ":2", "no field 'content'", 2),
    "deep nesting": Bad("a.jsonl", _second(b"[" * 100_000), ":2", "nested too deeply|not valid JSON", 2),
    "deep nesting of another field": Bad(
        "a.jsonl",
        _second(b'{"content": "x", "o": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ":2",
        "nested too deeply",
        2,
    ),
    "a number of 6,000 digits": Bad(
        "a.jsonl", _second(b'{"content": "x", "path": ' + b"9" * 6000 + b"}"), ":2", "digits", 2
    ),
    "bad JSON in gzip": Bad("a.jsonl.gz", gzip.compress(_second(b"{")), ":2", "not valid JSON", 2),
    "bad JSON in zstandard": Bad("a.jsonl.zst", zstandard.compress(_second(b"{")), ":2", "not valid JSON", 2),
    "gzip cut in the middle": Bad(
        "a.jsonl.gz", lambda: gzip.compress(_bulk())[:-200_000], "", "damaged gzip data after line .*copy it again"
    ),
    "gzip cut at its first byte": Bad("a.jsonl.gz", gzip.compress(lines())[:1], "", "damaged gzip data", 0),
    "gzip cut at its last byte": Bad("a.jsonl.gz", gzip.compress(lines())[:-1], "", "damaged gzip data"),
    "gzip, second member cut": Bad(
        "a.jsonl.gz", gzip.compress(lines()) + gzip.compress(lines())[:-5], "", "damaged gzip data"
    ),
    "gzip with garbage behind": Bad(
        "a.jsonl.gz", gzip.compress(lines()) + b"garbage", "", "7 bytes after the end of the gzip", len(TEXTS)
    ),
    "gzip with another checksum": Bad("a.jsonl.gz", _flip(gzip.compress(lines()), -6), "", "damaged gzip data"),
    "gzip with a damaged block": Bad(
        "a.jsonl.gz", lambda: _flip(gzip.compress(lines(), mtime=0), 10), "", "damaged gzip data"
    ),
    "no gzip at all": Bad("a.jsonl.gz", lines(), "", "not gzip, which its name promises, but text", 0),
    "zstandard cut in the middle": Bad(
        "a.jsonl.zst",
        lambda: zstandard.compress(_bulk())[:-200_000],
        "",
        "damaged zstandard data after line .*copy it again",
    ),
    "zstandard cut at its first byte": Bad(
        "a.jsonl.zst", zstandard.compress(lines())[:1], "", "damaged zstandard data", 0
    ),
    "zstandard cut at its last byte": Bad(
        "a.jsonl.zst", zstandard.compress(lines())[:-1], "", "damaged zstandard data"
    ),
    "zstandard, second frame cut": Bad(
        "a.jsonl.zst", zstandard.compress(lines()) + zstandard.compress(lines())[:-5], "", "damaged zstandard data"
    ),
    "zstandard with garbage behind": Bad(
        "a.jsonl.zst", zstandard.compress(lines()) + b"garbage", "", "7 bytes after the end of the zst", len(TEXTS)
    ),
    "zstandard with another checksum": Bad(
        "a.jsonl.zst",
        _flip(zstandard.ZstdCompressor(write_checksum=True).compress(lines()), -1),
        "",
        "damaged zstandard data",
    ),
    "no zstandard at all": Bad("a.jsonl.zst", lines(), "", "not zstandard, which its name promises, but text", 0),
    "null in parquet": Bad(
        "a.parquet", parquet({"content": ["x", None, "z"]}), " row 2", "has type NoneType, not text", 2
    ),
    "bad UTF-8 in parquet": Bad("a.parquet", _parquet_with_bad_utf8, " row 2", "not UTF-8", 2),
    "a source file in Latin-1": Bad("p/a.py", b"# caf\xe9\n", "", r"not UTF-8 \(byte 5", 0, ".py"),
}
# Damage that makes a valid parquet file unreadable.
BAD_PARQUET: dict[str, Bad] = {
    "parquet cut in the middle": Bad("a.parquet", parquet({"content": many()})[:-300], "", "damaged parquet", 0),
    "parquet of no bytes": Bad("a.parquet", b"", "", "damaged parquet", 0),
    "no parquet at all": Bad("a.parquet", lines(), "", "damaged parquet", 0),
    "a damaged page in parquet": Bad(
        "a.parquet", _damaged_page, " rows 101 to 150", "damaged parquet", 150, documents=50
    ),
    "a damaged column name in parquet": Bad(
        "a.parquet",
        lambda: parquet({"content": many(), "more": many()}, store_schema=False).replace(b"more", b"mor\xff"),
        "",
        "damaged parquet",
    ),
    "missing column": Bad(
        "a.parquet",
        parquet({"text": many()}),
        "",
        r"no column 'content' \(its columns: 'text'; select one with --text-field",
        0,
        documents=40,
    ),
    "a column of bytes": Bad("a.parquet", parquet({"content": [b"x"]}), " row 1", "has type bytes, not text", 0),
}


def _inputs(bad: Bad, tmp_path: Path) -> tuple[list[Path], Path, int]:
    """Good input plus the bad file, and the number of good documents."""
    path = bad.make(tmp_path)
    good = tmp_path / "good" if bad.suffix else tmp_path / "good.jsonl"
    if bad.suffix:
        for n, text in enumerate(many()):
            write(good / f"{n}{bad.suffix}", text.encode())
    else:
        write(good, lines(many()))
    return [good, path.parent if bad.suffix else path], path, 40


@pytest.mark.parametrize("case", [*BAD, *BAD_PARQUET])
def test_a_bad_document_ends_the_build_with_its_place_and_the_reason(case: str, data: Path, tmp_path: Path) -> None:
    bad = (BAD | BAD_PARQUET)[case]
    inputs, path, _ = _inputs(bad, tmp_path)
    with pytest.raises(DataError, match=bad.reason) as caught:
        make(data, inputs, tmp_path / "shards", suffix=bad.suffix)
    message = str(caught.value)
    assert message.startswith(f"{path}{bad.where}: ")
    assert "\n" not in message and len(message) < 1000
    assert not (tmp_path / "shards" / MANIFEST).exists()


def _is_counted_and_listed(bad: Bad, data: Path, tmp_path: Path) -> None:
    inputs, path, good = _inputs(bad, tmp_path)
    manifest = make(data, inputs, tmp_path / "shards", suffix=bad.suffix, on_bad_document="skip")
    (listed,) = quarantine_of(tmp_path / "shards")
    assert listed["where"] == f"{path}{bad.where}"
    assert listed.keys() == {"where", "reason", *(["documents"] if bad.documents > 1 else [])}
    assert listed.get("documents", 1) == bad.documents
    counts = manifest.documents
    assert counts["quarantined"] == bad.documents
    assert counts["read"] == counts["written"] + counts["quarantined"] + counts["empty"]
    assert counts["written"] == good + bad.good if bad.good is not None else counts["written"] >= good
    verify(tmp_path / "shards", deep=True)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_document_is_counted_and_listed_when_it_is_skipped(case: str, data: Path, tmp_path: Path) -> None:
    _is_counted_and_listed(BAD[case], data, tmp_path)


@pytest.mark.parametrize("case", BAD_PARQUET)
def test_bad_parquet_is_counted_and_listed_when_it_is_skipped(case: str, data: Path, tmp_path: Path) -> None:
    _is_counted_and_listed(BAD_PARQUET[case], data, tmp_path)


@pytest.mark.parametrize("length", [99, 100, 101, 500])
@pytest.mark.parametrize("block", [1, 30, 90])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_may_be_as_long_as_a_document_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int, length: int
) -> None:
    limit(monkeypatch, document_bytes=100)
    limit(monkeypatch, block=block)
    long = row("x" * (length - len(row(""))))
    assert len(long) == length
    content = row("before") + b"\n" + long + b"\n" + row("after") + b"\n" + long
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    path = write(tmp_path / name, compress(content))
    reads = read_all(path)
    if length <= 100:
        assert texts_of(reads) == ["before", json.loads(long)["content"], "after", json.loads(long)["content"]]
    else:
        assert [read.path if isinstance(read, Document) else read.where for read in reads] == [
            f"{name}#1",
            f"{path}:2",
            f"{name}#3",
            f"{path}:4",
        ]
        reasons = [read.reason for read in reads if isinstance(read, BadDocument)]
        assert all(
            reason.startswith(f"a line of {length} bytes; the limit for one document is 100") for reason in reasons
        )


@pytest.mark.parametrize("on_bad_document", ["fail", "skip"])
def test_too_long_a_line_is_named_by_a_build(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_bad_document: str
) -> None:
    limit(monkeypatch, document_bytes=2_000)
    limit(monkeypatch, block=512)
    start = lines(many())
    long = row("x" * 3_000)
    path = write(tmp_path / "a.jsonl", start + long + b"\n" + row("last"))
    if on_bad_document == "fail":
        with pytest.raises(
            DataError,
            match=rf"{path}:41: not a document: a line of {len(long):,} bytes; the limit for one document is 2,000",
        ):
            make(data, path, tmp_path / "shards")
        return
    manifest = make(data, path, tmp_path / "shards", on_bad_document="skip", shard_tokens=100)
    assert manifest.documents == {"read": 42, "written": 41, "empty": 0, "quarantined": 1}
    (listed,) = quarantine_of(tmp_path / "shards")
    assert listed["where"] == f"{path} at byte {len(start):,}"


def test_too_large_a_source_file_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, document_bytes=100)
    path = write(tmp_path / "p" / "a.py", b"x" * 101)
    write(tmp_path / "p" / "b.py", b"x" * 100)
    assert read_all(tmp_path / "p", suffix=".py") == [
        BadDocument(str(path), "101 bytes; the limit for one document is 100"),
        Document("x" * 100, "p", "b.py", "", "directory"),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_of_100_megabytes_is_refused_without_being_held(tmp_path: Path, name: str) -> None:
    content = row("before") + b"\n" + row("x" * 100_000_000) + b"\n" + row("after")
    compress = {".gz": lambda b: gzip.compress(b, 1), ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    path = write(tmp_path / name, compress(content))
    del content
    tracemalloc.start()
    try:
        before, bad, after = read_all(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert texts_of([before, after]) == ["before", "after"]
    assert isinstance(bad, BadDocument)
    assert bad.where == f"{path}:2"
    assert bad.reason.startswith("a line of 100,000,015 bytes; the limit for one document is 32,000,000")
    assert peak < 40_000_000  # what a document may have, and some blocks


def test_a_piece_that_starts_in_a_line_of_100_megabytes_does_not_hold_it(tmp_path: Path) -> None:
    content = row("x" * 100_000_000) + b"\n" + row("after")
    path = write(tmp_path / "a.jsonl", content)
    (piece,) = find_inputs([str(path)])
    tracemalloc.start()
    try:
        reads = list(read_documents(msgspec.structs.replace(piece, start=1_000, stop=len(content))))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert texts_of(reads) == ["after"]
    assert peak < 2_000_000


def test_nesting_of_any_depth_is_read_or_named(tmp_path: Path) -> None:
    """The nesting limit depends on the interpreter; that exceeding it is reported is our responsibility."""
    for field in (b"path", b"other", b"content"):
        depths = b"".join(b'{"content":"x","%s":%s%s}\n' % (field, b"[" * n, b"]" * n) for n in range(1, 1100))
        reads = read_all(write(tmp_path / "a.jsonl", depths))
        assert len(reads) == 1099
        assert all(isinstance(read, BadDocument) or read.text == "x" for read in reads)


@settings(deadline=None, max_examples=300)
@given(line=st.binary(max_size=40))
def test_any_bytes_are_blank_or_a_document_or_named(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", line)
    lines = [part for part in line.split(b"\n") if part.strip()]
    if json_lines.is_json_values(line):  # over several lines
        assert len(read_all(path)) <= len(lines)
    else:
        assert len(read_all(path)) == len(lines)


COMPRESSED = {
    "a.jsonl.gz": gzip.compress(lines(), mtime=0),
    "a.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(lines()),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_no_cut_of_a_compressed_file_passes_unnoticed(name: str, tmp_path: Path) -> None:
    whole = COMPRESSED[name]
    for cut in range(1, len(whole)):
        path = write(tmp_path / name, whole[:cut])
        reads = read_all(path)
        assert any(isinstance(read, BadDocument) and str(path) in read.where for read in reads), (
            f"{cut} of {len(whole)}"
        )


@pytest.mark.parametrize("name", COMPRESSED)
def test_no_flipped_byte_of_a_compressed_file_passes_unnoticed(name: str, tmp_path: Path) -> None:
    whole = COMPRESSED[name]
    right = [Document(text, "", f"p{n}", "", "") for n, text in enumerate(TEXTS)]
    for at in range(len(whole)):
        path = write(tmp_path / name, _flip(whole, at))
        reads = read_all(path)
        assert reads == right or any(isinstance(read, BadDocument) for read in reads), f"byte {at} of {len(whole)}"


@pytest.fixture(scope="module")
def damaged_parquet(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], int | Exception]:
    """Rows read of 12, or the exception raised, for each byte of a parquet file changed in three ways."""
    whole = parquet(
        {"content": [f"text {n}" for n in range(12)], "path": [f"p{n}" for n in range(12)]},
        row_group_size=4,
        store_schema=False,
    )
    path = tmp_path_factory.mktemp("damaged") / "a.parquet"
    outcomes: dict[tuple[int, int], int | Exception] = {}
    for at in range(len(whole)):
        for bits in (0x01, 0x80, 0xFF):
            path.write_bytes(_flip(whole, at, bits))
            try:
                outcomes[at, bits] = sum(1 for read in read_all(path) if require_document(read))
            except Exception as error:  # the tests define which exceptions are allowed
                outcomes[at, bits] = error
    return outcomes


def test_damaged_parquet_is_refused_in_words_for_its_user(
    damaged_parquet: dict[tuple[int, int], int | Exception],
) -> None:
    errors = [outcome for outcome in damaged_parquet.values() if isinstance(outcome, Exception)]
    assert len(errors) > 100
    assert {type(error) for error in errors} == {DataError}
    assert all("/a.parquet" in str(error) for error in errors)


def test_damaged_parquet_loses_no_row_without_a_word(
    damaged_parquet: dict[tuple[int, int], int | Exception],
) -> None:
    """The format has no digest of a text, so a letter may change, but the footer gives the number of rows."""
    counts = {place: outcome for place, outcome in damaged_parquet.items() if isinstance(outcome, int)}
    assert len(counts) > 100
    assert {place: count for place, count in counts.items() if count != 12} == {}


# Skipping bad documents


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A directory with many kinds of good and bad files, 200 good documents."""
    root = tmp_path / "mixed"
    write(root / "a.jsonl", lines(many(60)) + b"bad\n" + LONE + b"\n" + row("") + b"\n" + lines(many(40, 100)))
    write(root / "b.jsonl.gz", gzip.compress(lines(many(30, 200)) + b'{"content": 7}\n'))
    write(root / "c.jsonl.gz", gzip.compress(lines(many(30, 900)))[:-30])
    write(root / "d.jsonl.zst", zstandard.compress(b"[]\n" + lines(many(40, 300))))
    write(root / "e.parquet", parquet({"content": [*many(15, 400), None, *many(15, 500)]}, row_group_size=10))
    return root


def test_the_bytes_do_not_depend_on_workers_when_bad_documents_are_skipped(
    data: Path, mixed: Path, tmp_path: Path
) -> None:
    for workers in (1, 2):
        make(data, mixed, tmp_path / f"of-{workers}", on_bad_document="skip", shard_tokens=150, workers=workers)
    assert files_of(tmp_path / "of-1") == files_of(tmp_path / "of-2")
    manifest = verify(tmp_path / "of-1", deep=True)
    assert len(manifest.shards) > 10
    held = zlib.decompressobj(31).decompress((mixed / "c.jsonl.gz").read_bytes()).count(b"\n")  # whole lines
    assert 0 < held < 30
    assert manifest.documents == {"read": 207 + held, "written": 200 + held, "empty": 1, "quarantined": 6}
    at = len(lines(many(60)))
    assert [listed["where"].removeprefix(f"{mixed}/") for listed in quarantine_of(tmp_path / "of-1")] == [
        f"a.jsonl at byte {at:,}",
        f"a.jsonl at byte {at + 4:,}",
        "b.jsonl.gz:31",
        "c.jsonl.gz",
        "d.jsonl.zst:1",
        "e.parquet row 16",
    ]


def test_slices_list_what_one_build_lists(data: Path, mixed: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "on_bad_document": "skip",
        "shard_tokens": 150,
        "valid_fraction": VALID_FRACTION,
        "workers": 1,
    }
    build(mixed, data / "tokenizer", tmp_path / "one", BuildOptions(**how))
    for index in (2, 0, 1):
        build(mixed, data / "tokenizer", tmp_path / "sliced", BuildOptions(part=Slice(index, 3), **how))
    assert files_of(tmp_path / "sliced") == files_of(tmp_path / "one")


def test_what_an_earlier_build_listed_is_not_left_beside_shards_without_it(data: Path, tmp_path: Path) -> None:
    """Killed after writing the quarantine list and before the manifest, with the input fixed since."""
    path = write(tmp_path / "a.jsonl", lines(many()) + b"bad\n")
    make(data, path, tmp_path / "shards", on_bad_document="skip")
    assert len(quarantine_of(tmp_path / "shards")) == 1
    (tmp_path / "shards" / MANIFEST).unlink()
    path.write_bytes(lines(many()))
    manifest = make(data, path, tmp_path / "shards", on_bad_document="skip")
    assert manifest.documents["quarantined"] == 0
    assert not (tmp_path / "shards" / QUARANTINE).exists()


def test_without_skipped_documents_there_is_no_list(data: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([*many(), ""]))
    failing = make(data, path, tmp_path / "fail")
    skipping = make(data, path, tmp_path / "skip", on_bad_document="skip")
    assert failing.documents == skipping.documents == {"read": 41, "written": 40, "empty": 1, "quarantined": 0}
    assert failing.digest == skipping.digest
    assert not (tmp_path / "skip" / QUARANTINE).exists()


@pytest.mark.parametrize("on_bad_document", ["fail", "skip"])
@pytest.mark.parametrize("content", [b"", b"\n\n", row(""), b"bad"])
def test_input_without_a_document_is_named(data: Path, tmp_path: Path, content: bytes, on_bad_document: str) -> None:
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(DataError, match=str(path)) as caught:
        make(data, path, tmp_path / "shards", on_bad_document=on_bad_document)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "shards" / MANIFEST).exists()


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.jsonl.gz", "empty.jsonl.zst"])
def test_an_empty_file_among_others_changes_no_token(data: Path, tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.jsonl", lines(many()))
    alone = make(data, path, tmp_path / "alone")
    with_empty = make(data, [write(tmp_path / name, b""), path], tmp_path / "with-empty")
    assert with_empty.documents == alone.documents
    assert with_empty.digest == alone.digest


def _file_with_a_name_that_is_not_utf8(directory: Path, suffix: bytes, content: bytes) -> Path:
    return write(Path(os.fsdecode(os.fsencode(directory) + b"/caf\xe9" + suffix)), content)


def test_a_source_file_whose_name_is_not_utf8_is_refused_or_listed(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    for n, text in enumerate(many()):
        write(root / f"{n}.py", text.encode())
    _file_with_a_name_that_is_not_utf8(root, b".py", b"x = 1\n")
    with pytest.raises(DataError, match="caf"):
        make(data, root, tmp_path / "fail", suffix=".py")
    manifest = make(data, root, tmp_path / "skip", suffix=".py", on_bad_document="skip")
    assert manifest.documents == {"read": 41, "written": 40, "empty": 0, "quarantined": 1}
    (listed,) = quarantine_of(tmp_path / "skip")
    assert "caf" in listed["where"]


def test_a_data_file_whose_name_is_not_utf8_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    path = _file_with_a_name_that_is_not_utf8(tmp_path, b".jsonl", lines(many()))
    with pytest.raises(DataError, match="caf"):
        make(data, path, tmp_path / "shards")


def test_a_line_holds_one_object_whatever_stands_around_it(data: Path, tmp_path: Path) -> None:
    two = b'{"content": "a"}{"content": "b"}\n'
    spread = b'{"content":\n"c"}\n'
    for bad in (two, spread, two + spread):
        path = write(tmp_path / "a.jsonl", lines(many(3)) + bad + lines(many(3, 50)))
        kinds = [type(read).__name__ for read in read_all(path)]
        assert kinds.count("Document") == 6
        assert kinds.count("BadDocument") == bad.count(b"\n")


def test_a_too_long_line_at_a_border_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, document_bytes=200)
    start = lines(many(3))
    path = write(tmp_path / "a.jsonl", start + b'{"content": "' + b"x" * 500 + b'"}\n' + lines(many(2, 50)))
    whole = find_inputs([str(path)])[0]
    found = []
    for first, stop in ((0, len(start)), (len(start), whole.size)):
        found += list(read_documents(msgspec.structs.replace(whole, start=first, stop=stop)))
    assert [type(read).__name__ for read in found] == ["Document"] * 3 + ["BadDocument"] + ["Document"] * 2


def test_an_input_that_cannot_be_read_does_not_condemn_the_encoder(data: Path, tmp_path: Path) -> None:
    def sample() -> Iterator[str]:
        yield "x = 1"
        raise DataError("the disk is gone")

    referee = Encoder(data / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        patch.setattr(proving, "code_points", lambda: iter(["a"]))
        patch.setattr(proving, "hard_cases", lambda _: iter(["a"]))
        with pytest.raises(DataError, match="the disk is gone"):
            proving.choose_encoder(data / "tokenizer", referee, "auto", sample())
        assert proving.known_outcome(referee) is None


def test_shards_of_an_unfinished_build_that_was_dealt_otherwise_are_removed(data: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(many(200)) + b"bad\n")
    with pytest.raises(DataError):
        make(data, path, tmp_path / "shards", shard_tokens=300)
    assert list((tmp_path / "shards").glob("train-*.bin"))
    write(path, lines(many(200)))
    manifest = make(data, path, tmp_path / "shards", shard_tokens=100_000)
    assert len(list((tmp_path / "shards").glob("*.bin"))) == len(manifest.shards)
