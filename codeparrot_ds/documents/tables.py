"""Read documents from parquet and CSV: one per row, with the columns of the text and the provenance only."""

import csv
import re
from collections.abc import Iterator
from typing import IO, Any

from codeparrot_ds.documents.compression import Content, DamageError
from codeparrot_ds.documents.document import (
    MAX_DOCUMENT_BYTES,
    BadDocument,
    Read,
    document_from_table,
)
from codeparrot_ds.documents.fields import Fields
from codeparrot_ds.documents.formats import SNIFFED_BYTES, content_of, misnamed
from codeparrot_ds.documents.lines import TooLong, whole_lines
from codeparrot_ds.documents.piece import Piece

_ROWS = 64  # parquet rows read at a time
_PAGE_BYTES = 1 << 20  # parquet read buffer; without it a whole column chunk is read into memory
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of bytes that are not UTF-8


# Parquet


def read_parquet(piece: Piece, fields: Fields) -> Iterator[Read]:
    """Yield the documents of a parquet file or of a range of its row groups. See `read_documents`.

    Damage loses the rest of its row group: one BadDocument stands for these rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with piece.open() as raw:
        try:
            table = pq.ParquetFile(raw, pre_buffer=False, buffer_size=_PAGE_BYTES)
            names = [*table.schema_arrow.names, *_nested(table.schema_arrow)]
            groups = range(piece.start, table.num_row_groups if piece.stop is None else piece.stop)
            rows = [table.metadata.row_group(group).num_rows for group in range(groups.stop)]
            promised = table.metadata.num_rows
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            yield BadDocument(piece.location, _damage(raw, error))
            return
        number = sum(rows[: groups.start])
        if problem := fields.missing(names):
            yield BadDocument(piece.location, problem, documents=sum(rows[groups.start :]))
            return
        columns = fields.columns(names)
        for group in groups:
            end = number + rows[group]
            reason = "it has fewer or more rows than its footer says"
            try:
                for batch in table.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False):
                    for row in _rows(batch):
                        number += 1
                        where = f"{piece.location} row {number:,}"
                        if isinstance(row, str):
                            yield BadDocument(where, row)
                        else:
                            yield document_from_table(row, fields, where, f"{piece.name}#{number}")
            except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
                reason = _damage(raw, error)
            if number != end:
                where = f"{piece.location} rows {number + 1:,} to {end:,}"
                yield BadDocument(where, reason, documents=max(end - number, 1))
                number = end
        if piece.whole and number != promised:
            yield BadDocument(piece.location, f"damaged parquet: {number:,} rows, {promised:,} expected")


def _nested(fields: Any, above: str = "") -> Iterator[str]:
    """The dotted paths of all fields in columns that hold objects."""
    import pyarrow as pa

    for field in fields:
        if above:
            yield f"{above}{field.name}"
        if pa.types.is_struct(field.type):
            yield from _nested(field.type, f"{above}{field.name}.")


def _damage(raw: IO[bytes], error: Exception) -> str:
    """The reason why a parquet file cannot be read. Raises `error` if it comes from the operating system."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    raw.seek(0)
    head = raw.read(SNIFFED_BYTES)
    if content_of(head) not in (None, "parquet"):
        return misnamed(head, "parquet")
    detail = " ".join(str(error).split())
    return f"damaged parquet ({detail}); copy the file again"


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


# CSV


def read_csv(piece: Piece, fields: Fields) -> Iterator[Read]:
    """Yield the documents of a file of comma- or tab-separated values with a header line. See `read_documents`.

    A field in quotes may contain separators, newlines and doubled quotes (RFC 4180).
    """
    delimiter = "\t" if ".tsv" in piece.location.lower().rpartition("/")[2] else ","
    with piece.open() as file:
        content = Content(file, piece.compression)
        number = 0
        # Without `strict`, an open quote would silently swallow the rest of the file.
        csv.field_size_limit(MAX_DOCUMENT_BYTES)
        rows = csv.reader(_text_lines(iter(content)), delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            if header and (problem := _header_problem(header, fields)):
                yield BadDocument(piece.location, problem, documents=sum(1 for row in rows if row) or 1)
                return
            for row in rows:
                if not row:
                    continue  # a blank line
                number += 1
                where = f"{piece.location} row {number:,}"
                if len(row) != len(header):
                    yield BadDocument(where, f"{len(row):,} fields, the header has {len(header):,}")
                elif any(map(_NOT_UTF8.search, row)):
                    yield BadDocument(where, "not UTF-8")
                else:
                    document = dict(zip(header, row, strict=True))
                    yield document_from_table(document, fields, where, f"{piece.name}#{number}")
        except csv.Error as error:
            yield BadDocument(
                piece.location,
                f"not valid CSV after row {number:,} ({error}); the rest of the file cannot be read: correct it",
            )
        except DamageError as damage:
            yield BadDocument(piece.location, damage.after(f"row {number:,}"))
        else:
            if content.trailing:
                yield BadDocument(piece.location, content.trailing)


def _header_problem(header: list[str], fields: Fields) -> str | None:
    if problem := fields.missing(header):
        return problem
    for field in (fields.text, *fields.named.values()):
        if header.count(field) > 1:
            return f"{header.count(field)} columns are named {field!r}; rename all but one"
    return None


def _text_lines(blocks: Iterator[bytes]) -> Iterator[str]:
    """Yield the lines with their newline. Raises csv.Error for a line that is longer than a document may be."""
    first = True
    for stretch in whole_lines(blocks):
        if isinstance(stretch, TooLong):
            limit = f"the limit for one document is {MAX_DOCUMENT_BYTES:,}"
            raise csv.Error(f"a line of {stretch.size:,} bytes; {limit}")
        for line in stretch.split(b"\n"):
            text = line.decode(errors="surrogateescape")
            yield (text.removeprefix("\ufeff") if first else text) + "\n"
            first = False
