"""A unit of input, and where it is read from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import msgspec

from codeparrot_ds.documents.formats import compression_of
from codeparrot_ds.system.storage import open_binary


class Piece(msgspec.Struct, frozen=True):
    """A unit of input: a whole file, a range of one if its format can be split, or a member of a zip archive.

    Attributes:
        address: path (see `system.paths.text_of`), fsspec URL, or "hub:NAME".
        name: name in messages, provenance and manifests: the path relative to the input argument.
        kind: "file" (one document), "jsonl", "csv", "parquet", "zip" (an unreadable archive) or "hub".
        size: size of the whole file, or of the member when extracted (bytes); 0 if unknown.
        start: first byte (jsonl), row group (parquet) or part (hub) of the range.
        stop: one past the last; None for the end of the file.
        stamp: changes when the file changes: modification time, or the store's tag.
        digest: xxh3-128 of the file if a manifest records it.
        repository: repository of the document, for kind "file".
        member: name inside the archive `address`; "" for a file of its own.
    """

    address: str
    name: str
    kind: str
    size: int
    start: int = 0
    stop: int | None = None
    stamp: str = ""
    digest: str = ""
    repository: str = ""
    member: str = ""

    @property
    def whole(self) -> bool:
        """Whether the piece is a whole file."""
        return self.start == 0 and self.stop is None

    @property
    def location(self) -> str:
        """Where it is, for messages; the path of an archive's member continues the archive's."""
        return f"{self.address}/{self.member}" if self.member else self.address

    @property
    def compression(self) -> str:
        """The compression according to its name, or ""."""
        return compression_of(self.location)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open it for binary reading and seeking, without decompressing what `compression` says."""
        with open_binary(self.address) as file:
            if not self.member:
                yield file
                return
            from codeparrot_ds.documents.archives import open_member

            with open_member(file, self.member) as member:
                yield member
