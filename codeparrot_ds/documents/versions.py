"""What input files were when they were read, to notice later that they have changed."""

from collections.abc import Sequence
from typing import Any

from codeparrot_ds.documents.piece import Piece
from codeparrot_ds.system.files import digest_json
from codeparrot_ds.system.inputs_record import Files

_LISTED_SOURCES = 10_000


def sources_of(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """The input files for the manifest; for very many (a folder of source files) only their number and digest."""
    sources = [
        {"name": p.name, "bytes": p.size, **({"xxh3_128": p.digest} if p.digest else {})}
        for p in pieces
        if p.start == 0
    ]
    if len(sources) <= _LISTED_SOURCES:
        return sources
    size = sum(piece.size for piece in pieces)
    return [{"name": f"{len(sources):,} files", "bytes": size, "xxh3_128": digest_json(sources)}]


def versions_of(pieces: Sequence[Piece]) -> Files:
    """The size and version of each input file, to notice that it has changed.

    By name and not by address, so that the input may be moved: a copy with the same modification times is the same.
    """
    versions: Files = {}
    for piece in pieces:
        name, number = piece.name, 1
        while name in versions:  # below two arguments
            number += 1
            name = f"{piece.name} ({number})"
        versions[name] = (piece.size, piece.digest or piece.stamp)
    return versions
