"""Packed sequences of equal length, read from memory-mapped shards."""

import ctypes
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from codeparrot_ds.documents.splits import SPLITS
from codeparrot_ds.errors import DataError
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.shards.order import BlendedOrder, Order
from codeparrot_ds.shards.verify import verify
from codeparrot_ds.system.files import digest_json
from codeparrot_ds.system.paths import Address


class PackedSequences:
    """The concatenated shards of one split, cut into sequences.

    Sequence i is tokens i * seq_len .. (i + 1) * seq_len inclusive: seq_len inputs, and the same shifted by one as
    targets. Adjacent sequences share one token, so every token except the first of the split is a target exactly once.
    Only a tail shorter than one sequence is unused, regardless of the number of shards.
    """

    def __init__(self, manifest: Manifest, split: str, seq_len: int) -> None:
        """Memory-map the shards of `split`. Raises DataError when they contain less than one sequence."""
        shards = manifest.split(split)
        self.manifest, self.seq_len = manifest, seq_len
        _allow_open_files(len(shards))
        self._ids = [
            np.memmap(manifest.path(shard, ".bin"), manifest.id_type, "r").view(np.ndarray)[
                shard.first_token : shard.first_token + shard.tokens
            ]
            for shard in shards
        ]
        self._starts = np.concatenate([[0], np.cumsum([len(ids) for ids in self._ids])]).astype(np.int64)
        self._count = max(0, (int(self._starts[-1]) - 1) // seq_len)
        if self._count == 0:
            raise DataError(
                f"{manifest.directory}: the {split} split has {int(self._starts[-1]):,} tokens, fewer than one "
                f"sequence of {seq_len:,} + 1. Build shards from more documents"
                + (", or raise --valid-fraction; 0 is for no validation." if split == "valid" else ".")
            )
        self._windows, self._origins = _windows_over(self._ids, seq_len + 1)

    @classmethod
    def open(cls, directory: Address, split: str, seq_len: int) -> "PackedSequences":
        """Open `directory` after checking the sizes of its files. Raises DataError."""
        return cls(verify(directory), split, seq_len)

    def __len__(self) -> int:
        return self._count

    def __reduce__(self) -> Any:
        raise TypeError("memory maps cannot be pickled: open the shards again in the other process")

    def read(self, i: int) -> np.ndarray:
        """Sequence i, [seq_len + 1] ids; a view into the memory map unless it spans two shards.

        Raises IndexError past the last complete sequence.
        """
        if not 0 <= i < self._count:
            raise IndexError(f"sequence {i} of {self._count}")
        start, end = i * self.seq_len, (i + 1) * self.seq_len + 1
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        while start < end:
            first = int(self._starts[shard])
            stop = min(end, int(self._starts[shard + 1]))
            pieces.append(self._ids[shard][start - first : stop - first])
            start, shard = stop, shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def batch(self, numbers: np.ndarray) -> np.ndarray:
        """Sequences `numbers`, [n], as [n, seq_len + 1] int64. Raises IndexError past the last complete sequence."""
        numbers = np.asarray(numbers, np.int64)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= self._count):
            raise IndexError(f"sequences {numbers.min()} to {numbers.max()} of {self._count}")
        starts = numbers * self.seq_len
        if len(self._ids) == 1:
            return self._windows[starts + self._origins[0]].astype(np.int64)
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        inside = starts + self.seq_len < self._starts[shards + 1]
        if inside.all():
            return self._windows[starts + self._origins[shards]].astype(np.int64)
        out = np.empty((len(numbers), self.seq_len + 1), np.int64)
        out[inside] = self._windows[(starts + self._origins[shards])[inside]]
        for row in np.flatnonzero(~inside):
            out[row] = self.read(int(numbers[row]))
        return out


class ConcatenatedSequences:
    """The packed sequences of one or more shard directories, numbered consecutively across directories."""

    def __init__(self, parts: Sequence[PackedSequences], seq_len: int) -> None:
        self.parts = list(parts)
        self.seq_len = seq_len
        self._ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.parts else 0

    def batch(self, numbers: np.ndarray) -> np.ndarray:
        """Sequences `numbers`, [n], as [n, seq_len + 1] int64. Raises IndexError past the last one."""
        if len(self.parts) == 1:
            return self.parts[0].batch(numbers)
        numbers = np.asarray(numbers, np.int64)
        out = np.empty((len(numbers), self.seq_len + 1), np.int64)
        which = np.searchsorted(self._ends, numbers, side="right")
        for i in np.unique(which):
            if i == len(self.parts):
                raise IndexError(f"sequence {numbers.max()} of {len(self)}")
            here = which == i
            out[here] = self.parts[i].batch(numbers[here] - (self._ends[i] - len(self.parts[i])))
        return out


