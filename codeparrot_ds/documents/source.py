"""The text of a source file: Python in the encoding that it declares, everything else in UTF-8."""

import codecs
import io
import re
import tokenize

_PYTHON_SUFFIXES = (".py", ".pyi", ".pyw", ".pyx")
_PYTHON = re.compile(r"(?:c?python|py)[ _-]?(?:[23](?:\.\d+)*)?")  # "Python", "python3", "Python 3.11", "py"
NOT_UTF8 = "not UTF-8"
UNKNOWN_ENCODING = "unknown encoding"
CONTRADICTORY_ENCODING = "encoding contradicts the byte-order mark"
WRONG_ENCODING = "not in the encoding that it declares"
_ASCII = bytes(byte if byte < 128 else ord("?") for byte in range(256))
_NOT_FOR_SOURCE = {"punycode", "idna"}  # encodings of host names, which Python does not read files in


class EncodingError(ValueError):
    """A source file cannot be decoded.

    Attributes:
        reason: one of a few, so that they can be counted.
        detail: more about this file: the encoding, or the byte.
    """

    def __init__(self, reason: str, detail: str) -> None:
        """`reason` is one of the constants above."""
        super().__init__(f"{reason} ({detail})")
        self.reason, self.detail = reason, detail


def is_python(path: str, language: str = "") -> bool:
    """Whether a file is Python according to its suffix or to the language that is given for it, in any case."""
    return path.lower().endswith(_PYTHON_SUFFIXES) or _PYTHON.fullmatch(language.strip().lower()) is not None


def decode_source(data: bytes, path: str) -> str:
    """Decode the source file `path` with the content `data`.

    Python is decoded as the interpreter does (PEP 263): UTF-8 unless a comment in the first two lines names another
    encoding, without a byte-order mark. Line ends stay as they are.

    Raises EncodingError.
    """
    encoding = _declared(data) if is_python(path) else "utf-8"
    try:
        text = data.decode(encoding)
        text.encode()  # some encodings, such as unicode_escape, have lone surrogates
    except UnicodeError as error:
        if encoding in ("utf-8", "utf-8-sig") and isinstance(error, UnicodeDecodeError):
            raise EncodingError(NOT_UTF8, f"byte {error.start:,}: {error.reason}") from None
        raise EncodingError(WRONG_ENCODING, f"{encoding}: {getattr(error, 'reason', error)}") from None
    return text


def _declared(data: bytes) -> str:
    """The encoding that Python source declares. Raises EncodingError for one that Python would refuse."""
    # The interpreter accepts other bytes beside the declaration; `tokenize` would want them to be UTF-8.
    mark = data[:3] if data.startswith(codecs.BOM_UTF8) else b""
    lines = io.BytesIO(mark + data[len(mark) :].translate(_ASCII))
    try:
        encoding, read = tokenize.detect_encoding(lines.readline)
    except SyntaxError as error:
        said = str(error)
        if "unknown encoding" in said:
            raise EncodingError(UNKNOWN_ENCODING, said.rpartition(" ")[2]) from None
        lines.seek(len(mark))
        raise EncodingError(CONTRADICTORY_ENCODING, tokenize.detect_encoding(lines.readline)[0]) from None
    if encoding.startswith("utf-8"):
        return encoding
    try:
        # In UTF-16 and others, the declaration would not be what it is in this file; Python refuses them.
        if codecs.lookup(encoding).name in _NOT_FOR_SOURCE or read[-1].decode(encoding) != read[-1].decode("ascii"):
            raise EncodingError(WRONG_ENCODING, encoding)
    except LookupError:  # rot13, zlib: not an encoding of text
        raise EncodingError(UNKNOWN_ENCODING, encoding) from None
    except UnicodeError as error:
        raise EncodingError(WRONG_ENCODING, f"{encoding}: {getattr(error, 'reason', error)}") from None
    return encoding
