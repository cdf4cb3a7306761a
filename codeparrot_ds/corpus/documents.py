"""What a document is, and the files that hold documents: gzip-compressed JSON Lines, as CodeParrot's were."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import DataError
from codeparrot_ds.files import digest_bytes, read_manifest


@dataclass(frozen=True, slots=True)
class Document:
    """One source file with its provenance.

    Attributes:
        text: the decoded content.
        repository: where it comes from, e.g. "numpy-2.4.6" or "owner/name".
        path: its path inside the repository, with forward slashes.
        licence: SPDX identifier or the repository's own words; empty when unknown.
        source: how it reached the corpus, e.g. "installed-python".
    """

    text: str
    repository: str
    path: str
    licence: str
    source: str

    def digest(self) -> str:
        """xxh3-128 of the content alone: equal for copies, wherever they lie."""
        return digest_bytes(self.text.encode())

    def to_json(self) -> str:
        """One JSON line with the field names of the CodeParrot dataset."""
        row = {
            "repo_name": self.repository,
            "path": self.path,
            "license": self.licence,
            "source": self.source,
            "size": len(self.text.encode()),
            "content": self.text,
        }
        return json.dumps(row, ensure_ascii=False) + "\n"


def parse_document(line: bytes, where: str) -> Document:
    """A Document from one JSON line; `where` ("file:line") goes into the message of the DataError."""
    try:
        row = json.loads(line)
        text = row["content"]
        where_from = [str(row.get(key) or "") for key in ("repo_name", "path", "license", "source")]
        for string in (text, *where_from):
            string.encode()  # a lone surrogate is valid JSON, but not text that could be stored
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: not a document ({type(error).__name__}: {error}). Each line must be a JSON object with a "
            "text field `content`; remove or mend this line."
        ) from None
    return Document(text, *where_from)


def read_documents(file: Path) -> Iterator[Document]:
    """The documents of one `.jsonl.gz` file in order. Raises DataError naming file and line."""
    number = 0
    try:
        with gzip.open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield parse_document(line, f"{file}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{file}: damaged gzip data after line {number} ({error}). The copy is incomplete: copy it again."
        ) from None


@dataclass(frozen=True)
class Corpus:
    """A finished corpus directory: its document files in order, and its manifest."""

    directory: Path
    files: tuple[Path, ...]
    manifest: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> "Corpus":
        """Open `directory` and see that all its files are there in full. Raises DataError."""
        manifest = read_manifest(directory, "corpus", "codeparrot-ds corpus collect")
        files = []
        for entry in manifest["files"]:
            path = directory / entry["name"]
            size = path.stat().st_size if path.exists() else 0
            if size != entry["bytes"]:
                raise DataError(
                    f"{path}: {size:,} bytes, the manifest says {entry['bytes']:,}. Copy it again, or run "
                    "`codeparrot-ds corpus collect` again."
                )
            files.append(path)
        return cls(directory, tuple(files), manifest)

    @property
    def digest(self) -> str:
        """Digest of the whole corpus: equal for equal bytes."""
        return str(self.manifest["digest"])

    def __iter__(self) -> Iterator[Document]:
        for file in self.files:
            yield from read_documents(file)
