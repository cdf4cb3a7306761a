"""A finished corpus directory, read by its manifest."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.read import read_local
from codeparrot_ds.errors import DataError
from codeparrot_ds.system.files import MANIFEST, read_manifest


@dataclass(frozen=True)
class Corpus:
    """A finished corpus directory: its manifest, and its document files in order."""

    directory: Path
    files: tuple[Path, ...]
    manifest: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> "Corpus":
        """Open `directory` and check that all its files exist with the expected size. Raises DataError."""
        manifest = read_manifest(directory, "corpus", "codeparrot-ds corpus collect")
        try:
            entries = [(entry["name"], entry["bytes"]) for entry in manifest["files"]]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{directory / MANIFEST}: incomplete manifest ({error}). Collect the corpus again."
            ) from None
        files = []
        for name, expected in entries:
            path = directory / name
            size = path.stat().st_size if path.exists() else 0
            if size != expected:
                raise DataError(
                    f"{path}: {size:,} bytes, the manifest says {expected:,}. Copy it again, or run "
                    "`codeparrot-ds corpus collect` again."
                )
            files.append(path)
        return cls(directory, tuple(files), manifest)

    @property
    def digest(self) -> str:
        """Digest of the contents of all document files."""
        return str(self.manifest["digest"])

    def __iter__(self) -> Iterator[Document]:
        for file in self.files:
            yield from read_local(file)
