"""Members of zip archives: listed without extracting, and read one at a time."""

import io
import lzma
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, cast

from codeparrot_ds.documents.formats import SNIFFED_BYTES, content_of, misnamed

_BUFFER_BYTES = 1 << 20
_ENCRYPTED = 0x1  # flag of a member
_MAX_MEMBERS = 1_000_000
_MAX_COMPRESSION_RATIO = 100  # ratio of a member that must be extracted to disk; parquet is already compressed
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
MEMBER_ERRORS: Any = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
        name: its path in the archive.
        size: bytes when extracted.
        checksum: CRC-32 of its content, in hex.
        refusal: why it cannot be read, or "".
    """

    name: str
    size: int
    checksum: str
    refusal: str


def list_members(file: IO[bytes]) -> list[Member]:
    """The files in a zip archive, in its order. Raises ValueError with the reason if they cannot be listed."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (*MEMBER_ERRORS, ValueError, UnicodeDecodeError) as error:
        file.seek(0)
        head = file.read(SNIFFED_BYTES)
        if content_of(head) != "zip":
            raise ValueError(misnamed(head, "zip")) from None
        raise ValueError(f"damaged zip archive ({error}); copy the file again") from None
    if len(infos) > _MAX_MEMBERS:
        raise ValueError(f"{len(infos):,} members; the limit is {_MAX_MEMBERS:,}: extract it")
    (name, count), *_ = Counter(info.filename for info in infos).most_common(1) or [("", 0)]
    if count > 1:
        raise ValueError(f"two members are named {name!r}: extract it, and rename one")
    return [Member(info.filename, info.file_size, f"{info.CRC:08x}", _refusal(info)) for info in infos]


def _refusal(info: zipfile.ZipInfo) -> str:
    name = info.filename.lower()
    if info.flag_bits & _ENCRYPTED:
        return "encrypted"
    if info.compress_type not in _METHODS:
        return f"compressed by zip method {info.compress_type}, which is not supported"
    if name.endswith(".parquet") and info.file_size > _MAX_COMPRESSION_RATIO * max(info.compress_size, 1):
        return f"more than {_MAX_COMPRESSION_RATIO} times as large when extracted"
    return ""


@contextmanager
def open_member(file: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    """Open a member of the archive `file` for reading and seeking. Reading raises `MEMBER_ERRORS` when damaged."""
    with zipfile.ZipFile(io.BufferedReader(cast(Any, file), _BUFFER_BYTES)) as archive, archive.open(name) as member:
        if not name.lower().endswith(".parquet"):
            yield member
            return
        with tempfile.TemporaryFile(prefix="codeparrot-ds-") as extracted:  # parquet is read from its end
            while block := member.read(_BUFFER_BYTES):
                extracted.write(block)
            extracted.seek(0)
            yield cast(IO[bytes], extracted)
