"""The on-disk format of a shard. No other module depends on its details.

A shard is a byte-compatible Megatron-LM indexed dataset plus a provenance table:

    train-00000.bin             token ids of all documents, concatenated, uint16 or int32, little endian
    train-00000.idx             "MMIDIDX" header, then length and byte offset of each document
    train-00000.docs.parquet    repository, path, licence and source of each document, in the same order

Source of the `.idx` layout: Megatron-LM, megatron/core/datasets/indexed_dataset.py:
    9 s magic, u64 version 1, u8 dtype code, u64 sequences, u64 documents + 1,
    int32 length [sequences] (tokens), int64 offset [sequences] (bytes), int64 first sequence [documents + 1].
We store one sequence per document; other software may store several, e.g. sentences.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.splits import SPLITS
from codeparrot_ds.errors import DataError
from codeparrot_ds.system.files import (
    FORMAT_VERSION,
    MANIFEST,
    digest_file,
    digest_json,
    dump_json,
    parse_manifest,
    start_write_back,
)
from codeparrot_ds.system.paths import Address, found_address, stored_address
from codeparrot_ds.system.storage import Directory, LocalDirectory, Scratch, open_directory

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# Megatron-LM's codes. Our shards have the types int32 and uint16.
_DTYPE_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
_UINT16_VOCAB_LIMIT = 65_500  # Megatron-LM's limit for 16-bit ids, below 65,536
_PROVENANCE = ("repository", "path", "licence", "source")
_WRITE_BACK_BYTES = 1 << 20
_ROW_GROUP, _ROW_GROUP_CHARACTERS = 4096, 1 << 24  # maximum documents and characters of provenance held in memory


def dtype_for(vocab_size: int) -> np.dtype:
    """The id type for a vocabulary size: uint16 if it fits, else int32."""
    return np.dtype("<u2") if vocab_size < _UINT16_VOCAB_LIMIT else np.dtype("<i4")


@dataclass(frozen=True)
class ShardInfo:
    """One shard's entry in the manifest: its counts, and the size and digest of each of its files.

    An adopted dataset may have both splits in the same files; `first_document` and `first_token` are the split's start.
    """

    name: str
    split: str
    documents: int
    tokens: int
    files: dict[str, dict[str, Any]]  # suffix -> {"bytes": int, "xxh3_128": str}
    first_document: int = 0
    first_token: int = 0


class ShardWriter:
    """Writes one shard into scratch files and hashes the ids as they are written.

    Attributes:
        files: after `finish`, final name -> scratch file, for `Directory.publish`.
    """

    def __init__(self, scratch: Scratch, name: str, split: str, dtype: np.dtype) -> None:
        self._scratch, self._name, self._split, self._dtype = scratch, name, split, dtype
        self._bin: BinaryIO = open(scratch.path(f"{name}.bin"), "wb")  # noqa: SIM115 (closed in close)
        self._digest = xxhash.xxh3_128()
        self._lengths = array("i")
        self._held: list[tuple[str, ...]] = []  # pending provenance rows, without texts
        self._held_characters = 0
        self._provenance: Any = None
        self._unflushed = 0  # bytes
        self.files: dict[str, Path] = {}

    def append(self, ids: np.ndarray, lengths: np.ndarray, documents: Sequence[Document]) -> None:
        """Add documents.

        Args:
            ids: concatenated ids, [tokens], of the shard's dtype.
            lengths: tokens of each document, [documents] int32.
            documents: their provenance.
        """
        assert ids.dtype == self._dtype and int(lengths.sum()) == len(ids)
        data = ids.view(np.uint8).data
        self._bin.write(data)
        self._digest.update(data)
        self._unflushed += len(data)
        if self._unflushed >= _WRITE_BACK_BYTES:
            start_write_back(self._bin)
            self._unflushed = 0
        self._lengths.frombytes(lengths.astype("<i4").tobytes())
        for document in documents:
            row = (document.repository, document.path, document.licence, document.source)
            self._held.append(row)
            self._held_characters += sum(map(len, row))
            if len(self._held) >= _ROW_GROUP or self._held_characters >= _ROW_GROUP_CHARACTERS:
                self._write_provenance()

    def close(self) -> None:
        """Close the files, whether or not the shard is finished."""
        self._bin.close()
        if self._provenance is not None:
            self._provenance.close()

    def finish(self) -> ShardInfo | None:
        """Write the index and return the manifest entry. None, with no files, if no document was added."""
        if not self._lengths:
            self.close()
            return None
        self._write_provenance()
        self.close()
        self._scratch.path(f"{self._name}.idx").write_bytes(self._index())
        paths = {suffix: self._scratch.path(f"{self._name}{suffix}") for suffix in (".bin", ".idx", ".docs.parquet")}
        files = {
            suffix: {
                "bytes": path.stat().st_size,
                "xxh3_128": self._digest.hexdigest() if suffix == ".bin" else digest_file(path),
            }
            for suffix, path in paths.items()
        }
        self.files = {f"{self._name}{suffix}": path for suffix, path in paths.items()}
        return ShardInfo(self._name, self._split, len(self._lengths), sum(self._lengths), files)

    def _index(self) -> bytes:
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
        offsets = np.concatenate([np.zeros(1, "<i8"), ends[:-1]])
        first_sequence = np.arange(len(lengths) + 1, dtype="<i8")
        header = _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[self._dtype.name], len(lengths), len(first_sequence))
        return header + lengths.tobytes() + offsets.tobytes() + first_sequence.tobytes()

    def _write_provenance(self) -> None:
        """Write the pending provenance as a row group."""
        if not self._held:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._provenance is None:
            schema = pa.schema([(name, pa.string()) for name in _PROVENANCE])
            path = self._scratch.path(f"{self._name}.docs.parquet")
            self._provenance = pq.ParquetWriter(path, schema, compression="zstd")
        columns = [_string_array(values) for values in zip(*self._held, strict=True)]
        self._provenance.write_batch(pa.RecordBatch.from_arrays(columns, list(_PROVENANCE)))
        self._held, self._held_characters = [], 0


def _string_array(values: Sequence[str]) -> Any:
    """Build a pyarrow string array without pa.array, which imports pandas: 0.2 s and 50 MB per worker."""
    import pyarrow as pa

    data = [value.encode() for value in values]
    bounds = np.cumsum([0, *map(len, data)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(data), pa.py_buffer(bounds), pa.py_buffer(b"".join(data)))


@dataclass(frozen=True)
class ShardIndex:
    """Content of a `.idx` file.

    Attributes:
        dtype: of the ids.
        lengths: tokens of each document, [documents] int64, without empty ones.
        empty: number of documents without a token.
        sequence_lengths: tokens of each sequence, [sequences] int32; a document is one or several.
        sequence_offsets: byte offset of each sequence, [sequences] int64.
    """

    dtype: np.dtype
    lengths: np.ndarray
    empty: int
    sequence_lengths: np.ndarray
    sequence_offsets: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    def is_contiguous(self) -> bool:
        """Whether each sequence starts where the previous one ends, and the first at 0."""
        ends = np.cumsum(self.sequence_lengths, dtype=np.int64) * self.dtype.itemsize
        offsets = self.sequence_offsets
        return bool(len(ends) == 0 or (offsets[0] == 0 and np.array_equal(offsets[1:], ends[:-1])))


def read_index(path: Path) -> ShardIndex:
    """Parse a `.idx` file. Raises DataError when it is not one, or is damaged."""
    return parse_index(path.read_bytes(), str(path))


def parse_index(data: bytes, path: str) -> ShardIndex:
    """Parse `data`, the content of the `.idx` file `path`. Raises DataError when it is not one, or is damaged."""
    if data.startswith(b"TNTIDX"):
        raise DataError(f"{path}: an index of an old format (TNTIDX). Preprocess the text again with Megatron-LM.")
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise DataError(f"{path}: not a Megatron-LM index (it does not start with {_MAGIC!r}).")
    _, version, code, sequences, documents = _HEADER.unpack_from(data)
    names = {number: name for name, number in _DTYPE_CODES.items()}
    if version != 1 or code not in names:
        raise DataError(
            f"{path}: index version {version} with dtype code {code} is not supported; must be version 1 with one of "
            f"{', '.join(_DTYPE_CODES)}."
        )
    expected = _HEADER.size + sequences * (4 + 8) + documents * 8
    if len(data) == expected + sequences and sequences:
        raise DataError(f"{path}: the index of a multimodal dataset, which is not supported.")
    if len(data) == _HEADER.size - 8 + sequences * (4 + 8):
        raise DataError(f"{path}: a fairseq index, which has no documents. Preprocess the text with Megatron-LM.")
    if len(data) != expected:
        raise DataError(f"{path}: {len(data):,} bytes; its header requires {expected:,}. Copy it again.")
    sequence_lengths = np.frombuffer(data, "<i4", sequences, _HEADER.size)
    offsets = np.frombuffer(data, "<i8", sequences, _HEADER.size + 4 * sequences)
    first_sequences = np.frombuffer(data, "<i8", documents, _HEADER.size + 12 * sequences)
    if (
        documents == 0
        or first_sequences[0] != 0
        or first_sequences[-1] != sequences
        or (np.diff(first_sequences) < 0).any()
        or (sequence_lengths < 0).any()
    ):
        raise DataError(f"{path}: its sequences cannot be divided into documents as it states. Copy it again.")
    ends = np.concatenate([[0], np.cumsum(sequence_lengths, dtype=np.int64)])
    lengths = np.diff(ends[first_sequences])
    full = lengths[lengths > 0]
    dtype = np.dtype(names[code]).newbyteorder("<")
    return ShardIndex(dtype, full, len(lengths) - len(full), sequence_lengths, offsets)


def read_provenance(data: bytes, path: str) -> list[Document]:
    """Provenance of a shard's documents in order, with empty texts. Raises DataError when the file is damaged.

    Args:
        data: content of the shard's `.docs.parquet`.
        path: name of that file, for error messages.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Use this thread only: a pyarrow thread that still references Python objects when the interpreter shuts down
        # aborts the process.
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        columns = table.read(list(_PROVENANCE), use_threads=False).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged provenance ({error}). Copy it again.") from None
    return [Document("", *row) for row in zip(*(columns[name] for name in _PROVENANCE), strict=True)]


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a finished shard directory.

    Attributes:
        directory: path or URL of the shard directory.
        vocab_size, eos_id, tokenizer_digest: of the tokenizer.
        dtype: of the ids, "uint16" or "int32".
        shards: manifest entries of the shards, in order.
        inputs: as given to `shards build`, or the adopted prefixes; in the file, a relative path is relative to the
            shard directory.
        valid_inputs: input that is for validation alone, likewise.
        sources: the input files, `{"name", "bytes"}` each, and "split" if it is for one split alone.
        options: the build options that determine the output bytes.
        documents: counts; "read" = "written" + "quarantined" + "empty".
        skipped_files: input files that were not read, counted by reason; `rejected.jsonl` names them.
    """

    directory: Address
    vocab_size: int
    eos_id: int
    tokenizer_digest: str
    dtype: str
    shards: tuple[ShardInfo, ...]
    inputs: list[str] = field(default_factory=list)
    valid_inputs: list[str] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)
    skipped_files: dict[str, int] = field(default_factory=dict)

    def split(self, name: str) -> tuple[ShardInfo, ...]:
        """The shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == name)

    def tokens(self, split: str) -> int:
        """Number of tokens in a split."""
        return sum(shard.tokens for shard in self.split(split))

    @property
    def digest(self) -> str:
        """Digest of all ids (from the shards' digests) and nothing else: equal for equal tokens in equal shards."""
        return digest_json([(s.split, s.files[".bin"]["xxh3_128"], s.first_token, s.tokens) for s in self.shards])

    @property
    def id_type(self) -> np.dtype:
        """The dtype of ids in `.bin` files."""
        return np.dtype(self.dtype).newbyteorder("<")

    def path(self, shard: ShardInfo, suffix: str) -> Path:
        """Path of one file of a local shard."""
        return Path(self.directory) / f"{shard.name}{suffix}"

    def write(self) -> None:
        """Write the manifest. Call this last: its presence marks the directory as finished."""
        valid_inputs = [stored_address(each, self.directory) for each in self.valid_inputs]
        body = {
            "format_version": FORMAT_VERSION,
            "kind": "shards",
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "tokenizer_digest": self.tokenizer_digest,
            "options": self.options,
            "documents": self.documents,
            "skipped_files": self.skipped_files,
            "tokens": {split: self.tokens(split) for split in SPLITS},
            "inputs": [stored_address(each, self.directory) for each in self.inputs],
            **({"valid_inputs": valid_inputs} if valid_inputs else {}),
            "sources": self.sources,
            "shards": [asdict(shard) for shard in self.shards],
        }
        open_directory(self.directory).write(MANIFEST, dump_json(body))

    @classmethod
    def read(cls, directory: Address) -> "Manifest":
        """Read a finished directory's manifest. Raises DataError."""
        store: Directory = open_directory(directory)
        path = f"{store}/{MANIFEST}"
        if not store.exists(MANIFEST):
            raise DataError(
                f"{path}: no such file, so there is no shards manifest here. Run `codeparrot-ds shards build` first."
            )
        body = parse_manifest(store.read(MANIFEST), path, "shards")
        try:
            return cls(
                directory=store.path if isinstance(store, LocalDirectory) else directory,
                shards=tuple(ShardInfo(**shard) for shard in body["shards"]),
                inputs=[found_address(each, directory) for each in body["inputs"]],
                skipped_files=body.get("skipped_files", {}),  # absent from shards of earlier versions
                valid_inputs=[found_address(each, directory) for each in body.get("valid_inputs", [])],
                **{
                    key: body[key]
                    for key in (
                        "vocab_size",
                        "eos_id",
                        "tokenizer_digest",
                        "dtype",
                        "sources",
                        "options",
                        "documents",
                    )
                },
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: incomplete manifest ({error}). Build the shards again.") from None
