"""Decompress a stream of bytes in blocks, and say what is wrong with a damaged one.

All four libraries share one interface, that of `bz2.BZ2Decompressor`: it limits the size of the output, so memory use
is one block whatever the compression ratio, and it says where a stream ends, so a truncated one is noticed.
"""

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from isal import igzip_lib

from codeparrot_ds.documents.formats import SNIFFED_BYTES, content_of, misnamed

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK_BYTES = 1 << 18  # fastest decompression: the block fits in the L2 cache
_INPUT_BYTES = 1 << 16
_CAREFUL_BYTES = 256  # read and decompressed at a time in front of damage
_WINDOW_LOG = 31  # the largest window of `zstd --long=31`: 2 GiB, as much as its content needs
_XZ_MEMORY_BYTES = 2 << 30
_ERRORS: Any = (EOFError, OSError, zlib.error, igzip_lib.IsalError, lzma.LZMAError, zstd.ZstdError)

# Name -> first bytes of a stream, and whether its tools ignore zeros after the last stream.
_MAGIC = {
    "gzip": (b"\x1f\x8b", True),
    "bzip2": (b"BZh", False),
    "xz": (b"\xfd7zXZ\x00", True),
    "zstandard": (b"\x28\xb5\x2f\xfd", False),
}
_SKIPPABLE_FRAMES = tuple(bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16))  # of zstandard

_NEW: dict[str, Callable[[], Any]] = {
    "gzip": lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES),
    "zstandard": lambda: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}),
}


class DamageError(Exception):
    """The content cannot be read further.

    Attributes:
        what: what is wrong, as the start of a clause of an error message.
        detail: its end.
    """

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(what, detail)
        self.what, self.detail = what, detail

    def after(self, place: str) -> str:
        """The reason, with the last `place` that could be read, e.g. "line 7"."""
        return f"{self.what} after {place}{self.detail}" if self.detail else self.what


class Content:
    """Decompressed content of a file, in blocks of up to `BLOCK_BYTES`; to be iterated once.

    Attributes:
        trailing: after the last block, what follows the compressed data in the file, as a clause; "" if nothing.

    Iteration raises DamageError when the data is truncated, damaged or not what `compression` says; what was yielded
    before is as it was compressed, unless a checksum at the end says otherwise.
    """

    def __init__(self, file: IO[bytes], compression: str) -> None:
        self._file, self._compression = file, compression
        self._from_start = file.tell() == 0
        self.trailing = ""

    def __iter__(self) -> Iterator[bytes]:
        blocks = self._decompressed() if self._compression else self._plain()
        block = next(blocks, b"")
        if self._from_start and content_of(block[:SNIFFED_BYTES]):
            raise DamageError(misnamed(block[:SNIFFED_BYTES], "text in UTF-8"))
        if block:
            yield block
            del block  # a block that is held is not reused for the next one
            yield from blocks

    def _plain(self) -> Iterator[bytes]:
        while block := self._file.read(BLOCK_BYTES):
            yield block

    def _decompressed(self) -> Iterator[bytes]:
        what = f"damaged {self._compression} data"
        data = self._file.read(_INPUT_BYTES)
        if not data:
            return  # an empty file has no documents
        start = self._file.tell() - len(data)
        if not self._starts(data):
            raise DamageError(misnamed(data[:SNIFFED_BYTES], self._compression))
        while data:
            decompressor = _NEW[self._compression]()
            delivered = 0
            while not decompressor.eof:
                try:
                    block = decompressor.decompress(data, BLOCK_BYTES)
                except _ERRORS as error:
                    yield from self._up_to_damage(start, delivered)
                    raise DamageError(what, f" ({error}); copy the file again") from None
                if block:
                    delivered += len(block)
                    yield block
                data = b""
                if decompressor.needs_input and not decompressor.eof:
                    data = self._file.read(_INPUT_BYTES)
                    if not data:
                        raise DamageError(what, ": the file ends too early, so it is incomplete; copy it again")
            data = decompressor.unused_data or self._file.read(_INPUT_BYTES)
            start = self._file.tell() - len(data)
            if not self._starts(data):
                return self._look_behind(data)

    def _starts(self, data: bytes) -> bool:
        """Whether `data` starts a stream, or is too short to tell."""
        starts = (_MAGIC[self._compression][0], *(_SKIPPABLE_FRAMES if self._compression == "zstandard" else ()))
        return any(data[: len(start)] == start[: len(data)] for start in starts)

    def _up_to_damage(self, start: int, delivered: int) -> Iterator[bytes]:
        """Yield what lies between the `delivered` bytes of the stream at `start` and the damage.

        A decompressor that fails keeps what it had decompressed so far, so this stream is read again in small steps.
        """
        self._file.seek(start)
        decompressor = _NEW[self._compression]()
        position = 0
        while not decompressor.eof:
            data = self._file.read(_CAREFUL_BYTES) if decompressor.needs_input else b""
            try:
                block = decompressor.decompress(data, _CAREFUL_BYTES)
            except _ERRORS:
                return
            position += len(block)
            if position > delivered:
                yield block[-(position - delivered) :]
                delivered = position
            if not data and not block:
                return

    def _look_behind(self, data: bytes) -> None:
        """Describe what follows the last stream, of which `data` is the start."""
        zeros, size = True, 0
        head = data[:SNIFFED_BYTES]
        while data:
            zeros, size = zeros and not data.strip(b"\x00"), size + len(data)
            data = self._file.read(_INPUT_BYTES)
        if size and not (zeros and _MAGIC[self._compression][1]):
            shown = "zeros" if zeros else content_of(head) or f"they start with {head[:8]!r}"
            self.trailing = (
                f"{size:,} bytes after the end of the {self._compression} data are not part of it ({shown}); the "
                "documents in front of them are complete: remove these bytes"
            )
