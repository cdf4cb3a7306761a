"""Read documents from source files, JSON Lines (plain, gzip, zstandard), parquet and the Hub.

Everything is streamed: memory use is one block, one line and one document. An unreadable document yields a
`BadDocument` in its place; the caller decides whether to stop.
"""

import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

import msgspec
from isal import igzip_lib

from codeparrot_ds.documents.document import (
    PROVENANCE_NAMES,
    BadDocument,
    Document,
    document_from_row,
    make_document,
)
from codeparrot_ds.documents.hub import open_hub_dataset
from codeparrot_ds.errors import DataError
from codeparrot_ds.system.storage import open_binary

MAX_DOCUMENT_BYTES = 32_000_000  # of a line or a file; anything longer is a data dump, not source code
_BLOCK_BYTES = 1 << 18  # fastest decompression: the block fits in the L2 cache
_ROWS = 64  # parquet rows read at a time
_PAGE_BYTES = 1 << 20  # parquet read buffer; without it a whole column chunk is read into memory

_DAMAGED: Any = (EOFError, OSError, zlib.error, igzip_lib.IsalError)

Read = Document | BadDocument


class Piece(msgspec.Struct, frozen=True):
    """A unit of input: a whole file, or a range of one if its format can be split.

    Attributes:
        address: path, fsspec URL, or "hub:NAME".
        name: name in messages, provenance and manifests: the path relative to the input argument.
        kind: "file" (one document), "jsonl", "parquet" or "hub".
        size: size of the whole file (bytes); 0 if unknown.
        start: first byte (jsonl), row group (parquet) or part (hub) of the range.
        stop: one past the last; None for the end of the file.
        stamp: changes when the file changes: modification time, or the store's tag.
        digest: xxh3-128 of the file if a manifest records it.
        repository: repository of the document, for kind "file".
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

    @property
    def whole(self) -> bool:
        """Whether the piece is a whole file."""
        return self.start == 0 and self.stop is None


def read_documents(piece: Piece, text_field: str = "content") -> Iterator[Read]:
    """Yield the documents of `piece` in order, with a BadDocument in place of each unreadable one.

    Raises DataError, naming the file, when the file is missing or cannot be read.
    """
    try:
        yield from _READERS[piece.kind](piece, text_field)
    except OSError as error:
        if error.errno is None and not isinstance(error, FileNotFoundError):
            raise  # not an error of the operating system; the readers handle the expected ones
        raise DataError(
            f"{piece.address}: cannot be read ({error.strerror or error}). Fix this and run the same command again."
        ) from error


def _blocks(piece: Piece, file: IO[bytes]) -> Iterator[bytes]:
    """Yield the decompressed content in blocks. Damaged data raises EOFError, OSError or the library's exception."""
    suffix = PurePosixPath(piece.address).suffix.lower()
    if suffix == ".gz":
        from isal import igzip

        with igzip.IGzipFile(fileobj=file, mode="rb") as content:
            while block := content.read(_BLOCK_BYTES):
                yield block
    elif suffix in (".zst", ".zstd"):
        import pyarrow as pa  # unlike other readers, it detects truncated frames

        with pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd") as content:
            while block := content.read(_BLOCK_BYTES):
                yield block
    else:
        while block := file.read(_BLOCK_BYTES):
            yield block


class _TooLong(msgspec.Struct):
    """Placeholder for a line over MAX_DOCUMENT_BYTES, which is never held in memory."""

    size: int


def _whole_lines(blocks: Iterator[bytes]) -> Iterator[bytes | _TooLong]:
    """Yield chunks of whole lines without the final newline; a line may span many blocks.

    Of a line over MAX_DOCUMENT_BYTES, only the size is kept.
    """
    held: list[bytes] = []
    size = 0
    for block in blocks:
        whole, newline, rest = block.rpartition(b"\n")
        if newline and size + len(whole) <= MAX_DOCUMENT_BYTES:
            yield b"".join([*held, whole])
            held, size = [], 0
        elif newline:
            first, newline, others = whole.partition(b"\n")
            size += len(first)
            yield b"".join([*held, first]) if size <= MAX_DOCUMENT_BYTES else _TooLong(size)
            if newline:
                yield others
            held, size = [], 0
        if size + len(rest) <= MAX_DOCUMENT_BYTES:
            held.append(rest)
        size += len(rest)
    yield b"".join(held) if size <= MAX_DOCUMENT_BYTES else _TooLong(size)


