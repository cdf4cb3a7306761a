"""What finished shards were built from, to notice that a later call wants something else."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from codeparrot_ds.documents.piece import Piece
from codeparrot_ds.errors import DataError
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.system.files import MANIFEST, digest_json
from codeparrot_ds.system.inputs_record import Files, require_same_inputs
from codeparrot_ds.system.storage import Directory

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


def finished_shards(target: Directory, wanted: Manifest, files: Files) -> Manifest | None:
    """The manifest in `target`, or None. Raises DataError when its shards were built with other options or inputs."""
    if not target.exists(MANIFEST):
        return None
    found = Manifest.read(wanted.directory)
    if "text_changes" not in found.options:  # written by a version that did not record what the tokenizer determines
        wanted = dataclasses.replace(wanted, options={k: v for k, v in wanted.options.items() if k != "text_changes"})
    keys = ("tokenizer_digest", "options", "sources")
    differing = [key for key in keys if getattr(found, key) != getattr(wanted, key)]
    if differing:
        raise DataError(
            f"{target}: contains finished shards that were built with different options (differing: "
            f"{', '.join(differing)}). Name another output directory, or remove this one."
        )
    require_same_inputs(target, "shards", files)
    return found
