"""Write documents to a file of a corpus: JSON Lines compressed by gzip or zstandard, or parquet."""

import gzip
import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from codeparrot_ds.documents.compression import zstd
from codeparrot_ds.documents.document import Document

_ZSTD_LEVEL, _GZIP_LEVEL = 3, 6
_BUFFER_BYTES = 1 << 20  # compressed at a time: one document at a time takes a third longer
_ROWS = 1000  # of a parquet row group


class DocumentWriter:
    """Writes documents to one file.

    Attributes:
        documents: written so far.
        text_bytes: their text.
    """

    def __init__(self, path: Path, file_format: str, stack: ExitStack) -> None:
        """Create `path`. Call `finish` and close `stack` at the end. See `open_writer`."""
        self.documents = self.text_bytes = 0
        self._rows: list[dict[str, Any]] = []
        self._table: Any = None
        self._lines: Any = None
        if file_format == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            names = ("repo_name", "path", "license", "source", "language", "commit")
            types = [*((name, pa.string()) for name in names), ("size", pa.int64()), ("content", pa.large_string())]
            self._schema = pa.schema(types)
            self._table = stack.enter_context(
                pq.ParquetWriter(path, self._schema, compression="zstd", compression_level=_ZSTD_LEVEL)
            )
        elif file_format == "jsonl.zst":
            compressor = stack.enter_context(zstd.open(path, "wb", level=_ZSTD_LEVEL))
            self._lines = stack.enter_context(io.BufferedWriter(compressor, _BUFFER_BYTES))
        else:
            assert file_format == "jsonl.gz", file_format
            raw = stack.enter_context(open(path, "wb"))  # noqa: SIM115 (closed by `stack`)
            # No name and no time in the gzip header, so that the bytes depend only on the documents.
            self._lines = stack.enter_context(gzip.GzipFile("", "wb", _GZIP_LEVEL, fileobj=raw, mtime=0))

    def append(self, document: Document) -> None:
        """Add a document."""
        self.documents += 1
        if self._table is None:
            self.text_bytes += len(document.text.encode())
            self._lines.write(document.to_json().encode())
            return
        self._rows.append(document.to_row())
        self.text_bytes += int(self._rows[-1]["size"])
        if len(self._rows) == _ROWS:
            self.finish()

    def finish(self) -> None:
        """Write what is held."""
        if self._rows:
            import pyarrow as pa

            self._table.write_table(pa.Table.from_pylist(self._rows, self._schema))
            self._rows = []


@contextmanager
def open_writer(path: Path, file_format: str) -> Iterator[DocumentWriter]:
    """Open a writer of "jsonl.gz", "jsonl.zst" or "parquet". The file's bytes depend on the documents alone."""
    with ExitStack() as stack:
        writer = DocumentWriter(path, file_format, stack)
        yield writer
        writer.finish()
