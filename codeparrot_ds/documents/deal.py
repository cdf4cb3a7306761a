"""Split input into tasks of similar size, based on the list of files alone."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import msgspec

from codeparrot_ds.documents.formats import expansion
from codeparrot_ds.documents.lines import can_be_split
from codeparrot_ds.documents.piece import Piece
from codeparrot_ds.errors import DataError
from codeparrot_ds.system.storage import open_binary


def text_bytes(piece: Piece) -> float:
    """Estimated bytes of text in a whole file; 0 if unknown."""
    return piece.size * expansion(piece.location)


def deal(pieces: Sequence[Piece], task_bytes: float) -> list[list[Piece]]:
    """Group pieces, in order, into tasks of about `task_bytes` of text.

    Splits large files if their format allows it, and combines small ones. Depends only on its arguments.
    """
    tasks: list[list[Piece]] = []
    filled = 0.0
    for piece in _split(pieces, task_bytes):
        size = text_bytes(piece) if piece.whole else task_bytes  # a part has the requested size
        if not tasks or filled + size > task_bytes:
            tasks.append([])
            filled = 0.0
        tasks[-1].append(piece)
        filled += size
    return tasks


def _split(pieces: Iterable[Piece], task_bytes: float) -> Iterator[Piece]:
    for piece in pieces:
        parts = int(-(-text_bytes(piece) // task_bytes))
        if parts <= 1 or not piece.whole:
            yield piece
        elif piece.kind == "jsonl" and can_be_split(piece):
            bounds = [piece.size * part // parts for part in range(parts)] + [piece.size]
            for start, stop in pairwise(bounds):
                yield msgspec.structs.replace(piece, start=start, stop=stop)
        elif piece.kind == "parquet" and not piece.member:
            groups = _row_groups(piece)
            bounds = sorted({groups * part // parts for part in range(parts)} | {groups})
            for start, stop in pairwise(bounds):
                yield msgspec.structs.replace(piece, start=start, stop=stop)
        else:
            yield piece


def _row_groups(piece: Piece) -> int:
    """Number of row groups in a parquet file. Raises DataError when it is not one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_binary(piece.address) as file:
        try:
            return int(pq.ParquetFile(file).num_row_groups)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{piece.address}: damaged parquet ({error}). Copy the file again.") from None