def _read_jsonl(piece: Piece, text_field: str) -> Iterator[Read]:
    """One document per line. A byte range contains the lines that start in it."""
    decoder = _row_decoder(text_field)
    number, offset = 0, piece.start  # current line, from 1, and the byte at which it starts

    def where() -> str:
        # In the middle of a file the line number is unknown, so report the byte offset.
        return f"{piece.address}:{number}" if piece.whole else f"{piece.address} at byte {offset:,}"

    def place() -> str:
        return f"{piece.name}{f'#{number}' if piece.whole else f'@{offset}'}"

    with open_binary(piece.address) as file:
        if piece.start > 0:
            offset = _seek_line(file, piece.start)
        try:
            for stretch in _whole_lines(_blocks(piece, file)):
                if piece.stop is not None and offset >= piece.stop:
                    return
                if isinstance(stretch, _TooLong):
                    number += 1
                    limit = f"the limit for one document is {MAX_DOCUMENT_BYTES:,}"
                    yield BadDocument(where(), f"a line of {stretch.size:,} bytes; {limit}")
                    offset += stretch.size + 1
                    continue
                inside = piece.stop is None or offset + len(stretch) < piece.stop
                documents = (
                    _parse_fast(decoder, stretch, piece.name if piece.whole else None, number) if inside else None
                )
                if documents is not None:
                    number += len(documents)
                    offset += len(stretch) + 1
                    yield from documents
                    continue
                for line in stretch.split(b"\n"):
                    if piece.stop is not None and offset >= piece.stop:
                        return
                    number += 1
                    if line and not line.isspace():
                        yield _parse(decoder, line, text_field, where, place)
                    offset += len(line) + 1
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # a disk or network error, not a damaged file
            kind = "gzip" if piece.address.lower().endswith(".gz") else "zstandard"
            yield BadDocument(
                piece.address,
                f"damaged {kind} data after line {number} ({error}); the file is incomplete: copy it again",
            )


def _seek_line(file: IO[bytes], start: int) -> int:
    """Seek to the first line that starts at or after byte `start`, and return its offset."""
    file.seek(start - 1)
    offset = start - 1
    while block := file.read(_BLOCK_BYTES):
        end = block.find(b"\n")
        if end >= 0:
            file.seek(offset + end + 1)
            return offset + end + 1
        offset += len(block)
    return offset


def _parse_fast(decoder: Any, lines: bytes, name: str | None, number: int) -> list[Document] | None:
    """Fast path: decode the lines that follow line `number` of the file `name`.

    Returns None if the slow path must decide: a line is blank, invalid or not exactly one object, or a document needs
    its path but no `name` is given.
    """
    if decoder is None or not (lines.startswith(b"{") and lines.endswith(b"}")):
        return None
    # msgspec also accepts two objects on one line, and an object that spans lines.
    count, end = 1, lines.find(b"\n")
    while end >= 0:
        if lines[end - 1 : end + 2] != b"}\n{":
            return None
        count, end = count + 1, lines.find(b"\n", end + 1)
    try:
        rows = decoder.decode_lines(lines)
        if len(rows) != count:
            return None
        documents = []
        for i, row in enumerate(rows, start=number + 1):
            text, *provenance = msgspec.structs.astuple(row)
            documents.append(make_document(text, provenance, f"{name}#{i}" if name is not None else None))
    except (ValueError, RecursionError):
        return None
    return documents


def _parse(decoder: Any, line: bytes, text_field: str, where: Callable[[], str], place: Callable[[], str]) -> Read:
    """The document of one line."""
    if decoder is not None:
        try:
            text, *provenance = msgspec.structs.astuple(decoder.decode(line))
            return make_document(text, provenance, place())
        except (ValueError, RecursionError):
            pass  # the slow parser decides
    return _parse_slowly(line, text_field, where(), place())


_ROW_ATTRIBUTES = ["text", *(f"field_{i}" for i in range(len(PROVENANCE_NAMES)))]


@lru_cache(maxsize=8)
def _row_decoder(text_field: str) -> Any:
    """A msgspec decoder of JSON lines that reads only the text and the provenance fields.

    None if msgspec does not support the name of the text field.
    """
    # A field is either the text or provenance, not both.
    names = [name if name != text_field else "(the field that holds the text)" for name in PROVENANCE_NAMES]
    try:
        row = msgspec.defstruct(
            "Row",
            [(_ROW_ATTRIBUTES[0], str), *((name, Any, None) for name in _ROW_ATTRIBUTES[1:])],
            rename=dict(zip(_ROW_ATTRIBUTES, [text_field, *names], strict=True)).get,
            gc=False,
        )
    except ValueError:  # e.g. quotation marks in the name
        return None
    return msgspec.json.Decoder(row)


def _parse_slowly(line: bytes, text_field: str, where: str, number: str) -> Read:
    """Parse a line that msgspec rejects, using the standard library.

    It accepts NaN and a byte-order mark, and has clearer error messages.
    """
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            return BadDocument(where, f"a JSON {type(row).__name__}, not an object with a field {text_field!r}")
        return document_from_row(row, text_field, where, number)
    except ValueError as error:
        return BadDocument(where, f"not valid JSON in UTF-8 ({error})")
    except RecursionError:
        return BadDocument(where, "nested too deeply")


