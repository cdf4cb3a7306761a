"""The bytes of a shard, and the only module that knows them.

A shard is Megatron-LM's indexed dataset, byte for byte, and a table of provenance:

    train-00000.bin             token ids of all documents, end to end, uint16 or int32, little endian
    train-00000.idx             "MMIDIDX" header, then per document its length and its byte offset
    train-00000.docs.parquet    repository, path, licence and source of each document, in the same order

Source of the `.idx` layout: Megatron-LM, megatron/core/datasets/indexed_dataset.py:
    9 s magic, u64 version 1, u8 dtype code, u64 sequences, u64 documents + 1,
    int32 length [sequences] (tokens), int64 offset [sequences] (bytes), int64 first sequence [documents + 1].
We store one sequence a document.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from codeparrot_ds.corpus.documents import Document
from codeparrot_ds.errors import DataError
from codeparrot_ds.files import (
    FORMAT_VERSION,
    MANIFEST,
    digest_file,
    digest_json,
    flush_to_disk,
    read_manifest,
    write_json,
)

SPLITS = ("train", "valid")
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES = {"int32": 4, "uint16": 8}  # Megatron-LM's numbers
_UINT16_VOCAB_LIMIT = 65_500  # Megatron-LM's own bound for 16-bit ids, below 65,536
_DOCS_SCHEMA = ("repository", "path", "licence", "source")


def dtype_for(vocab_size: int) -> np.dtype:
    """The id type of a vocabulary: uint16 while it fits, else int32."""
    return np.dtype("<u2") if vocab_size < _UINT16_VOCAB_LIMIT else np.dtype("<i4")


@dataclass(frozen=True)
class ShardInfo:
    """One shard's entry in the manifest: its counts, and size and digest of each of its files."""

    name: str
    split: str
    documents: int
    tokens: int
    files: dict[str, dict[str, Any]]  # suffix -> {"bytes": int, "xxh3_128": str}