@dataclass(frozen=True)
class Dataset:
    """The data of a run: the shards of one directory, or of several with weights.

    Attributes:
        manifests: manifest of each directory.
        weights: training weight of each directory; any positive numbers.
        train, valid: sequences of all directories; validation ignores the weights, and may have none.
    """

    manifests: list[Manifest]
    weights: list[float]
    train: ConcatenatedSequences
    valid: ConcatenatedSequences

    @classmethod
    def open(cls, sources: Mapping[Path, float], seq_len: int) -> "Dataset":
        """Open shard directories (path -> weight) after checking the sizes of all files.

        Raises DataError when one is damaged, too small, or built with a different tokenizer than the first.
        """
        manifests = [verify(directory) for directory in sources]
        for manifest in manifests:
            if manifest.tokenizer_digest != manifests[0].tokenizer_digest:
                raise DataError(
                    f"{manifest.directory}: built with a different tokenizer than {manifests[0].directory}. "
                    "Build both with the same one."
                )
        train, valid = (
            ConcatenatedSequences(
                [PackedSequences(m, split, seq_len) for m in manifests if split == "train" or m.split(split)], seq_len
            )
            for split in SPLITS
        )
        return cls(manifests, list(sources.values()), train, valid)

    def require_valid(self) -> ConcatenatedSequences:
        """The validation sequences. Raises DataError when there are none."""
        if not len(self.valid):
            listed = ", ".join(str(manifest.directory) for manifest in self.manifests)
            raise DataError(
                f"{listed}: has no validation split. Build shards with --valid-input or a --valid-fraction above 0; "
                "to train without validation, set evaluation.sequences=0."
            )
        return self.valid

    @property
    def eos_id(self) -> int:
        """Id of the token that ends each document."""
        return self.manifests[0].eos_id

    @property
    def digest(self) -> str:
        """Digest of all ids, and of the weights if there are several directories."""
        if len(self.manifests) == 1:
            return self.manifests[0].digest
        return digest_json([[m.digest, str(w)] for m, w in zip(self.manifests, self.weights, strict=True)])

    def order(self, seed: int) -> Order | BlendedOrder:
        """The order of the training sequences."""
        if len(self.manifests) == 1:
            return Order(len(self.train), seed)
        return BlendedOrder([len(part) for part in self.train.parts], self.weights, seed)


def _allow_open_files(more: int) -> None:
    """Raise this process's open-file limit if `more` files would exceed it: each memory map keeps one open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = more + 512 + soft // 2
    if soft != resource.RLIM_INFINITY and wanted > soft:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def _windows_over(arrays: list[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """One strided array over all memory maps, and the offset of each map in it, so that a batch is a single gather.

    Row i of the first result, [?, width], is the `width` ids starting at id i, counted from the lowest address of any
    map. The memory between the maps is not ours: only rows inside a map may be read. Add the second result, [arrays]
    int64, to an id's global index to get its row.
    """
    itemsize = arrays[0].itemsize
    addresses = np.array([array.ctypes.data for array in arrays], np.int64)
    lowest = int(addresses.min())
    span = max(int(address) + array.nbytes for address, array in zip(addresses, arrays, strict=True)) - lowest
    memory = (ctypes.c_char * span).from_address(lowest)
    everything = np.frombuffer(memoryview(memory), arrays[0].dtype)
    rows = max(0, len(everything) - width + 1)
    windows = np.lib.stride_tricks.as_strided(everything, (rows, width), (itemsize, itemsize), writeable=False)
    starts = np.concatenate([[0], np.cumsum([len(array) for array in arrays])[:-1]])
    return windows, ((addresses - lowest) // itemsize - starts).astype(np.int64)


def batch_digest(ids: np.ndarray) -> int:
    """64-bit digest of the ids actually fed, [sequences, seq_len + 1]: the sum of each sequence's digest.

    A sum modulo 2^64 does not depend on how sequences are distributed over ranks and micro-batches, so the digests of
    two runs can be compared at any world size.
    """
    rows = np.ascontiguousarray(ids, dtype="<i8")
    return sum(xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows) & 0xFFFF_FFFF_FFFF_FFFF