def printable_name(name: str) -> str:
    """`name` with bytes that are not valid UTF-8 escaped, so that it can be printed."""
    return name.encode(errors="backslashreplace").decode()


def _read_file(piece: Piece, text_field: str) -> Iterator[Read]:
    """Read a file as one document."""
    if printable_name(piece.address) != piece.address:
        yield BadDocument(printable_name(piece.address), "its name is not UTF-8")
        return
    if piece.size > MAX_DOCUMENT_BYTES:
        yield BadDocument(piece.address, f"{piece.size:,} bytes; the limit for one document is {MAX_DOCUMENT_BYTES:,}")
        return
    with open_binary(piece.address) as file:
        data = file.read()
    try:
        yield Document(data.decode(), piece.repository, piece.name, "", "directory")
    except UnicodeDecodeError as error:
        yield BadDocument(piece.address, f"not UTF-8 (byte {error.start:,}: {error.reason})")


def _read_parquet(piece: Piece, text_field: str) -> Iterator[Read]:
    """One document per row. Damage cannot be attributed to single rows, so it yields one BadDocument."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_binary(piece.address) as raw:
        try:
            table = pq.ParquetFile(raw, pre_buffer=False, buffer_size=_PAGE_BYTES)
            names = table.schema_arrow.names
            if text_field not in names:
                found = ", ".join(map(repr, names))
                yield BadDocument(
                    piece.address, f"no column {text_field!r} (its columns: {found}; select one with --text-field)"
                )
                return
            groups = range(piece.start, table.num_row_groups if piece.stop is None else piece.stop)
            rows = [table.metadata.row_group(group).num_rows for group in range(groups.stop)]
            number = sum(rows[: groups.start])
            columns = [text_field, *(name for name in names if name in PROVENANCE_NAMES and name != text_field)]
            for batch in table.iter_batches(_ROWS, row_groups=list(groups), columns=columns, use_threads=False):
                for row in _rows(batch):
                    number += 1
                    where = f"{piece.address} row {number:,}"
                    if isinstance(row, str):
                        yield BadDocument(where, row)
                    else:
                        yield _from_row(row, text_field, where, f"{piece.name}#{number}")
            if number != sum(rows) or (piece.whole and number != table.metadata.num_rows):
                yield BadDocument(
                    piece.address, f"damaged parquet: {number:,} rows, {table.metadata.num_rows:,} expected"
                )
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            yield BadDocument(piece.address, f"damaged parquet ({error}); copy the file again")


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a record batch; for an unreadable row, a string with the reason."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"not UTF-8 ({error.reason})"


def _read_hub(piece: Piece, text_field: str) -> Iterator[Read]:
    """One document per example of a streamed Hub dataset; the piece is one of its parts."""
    dataset = open_hub_dataset(piece.address)
    assert piece.stop is not None
    part = dataset.shard(num_shards=piece.stop, index=piece.start)
    rows = iter(part)
    for number in itertools.count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # network errors and damaged files raise exceptions of many libraries
            raise DataError(
                f"{piece.address}: part {piece.start} cannot be read after example {number - 1:,} "
                f"({type(error).__name__}: {error}). Check the network, and run the same command again."
            ) from error
        where = f"{piece.address} part {piece.start} example {number:,}"
        yield _from_row(row, text_field, where, f"{piece.name}#{piece.start}.{number}")


def _from_row(row: dict[str, Any], text_field: str, where: str, place: str) -> Read:
    """Like `document_from_row`, with a limit on the document's size."""
    text = row.get(text_field)
    if isinstance(text, str) and len(text) > MAX_DOCUMENT_BYTES:
        return BadDocument(
            where, f"{len(text):,} characters; the limit for one document is {MAX_DOCUMENT_BYTES:,} bytes"
        )
    return document_from_row(row, text_field, where, place)


_READERS = {"jsonl": _read_jsonl, "file": _read_file, "parquet": _read_parquet, "hub": _read_hub}


def read_local(file: Path, text_field: str = "content") -> Iterator[Document]:
    """Yield the documents of one local file. Raises DataError at the first unreadable one."""
    for read in read_documents(Piece(str(file), file.name, "jsonl", file.stat().st_size), text_field):
        yield require_document(read)


def require_document(read: Read) -> Document:
    """Return `read` if it is a document. Raises DataError otherwise."""
    if isinstance(read, BadDocument):
        raise DataError(
            f"{read.where}: not a document: {read.reason}. Fix or remove it, or skip and list bad documents with "
            "--on-bad-document skip."
        )
    return read
