"""The file formats of documents: which names are read, and what the first bytes of a file say it is."""

from pathlib import PurePosixPath
from typing import NamedTuple

_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv"}
_WHOLE = {".parquet": "parquet", ".zip": "zip"}  # compressed inside, so never compressed again
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstandard", ".zstd": "zstandard"}
SUPPORTED = f"{', '.join(_KINDS)}, each also with {', '.join(_COMPRESSIONS)}; {', '.join(_WHOLE)}"
# Bytes of text per byte of file, used only for planning. Measured on Python source.
_EXPANSION = {"gzip": 3.9, "bzip2": 4.7, "xz": 4.9, "zstandard": 4.2, "parquet": 3.0}
# First bytes -> what they start. The byte-order marks of UTF-32 begin with that of UTF-16, or with zeros.
_STARTS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"PAR1": "parquet",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
    b"\xff\xfe": "text in UTF-16 or UTF-32",
    b"\xfe\xff": "text in UTF-16",
    b"\x00\x00\xfe\xff": "text in UTF-32",
    b"version https://git-lfs.github.com/": "a pointer to a file that `git lfs pull` downloads",
    b"<!DOCTYPE": "an HTML page",
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
    b"<?xml": "an XML file",
}
_TAR_MAGIC, _TAR_OFFSET = b"ustar", 257
SNIFFED_BYTES = 512
_MEND = {"text in UTF-16": "convert it to UTF-8", "text in UTF-16 or UTF-32": "convert it to UTF-8"}


class Format(NamedTuple):
    """What a file's name says about its content.

    Attributes:
        kind: "jsonl", "csv", "parquet" or "zip".
        compression: "gzip", "bzip2", "xz", "zstandard", or "" for none.
    """

    kind: str
    compression: str


def format_of(name: str) -> Format | None:
    """The format of a data file according to its suffixes, in any case; None if it is not read."""
    path = PurePosixPath(name.lower())
    if kind := _WHOLE.get(path.suffix):
        return Format(kind, "")
    compression = _COMPRESSIONS.get(path.suffix, "")
    kind = _KINDS.get(path.with_suffix("").suffix if compression else path.suffix)
    return Format(kind, compression) if kind else None


def compression_of(name: str) -> str:
    """The compression that the last suffix of a name stands for, or ""."""
    return _COMPRESSIONS.get(PurePosixPath(name).suffix.lower(), "")


def expansion(name: str) -> float:
    """Estimated bytes of text per byte of a file of this name."""
    return _EXPANSION.get(compression_of(name) or PurePosixPath(name).suffix.lower().removeprefix("."), 1.0)


def content_of(head: bytes) -> str | None:
    """What a file is, from its first `SNIFFED_BYTES`; None for UTF-8 text and for anything unknown."""
    if head[_TAR_OFFSET:].startswith(_TAR_MAGIC):
        return "a tar archive"
    return next((what for start, what in _STARTS.items() if head.startswith(start)), None)


def misnamed(head: bytes, expected: str) -> str:
    """The reason why a file that starts with `head` is not read as `expected`."""
    found = content_of(head)
    if found is None:
        shown = "text" if _is_text(head) else f"unknown data that starts with {head[:8]!r}"
        return f"not {expected}, which its name promises, but {shown}. Correct its name, or copy it again"
    return f"not {expected}, which its name promises, but {found}. {_MEND.get(found, 'Correct its name')}"


def _is_text(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.end >= len(head) and error.start > len(head) - 4  # a character that the end of `head` cuts
    return b"\x00" not in head
