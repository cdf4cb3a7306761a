"""Read documents from JSON Lines, and from JSON files that hold an array or objects spread over lines."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain
from typing import IO, Any

import msgspec

from codeparrot_ds.documents.compression import BLOCK_BYTES, Content, DamageError
from codeparrot_ds.documents.document import (
    MAX_DOCUMENT_BYTES,
    BadDocument,
    Document,
    Read,
    document_from_row,
    document_from_table,
    make_document,
)
from codeparrot_ds.documents.fields import PROVENANCE_NAMES, Fields
from codeparrot_ds.documents.piece import Piece

_BOM = codecs.BOM_UTF8
# The start of a file of JSON values that are not one to a line: an array of objects, or an object spread over lines.
_VALUES = re.compile(rb"\s*(\[\s*\{|\[[ \t\r]*\n|\{[ \t\r]*\n)")
_HEAD_BYTES = 1 << 12
_SPACE = re.compile(r"[\s\ufeff]*")
_PARSE = json.JSONDecoder().raw_decode
_OBJECT = msgspec.json.Decoder(dict[str, Any])


class TooLong(msgspec.Struct):
    """Placeholder for a line over MAX_DOCUMENT_BYTES, which is never held in memory."""

    size: int


def whole_lines(blocks: Iterator[bytes]) -> Iterator[bytes | TooLong]:
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
            yield b"".join([*held, first]) if size <= MAX_DOCUMENT_BYTES else TooLong(size)
            if newline:
                yield others
            held, size = [], 0
        if size + len(rest) <= MAX_DOCUMENT_BYTES:
            held.append(rest)
        size += len(rest)
    yield b"".join(held) if size <= MAX_DOCUMENT_BYTES else TooLong(size)


def is_json_values(head: bytes) -> bool:
    """Whether a JSON file that starts with `head` holds an array or spread-out objects rather than one per line."""
    return _VALUES.match(head.removeprefix(_BOM)) is not None


def can_be_split(piece: Piece) -> bool:
    """Whether parts of a JSON Lines file can be read on their own: it is not compressed, and has a row per line."""
    if piece.compression or piece.member:
        return False
    with piece.open() as file:
        head = file.read(_HEAD_BYTES)
    return not is_json_values(head)


def read_json(piece: Piece, fields: Fields) -> Iterator[Read]:
    """Yield the documents of a JSON file: one per line, or one per object of an array. See `read_documents`."""
    with piece.open() as file:
        start = _seek_line(file, piece.start) if piece.start > 0 else 0
        content = Content(file, piece.compression)
        blocks = iter(content)
        reader = _Lines(piece, fields, start)
        try:
            first = next(blocks, b"")
            values = piece.whole and is_json_values(first[:_HEAD_BYTES])
            blocks = chain([first], blocks)
            del first  # a block that is held is not reused for the next one
            yield from _read_values(piece, blocks, fields) if values else reader.read(blocks)
        except DamageError as damage:
            yield BadDocument(piece.location, damage.after(f"line {reader.number:,}"))
        else:
            if content.trailing:
                yield BadDocument(piece.location, content.trailing)


class _Lines:
    """Reads one document per line. A byte range contains the lines that start in it.

    Attributes:
        number: current line, from 1.
        offset: byte at which it starts.
    """

    def __init__(self, piece: Piece, fields: Fields, offset: int) -> None:
        self._piece, self._fields = piece, fields
        self.number, self.offset = 0, offset

    def _where(self) -> str:
        # In the middle of a file the line number is unknown, so report the byte offset.
        place = f":{self.number}" if self._piece.whole else f" at byte {self.offset:,}"
        return f"{self._piece.location}{place}"

    def _place(self) -> str:
        return f"{self._piece.name}{f'#{self.number}' if self._piece.whole else f'@{self.offset}'}"

    def read(self, blocks: Iterator[bytes]) -> Iterator[Read]:
        """Yield the documents of `blocks`, which start at a line."""
        piece, stop = self._piece, self._piece.stop
        decoder = _row_decoder(self._fields)
        for stretch in whole_lines(blocks):
            if stop is not None and self.offset >= stop:
                return
            if isinstance(stretch, TooLong):
                self.number += 1
                limit = f"the limit for one document is {MAX_DOCUMENT_BYTES:,}"
                yield BadDocument(self._where(), f"a line of {stretch.size:,} bytes; {limit}")
                self.offset += stretch.size + 1
                continue
            inside = stop is None or self.offset + len(stretch) < stop
            name = piece.name if piece.whole else None
            documents = _parse_fast(decoder, stretch, name, self.number) if inside else None
            if documents is not None:
                self.number += len(documents)
                self.offset += len(stretch) + 1
                yield from documents
                continue
            for line in stretch.split(b"\n"):
                if stop is not None and self.offset >= stop:
                    return
                self.number += 1
                if line and not line.isspace():
                    yield _parse(decoder, line, self._fields, self._where, self._place)
                self.offset += len(line) + 1


def _seek_line(file: IO[bytes], start: int) -> int:
    """Seek to the first line that starts at or after byte `start`, and return its offset."""
    file.seek(start - 1)
    offset = start - 1
    while block := file.read(BLOCK_BYTES):
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


def _parse(decoder: Any, line: bytes, fields: Fields, where: Callable[[], str], place: Callable[[], str]) -> Read:
    """The document of one line."""
    try:
        if decoder is not None:
            text, *provenance = msgspec.structs.astuple(decoder.decode(line))
            return make_document(text, provenance, place())
        read = document_from_row(_OBJECT.decode(line), fields, where(), place())
        if isinstance(read, Document):
            return read
    except (ValueError, RecursionError):
        pass  # the slow parser decides
    return _parse_slowly(line, fields, where(), place())


_ROW_ATTRIBUTES = ["text", *(f"field_{i}" for i in range(len(PROVENANCE_NAMES)))]


@lru_cache(maxsize=8)
def _row_decoder(fields: Fields) -> Any:
    """A msgspec decoder of JSON lines that reads only the text and the provenance fields.

    None if a field is named by a path, or if msgspec does not support the name of the text field.
    """
    if not fields.plain:
        return None
    # A field is either the text or provenance, not both.
    names = [name if name != fields.text else "(the field that holds the text)" for name in PROVENANCE_NAMES]
    try:
        row = msgspec.defstruct(
            "Row",
            [(_ROW_ATTRIBUTES[0], str), *((name, Any, None) for name in _ROW_ATTRIBUTES[1:])],
            rename=dict(zip(_ROW_ATTRIBUTES, [fields.text, *names], strict=True)).get,
            gc=False,
        )
    except ValueError:  # e.g. quotation marks in the name
        return None
    return msgspec.json.Decoder(row)


def _parse_slowly(line: bytes, fields: Fields, where: str, number: str) -> Read:
    """Parse a line that msgspec rejects, using the standard library.

    It accepts NaN and a byte-order mark, and has clearer error messages.
    """
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            return BadDocument(where, f"a JSON {type(row).__name__}, not an object with a field {fields.text!r}")
        return document_from_row(row, fields, where, number)
    except ValueError as error:
        return BadDocument(where, f"not valid JSON in UTF-8 ({error})")
    except RecursionError:
        return BadDocument(where, "nested too deeply")


def _read_values(piece: Piece, blocks: Iterator[bytes], fields: Fields) -> Iterator[Read]:
    """One document per JSON object, in an array or one after the other. Invalid JSON ends it, with one BadDocument."""
    number = 0
    try:
        for number, value in enumerate(_Values(blocks), start=1):
            where = f"{piece.location} value {number:,}"
            if isinstance(value, dict):
                yield document_from_table(value, fields, where, f"{piece.name}#{number}")
            else:
                yield BadDocument(where, f"a JSON {type(value).__name__}, not an object with a field {fields.text!r}")
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON ({error})"
        yield BadDocument(
            piece.location, f"{reason} after value {number:,}; the rest of the file cannot be read: correct it"
        )


class _Values:
    """The values of a JSON array, or of a sequence of JSON values. Iteration raises ValueError for invalid JSON."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        # Bytes that are not UTF-8 become lone surrogates, which make their own document a bad one.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._at, self._ended = "", 0, False

    def _read_more(self) -> None:
        """Double the text that is held, so that a long value is not parsed too often."""
        parts = [self._text[self._at :]]
        wanted = max(len(parts[0]), 1)
        while wanted > 0 and not self._ended:
            block = next(self._blocks, b"")
            self._ended = not block
            parts.append(self._decoder.decode(block, final=self._ended))
            wanted -= len(parts[-1])
        self._text, self._at = "".join(parts), 0

    def _next_character(self) -> str:
        """The next character that is not white space, without consuming it; "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_more()

    def _parse(self) -> Any:
        while True:
            try:
                value, end = _PARSE(self._text, self._at)
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            except ValueError:
                if self._ended or len(self._text) - self._at > MAX_DOCUMENT_BYTES:
                    raise
            self._read_more()

    def __iter__(self) -> Iterator[Any]:
        array = self._next_character() == "["
        self._at += array
        first = True
        while (character := self._next_character()) and not (array and character == "]"):
            if array and not first:
                if character != ",":
                    raise ValueError("no comma between two values")
                self._at += 1
                self._next_character()
            yield self._parse()
            first = False
        if array:
            if not character:
                raise ValueError("the array has no end: the file is incomplete")
            self._at += 1
            if self._next_character():
                raise ValueError("something follows the array")