class ShardWriter:
    """Writes one shard; digests are computed while writing. Files are whole or absent under their names."""

    def __init__(self, directory: Path, name: str, split: str, dtype: np.dtype) -> None:
        self._directory, self._name, self._split, self._dtype = directory, name, split, dtype
        self._bin: BinaryIO = open(self._temporary(".bin"), "wb")  # noqa: SIM115 (closed in finish or discard)
        self._digest = xxhash.xxh3_128()
        self._lengths: list[int] = []
        self._documents: list[tuple[str, str, str, str]] = []

    def _temporary(self, suffix: str) -> Path:
        return self._directory / f".{self._name}{suffix}.tmp"

    def append(self, ids: np.ndarray, document: Document) -> None:
        """Add one document: `ids` [tokens] integers ending in EOS, all within the vocabulary."""
        data = ids.astype(self._dtype).tobytes()
        self._bin.write(data)
        self._digest.update(data)
        self._lengths.append(len(ids))
        self._documents.append((document.repository, document.path, document.licence, document.source))

    def discard(self) -> None:
        """Close and remove what was written."""
        self._bin.close()
        self._temporary(".bin").unlink(missing_ok=True)

    def finish(self) -> ShardInfo | None:
        """Flush, index and publish the shard. None, and no files, when no document was added."""
        if not self._lengths:
            self.discard()
            return None
        self._bin.flush()
        os.fsync(self._bin.fileno())
        size = self._bin.tell()
        self._bin.close()
        files = {".bin": {"bytes": size, "xxh3_128": self._digest.hexdigest()}}
        index = self._index()
        self._temporary(".idx").write_bytes(index)
        self._write_provenance(self._temporary(".docs.parquet"))
        for suffix in (".idx", ".docs.parquet"):
            path = self._temporary(suffix)
            files[suffix] = {"bytes": path.stat().st_size, "xxh3_128": digest_file(path)}
            flush_to_disk(path)
        for suffix in files:
            self._temporary(suffix).replace(self._directory / f"{self._name}{suffix}")
        flush_to_disk(self._directory)
        return ShardInfo(self._name, self._split, len(self._lengths), sum(self._lengths), files)

    def _index(self) -> bytes:
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
        offsets = np.concatenate([np.zeros(1, "<i8"), ends[:-1]])
        first_sequence = np.arange(len(lengths) + 1, dtype="<i8")
        header = _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[self._dtype.name], len(lengths), len(first_sequence))
        return header + lengths.tobytes() + offsets.tobytes() + first_sequence.tobytes()

    def _write_provenance(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = zip(*self._documents, strict=True)
        table = pa.table(
            {key: pa.array(column, pa.string()) for key, column in zip(_DOCS_SCHEMA, columns, strict=True)}
        )
        pq.write_table(table, path, compression="zstd")


@dataclass(frozen=True)
class ShardIndex:
    """What a `.idx` file says. lengths: [documents] int32, tokens. offsets: [documents] int64, bytes."""

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray


def read_index(path: Path) -> ShardIndex:
    """Parse one `.idx` file. Raises DataError when it is not one, or is cut short."""
    data = path.read_bytes()
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise DataError(f"{path}: not a Megatron-LM index (it does not start with {_MAGIC!r}).")
    _, version, code, sequences, documents = _HEADER.unpack_from(data)
    names = {number: name for name, number in _DTYPE_CODES.items()}
    if version != 1 or code not in names:
        raise DataError(f"{path}: index version {version}, dtype code {code}; version 1 with uint16 or int32 is read.")
    expected = _HEADER.size + sequences * (4 + 8) + documents * 8
    if len(data) != expected:
        raise DataError(f"{path}: {len(data):,} bytes, its header asks for {expected:,}. Copy it again.")
    lengths = np.frombuffer(data, "<i4", sequences, _HEADER.size)
    offsets = np.frombuffer(data, "<i8", sequences, _HEADER.size + 4 * sequences)
    return ShardIndex(np.dtype(names[code]).newbyteorder("<"), lengths, offsets)


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a finished shard directory."""

    directory: Path
    vocab_size: int
    eos_id: int
    tokenizer_digest: str
    corpus: str
    corpus_digest: str
    options: dict[str, Any]
    shards: tuple[ShardInfo, ...]
    dtype: str

    def split(self, name: str) -> tuple[ShardInfo, ...]:
        """The shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == name)

    def tokens(self, split: str) -> int:
        """Number of tokens in a split."""
        return sum(shard.tokens for shard in self.split(split))

    @property
    def digest(self) -> str:
        """Digest of the digests of all ids, and of nothing else: equal for equal tokens in equal shards."""
        return digest_json([(shard.split, shard.files[".bin"]["xxh3_128"]) for shard in self.shards])

    def write(self) -> None:
        """Publish: written last, so that its presence says the directory is finished."""
        body = {
            "format_version": FORMAT_VERSION,
            "kind": "shards",
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "tokenizer_digest": self.tokenizer_digest,
            "corpus": self.corpus,
            "corpus_digest": self.corpus_digest,
            "options": self.options,
            "tokens": {split: self.tokens(split) for split in SPLITS},
            "documents": {split: sum(s.documents for s in self.split(split)) for split in SPLITS},
            "shards": [
                {
                    "name": s.name,
                    "split": s.split,
                    "documents": s.documents,
                    "tokens": s.tokens,
                    "files": s.files,
                }
                for s in self.shards
            ],
        }
        write_json(self.directory / MANIFEST, body)

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read a finished directory's manifest. Raises DataError."""
        path = directory / MANIFEST
        body = read_manifest(directory, "shards", "codeparrot-ds shards build")
        try:
            return cls(
                directory=directory,
                vocab_size=body["vocab_size"],
                eos_id=body["eos_id"],
                tokenizer_digest=body["tokenizer_digest"],
                corpus=body["corpus"],
                corpus_digest=body["corpus_digest"],
                options=body["options"],
                shards=tuple(ShardInfo(**shard) for shard in body["shards"]),
                dtype=body["dtype"],
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: incomplete manifest ({error}). Build the shards again.") from None
