"""Read documents from source files, JSON Lines, CSV, parquet, zip archives and the Hub.

Everything is streamed: memory use is one block, one line and one document. An unreadable document yields a
`BadDocument` in its place; the caller decides whether to stop.
"""

from collections.abc import Iterator
from pathlib import Path

from codeparrot_ds.documents.archives import MEMBER_ERRORS, list_members
from codeparrot_ds.documents.document import MAX_DOCUMENT_BYTES, BadDocument, Document, Read
from codeparrot_ds.documents.fields import Fields
from codeparrot_ds.documents.formats import format_of
from codeparrot_ds.documents.hub import read_hub
from codeparrot_ds.documents.lines import read_json
from codeparrot_ds.documents.piece import Piece
from codeparrot_ds.documents.source import EncodingError, decode_source
from codeparrot_ds.documents.tables import read_csv, read_parquet
from codeparrot_ds.errors import DataError
from codeparrot_ds.system.paths import printable_name, text_of
from codeparrot_ds.system.storage import open_binary

__all__ = ["Piece", "Read", "read_documents", "read_local", "require_document"]

_USUAL = Fields()


def read_documents(piece: Piece, fields: Fields | str = _USUAL) -> Iterator[Read]:
    """Yield the documents of `piece` in order, with a BadDocument in place of each unreadable one.

    `fields` are those of a row that hold the document; a text is the field of its content.

    Raises DataError, naming the file, when the file is missing or cannot be read.
    """
    fields = Fields(fields) if isinstance(fields, str) else fields
    try:
        if piece.kind == "hub":
            yield from read_hub(piece, fields, read_documents)
        else:
            yield from _READERS[piece.kind](piece, fields)
    except OSError as error:
        if error.errno is None and piece.member:  # from the bzip2 library
            yield _damaged_member(piece, error)
            return
        if error.errno is None and not isinstance(error, FileNotFoundError):
            raise  # not an error of the operating system; the readers handle the expected ones
        raise DataError(
            f"{piece.address}: cannot be read ({error.strerror or error}). Fix this and run the same command again."
        ) from error
    except MEMBER_ERRORS as error:
        if not piece.member:
            raise
        yield _damaged_member(piece, error)


def _damaged_member(piece: Piece, error: Exception) -> BadDocument:
    return BadDocument(piece.location, f"damaged member of a zip archive ({error}); copy the archive again")


def _read_file(piece: Piece, fields: Fields) -> Iterator[Read]:
    """Read a file as one document."""
    if printable_name(piece.address) != piece.address:
        yield BadDocument(printable_name(piece.address), "its name is not UTF-8")
        return
    if piece.size > MAX_DOCUMENT_BYTES:
        yield BadDocument(piece.address, f"{piece.size:,} bytes; the limit for one document is {MAX_DOCUMENT_BYTES:,}")
        return
    with piece.open() as file:
        data = file.read()
    try:
        yield Document(decode_source(data, piece.name), piece.repository, piece.name, "", "directory")
    except EncodingError as error:
        yield BadDocument(piece.address, str(error))


def _read_refused(piece: Piece, fields: Fields) -> Iterator[Read]:
    """One BadDocument for an archive that cannot be listed, or for a member that cannot be read."""
    with open_binary(piece.address) as file:
        try:
            reason = next((each.refusal for each in list_members(file) if each.name == piece.member), "")
        except ValueError as error:
            reason = str(error)
    yield BadDocument(piece.location, reason or "the archive has changed; run the same command again")


_READERS = {
    "jsonl": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "file": _read_file,
    "zip": _read_refused,
}


def read_local(file: Path, fields: Fields | str = _USUAL) -> Iterator[Document]:
    """Yield the documents of one local file of a supported name. Raises DataError at the first unreadable one."""
    found = format_of(file.name)
    assert found is not None, file
    for read in read_documents(Piece(text_of(file), text_of(file.name), found.kind, file.stat().st_size), fields):
        yield require_document(read)


def require_document(read: Read) -> Document:
    """Return `read` if it is a document. Raises DataError otherwise."""
    if isinstance(read, BadDocument):
        raise DataError(
            f"{read.where}: not a document: {read.reason}. Fix or remove it, or skip and list bad documents with "
            "--on-bad-document skip."
        )
    return read
