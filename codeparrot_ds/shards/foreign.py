"""Token files of other software: find the type of their ids, where their documents end, and what is wrong with them.

A Megatron-LM dataset states all of this in its index. A bare `.bin` file, as of nanoGPT, states nothing, so its type is
tested: ids of 2 bytes read as 4 or 8 are far beyond any vocabulary, so the widest type whose ids all fit is the right
one, and ids of 4 or 8 bytes are not taken for ids of 2 with the id 0 in between.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from codeparrot_ds.errors import ConfigError, DataError, list_problems
from codeparrot_ds.shards.format import ShardIndex, read_index
from codeparrot_ds.system.files import digest_file
from codeparrot_ds.tokenizer.encode import Encoder

_READ_BYTES = 1 << 23
_TEXT_BYTES = 1 << 12
_MIN_TEXT_BYTES = 32
_LISTED = 3  # datasets in a message
_TESTED_TYPES = ("<i8", "<f8", ">i8", "<i4", "<f4", ">i4", "<u2", ">u2")  # of a bare file, the widest first
_GIVEN_TYPES = {"uint16": "<u2", "int32": "<i4", "uint32": "<i4", "int64": "<i8"}
_IN_PLACE = ("uint16", "int32")

# First bytes of files that are no array of ids.
_OTHER_FILES = {
    b"\x1f\x8b\x08": "a gzip file: decompress it",
    b"\x28\xb5\x2f\xfd": "a zstd file: decompress it",
    b"\xfd7zXZ\x00": "an xz file: decompress it",
    b"BZh": "a bzip2 file: decompress it",
    b"PK\x03\x04": "a zip, NumPy .npz or PyTorch file: extract its array of ids",
    b"PAR1": "a parquet file: build shards from its text with `shards build`",
    b"ARROW1": "an Arrow file: build shards from its text with `shards build`",
    b"\x89HDF": "an HDF5 file: extract its array of ids",
    b"MMIDIDX": "a Megatron-LM index: name it PREFIX.idx, and its ids PREFIX.bin",
    b"TNTIDX": "an index of an old Megatron or fairseq format: preprocess the text again",
}
_LLM_C_HEADER_BYTES = 1024
_LLM_C_TYPES = {20240520: "<u2", 20240801: "<u4"}  # magic number of llm.c and modded-nanogpt -> type


class _Layout(NamedTuple):
    """How ids are stored: types that are possible, bytes before the first id, and what those are."""

    dtypes: Sequence[np.dtype]
    offset: int = 0
    header: str = ""


@dataclass(frozen=True)
class TokenFile:
    """A token file whose ids are all in the vocabulary.

    Attributes:
        prefix: its path without `.bin`.
        dtype: of the ids as stored.
        offset: bytes before the first id.
        header: name of what precedes the ids; empty if nothing does.
        first: ids before the first document: an end token that ends nothing.
        lengths: tokens of each document, [documents] int64, at least 1.
        ended: whether each document ends with the end token, [documents] bool.
        last_ids: ids that the other documents end with: all of them, but at most two.
        empty: documents without a token, which are left out of the above.
        files: suffix -> size and digest.
    """

    prefix: Path
    dtype: np.dtype
    offset: int
    header: str
    first: int
    lengths: np.ndarray
    ended: np.ndarray
    last_ids: list[int]
    empty: int
    files: dict[str, dict[str, int | str]]

    @property
    def data(self) -> Path:
        """The `.bin` file."""
        return _with_suffix(self.prefix, ".bin")

    @property
    def has_index(self) -> bool:
        """Whether the documents are those of an index."""
        return ".idx" in self.files

    @property
    def type_name(self) -> str:
        """The type of the ids in words."""
        return _name(self.dtype)

    def obstacle(self) -> str:
        """Why the file cannot be used in place; empty if it can."""
        if self.header:
            return f"starts with {self.header}, which training would read as ids"
        if self.type_name not in _IN_PLACE:
            return f"its ids are {self.type_name}, but only {' and '.join(_IN_PLACE)} can be used in place"
        return ""

    def ids(self) -> np.ndarray:
        """The ids of all documents, [tokens], a memory map."""
        return np.memmap(self.data, self.dtype, "r", self.offset + self.first * self.dtype.itemsize)


def open_tokens(prefix: Path, encoder: Encoder, dtype: str | None = None) -> TokenFile:
    """Read a whole dataset: find its type and documents, compute digests, and check the range of the ids.

    Args:
        prefix: `PREFIX.bin` with `PREFIX.idx` is a Megatron-LM dataset; without, a bare array of ids.
        encoder: the tokenizer that produced the ids.
        dtype: type of the ids, "uint16", "int32", "uint32" or "int64"; tested by default.

    Raises:
        ConfigError: `dtype` is none of these, or not that of the index.
        DataError: files are missing or damaged, are no ids of this tokenizer, may be of several types, or contain no
            document.
    """
    if dtype is not None and dtype not in _GIVEN_TYPES:
        raise ConfigError(f"dtype {dtype!r}: must be one of {', '.join(_GIVEN_TYPES)}.")
    data, index = _with_suffix(prefix, ".bin"), _with_suffix(prefix, ".idx")
    if not data.is_file():
        raise DataError(
            f"{data}: no such file. Expected PREFIX.bin and, for Megatron-LM, PREFIX.idx.{_longer_prefixes(prefix)}"
        )
    size = data.stat().st_size
    if not size:
        raise DataError(f"{data}: empty. Copy it again.")
    layout = None
    if index.is_file():
        layout = read_index(index)
        if dtype is not None and np.dtype(_GIVEN_TYPES[dtype]) != layout.dtype:
            raise ConfigError(f"{index}: states {layout.dtype} ids, not {dtype}. Omit --dtype.")
        if size != layout.tokens * layout.dtype.itemsize:
            expected = layout.tokens * layout.dtype.itemsize
            raise DataError(
                f"{data}: {size:,} bytes; expected {expected:,} of {layout.dtype} by its index. Copy both again."
            )
        if not layout.is_contiguous():
            raise DataError(f"{index}: its documents are not contiguous in the .bin file, which is not supported.")
        stored = _Layout([layout.dtype])
    else:
        stored = _sniff(data, size, dtype)
    readings, digest = _read(data, stored, encoder, layout)
    reading = readings[0] if layout is not None else _choose(data, readings, encoder)
    if reading.wrong is not None:
        raise DataError(
            f"{data}: contains id {reading.wrong:,}, but the tokenizer has only {encoder.vocab_size:,} ids. The file "
            "was built with another tokenizer: name that one with --tokenizer."
        )
    if reading.capacity < encoder.vocab_size and dtype is None:
        fix = (
            " Convert the ids again, or if all of them are right, give --dtype uint16."
            if reading.capacity == 1 << 16
            else ""
        )
        raise DataError(
            f"{data}: its ids are {_name(reading.dtype)}, which cannot hold the tokenizer's {encoder.vocab_size:,} "
            f"ids: larger ones were cut, or the file was built with another tokenizer.{fix}"
        )
    files: dict[str, dict[str, int | str]] = {".bin": {"bytes": size, "xxh3_128": digest}}
    if layout is not None:
        files[".idx"] = {"bytes": index.stat().st_size, "xxh3_128": digest_file(index)}
        ended, lengths, first, empty = np.concatenate(reading.ended), layout.lengths, 0, layout.empty
    else:
        first, lengths, ended = _separate(data, reading, encoder)
        empty = first
    return TokenFile(
        prefix,
        reading.dtype,
        stored.offset,
        stored.header,
        first,
        lengths,
        ended,
        sorted(reading.last_ids),
        empty,
        files,
    )


def _longer_prefixes(prefix: Path) -> str:
    """The datasets that were probably meant: Megatron-LM adds `_text_document` to its --output-prefix."""
    if not prefix.parent.is_dir():
        return ""
    found = sorted(path.with_suffix("") for path in prefix.parent.glob(f"{escape(prefix.name)}*.bin"))
    return f" Did you mean {' or '.join(map(str, found[:_LISTED]))}?" if found else ""


def _sniff(data: Path, size: int, dtype: str | None) -> _Layout:
    """How a file without an index may be stored. Raises DataError for what is no array of ids."""
    with open(data, "rb") as file:
        head = file.read(_TEXT_BYTES)
    magic = int.from_bytes(head[:4], "little")
    if head.startswith(b"\x93NUMPY"):
        return _numpy_layout(data)
    if magic in _LLM_C_TYPES and size >= _LLM_C_HEADER_BYTES:
        found, stated = np.dtype(_LLM_C_TYPES[magic]), int.from_bytes(head[8:12], "little")
        stored = (size - _LLM_C_HEADER_BYTES) // found.itemsize
        if stored != stated or not stored:
            raise DataError(
                f"{data}: has {stored:,} tokens after an llm.c header that states {stated:,}. Copy it again."
            )
        return _Layout([found], _LLM_C_HEADER_BYTES, "an llm.c header")
    if dtype is not None:
        return _Layout([np.dtype(_GIVEN_TYPES[dtype])])
    for start, what in _OTHER_FILES.items():
        if head.startswith(start):
            raise DataError(f"{data}: this is {what}.")
    if len(head) >= _MIN_TEXT_BYTES and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        raise DataError(f"{data}: this is text, not an array of ids. Build shards from text with `shards build`.")
    return _Layout([np.dtype(name) for name in _TESTED_TYPES])


def _numpy_layout(data: Path) -> _Layout:
    try:
        array = np.load(data, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{data}: a damaged NumPy array ({error}). Copy it again.") from None
    if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
        raise DataError(
            f"{data}: a NumPy array of {array.dtype}, shape {array.shape}; must be integers in one dimension."
        )
    return _Layout([array.dtype], array.offset, "a NumPy header")


class _Reading:
    """What a file contains if its ids are of one type."""

    def __init__(self, dtype: np.dtype, encoder: Encoder) -> None:
        self.dtype, self._eos_id, self._vocab_size = dtype, encoder.eos_id, encoder.vocab_size
        # Ids that fit; 2^53 for float64, and so on, which no vocabulary reaches.
        self.capacity = int(np.iinfo(dtype).max) + 1 if dtype.kind in "iu" else 1 << 24
        self.tokens = 0
        self.wrong: int | None = None  # the first id outside the vocabulary
        self.first_id: int | None = None
        self.ends: list[np.ndarray] = []  # one past each end token
        self.ended: list[np.ndarray] = []  # of the documents of an index
        self.last_ids: set[int] = set()

    @property
    def end_tokens(self) -> int:
        """Number of end tokens."""
        return sum(map(len, self.ends))

    def feed(self, block: np.ndarray, bounds: np.ndarray | None) -> None:
        """Take the next ids. `bounds`: one past the last of each document of the index that ends among them."""
        if self.wrong is not None or not len(block):
            return
        if block.dtype.kind == "f":
            whole = np.isfinite(block) & (block == np.floor(block)) & (np.abs(block) < 1 << 53)
            if not whole.all():
                self.wrong = -1
                return
        smallest, largest = int(block.min()), int(block.max())
        if not 0 <= smallest <= largest < self._vocab_size:
            self.wrong = smallest if smallest < 0 else largest
            return
        if self.first_id is None:
            self.first_id = int(block[0])
        if bounds is None:
            self.ends.append(np.flatnonzero(block == self._eos_id) + self.tokens + 1)
        else:
            last = block[bounds - self.tokens - 1]
            self.ended.append(last == self._eos_id)
            if len(self.last_ids) < 2:
                self.last_ids.update(np.unique(last[last != self._eos_id])[:2].tolist())
        self.tokens += len(block)


def _read(data: Path, stored: _Layout, encoder: Encoder, layout: ShardIndex | None) -> tuple[list[_Reading], str]:
    """Read a file as each of its possible types, and compute its digest."""
    readings = [_Reading(dtype, encoder) for dtype in stored.dtypes]
    bounds = np.cumsum(layout.lengths, dtype=np.int64) if layout is not None else None
    digest = xxhash.xxh3_128()
    with open(data, "rb") as file:
        digest.update(file.read(stored.offset))
        while block := file.read(_READ_BYTES):
            digest.update(block)
            for reading in readings:
                count = len(block) // reading.dtype.itemsize
                among = None
                if bounds is not None:
                    inside = np.searchsorted(bounds, [reading.tokens, reading.tokens + count], side="right")
                    among = bounds[inside[0] : inside[1]]
                reading.feed(np.frombuffer(block, reading.dtype, count), among)
    return readings, digest.hexdigest()


def _choose(data: Path, readings: Sequence[_Reading], encoder: Encoder) -> _Reading:
    """The reading of a bare file that is right. Raises DataError if several may be, or the file ends inside an id."""
    possible = [reading for reading in readings if reading.wrong is None and reading.tokens]
    if not possible:
        return max(readings, key=lambda reading: (reading.tokens * reading.dtype.itemsize, -reading.dtype.itemsize))
    chosen = possible[0]
    if not chosen.end_tokens and any(reading.end_tokens for reading in possible):
        seen = [f"{_name(r.dtype)}, with {r.end_tokens:,} end tokens (id {encoder.eos_id})" for r in possible]
        raise DataError(
            list_problems(
                f"{data}: its ids may be of several types",
                seen,
                f"Name the right one: --dtype {' or '.join(_given(r) for r in possible if _given(r))}.",
            )
        )
    if size_left := data.stat().st_size % chosen.dtype.itemsize:
        raise DataError(
            f"{data}: its ids are {_name(chosen.dtype)}, but {size_left} bytes are left after the last. Copy it again."
        )
    return chosen


def _given(reading: _Reading) -> str:
    """The value of --dtype for a reading; empty if there is none."""
    return next((name for name, dtype in _GIVEN_TYPES.items() if np.dtype(dtype) == reading.dtype), "")


def _separate(data: Path, reading: _Reading, encoder: Encoder) -> tuple[int, np.ndarray, np.ndarray]:
    """Separate the documents of a bare file at its end tokens.

    Returns:
        Ids before the first document, tokens of each document [documents] int64, whether each is ended [documents].
    """
    bounds = np.concatenate(reading.ends) if reading.ends else np.empty(0, np.int64)
    if len(bounds) == 0:
        raise DataError(
            f"{data}: contains no end token (id {encoder.eos_id}), so its documents cannot be separated. It was built "
            "with another tokenizer, or without end tokens; or it is from Megatron-LM, and its .idx is missing."
        )
    whole = bool(bounds[-1] == reading.tokens)
    if not whole:
        bounds = np.append(bounds, reading.tokens)
    # Some tools write the token in front of each document instead. The first then ends nothing.
    first = int(not whole and reading.first_id == encoder.eos_id)
    lengths = np.diff(bounds, prepend=0)[first:]
    ended = np.ones(len(lengths), bool)
    ended[-1] = whole
    return first, lengths, ended


def _name(dtype: np.dtype) -> str:
    """The type in words."""
    if dtype.kind == "u" and dtype.itemsize > 2:  # no vocabulary reaches the last bit, so the bytes are the same
        dtype = np.dtype(f"{dtype.byteorder}i{dtype.itemsize}")
    return f"big-endian {dtype.name}" if dtype.byteorder == ">" else dtype.name


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def batches(lengths: np.ndarray, tokens: int) -> Iterator[slice]:
    """Yield consecutive ranges of documents of up to `tokens` tokens, at least one document each."""
    ends = np.cumsum(lengths, dtype=np.int64)
    start = 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + tokens, side="right")))
        yield slice(start, stop)
        start = stop
