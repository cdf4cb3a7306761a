"""The beginnings of some documents, to try on real text what is then done to all of it."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice

from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.piece import Piece
from codeparrot_ds.documents.read import read_documents
from codeparrot_ds.errors import UserError

_FILES, _CHARACTERS = 8, 64_000  # number of input files; characters per file


def some_pieces(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces to take excerpts from, evenly spaced."""
    return list(pieces[:: -(-len(pieces) // _FILES) or 1])


def read_excerpts(pieces: Sequence[Piece], text_field: str) -> Iterator[str]:
    """Texts from the start of each piece. Unreadable documents are skipped here; whoever reads all reports them."""
    for piece in pieces:
        characters = 0
        with suppress(UserError, OSError):
            for read in islice(read_documents(piece, text_field), 1000):
                if isinstance(read, Document):
                    yield read.text[:_CHARACTERS]
                    characters += len(read.text)
                if characters > _CHARACTERS:
                    break
