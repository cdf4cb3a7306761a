"""What the first step of `corpus clean` finds out about each document, as files that the later steps read.

Each task writes one directory: arrays with a row per document, in input order, and an Arrow table with the names.
Documents are numbered over all tasks in this order.
"""

import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.corpus.near_duplicates import Signatures

EMPTY = "empty"
MEASURED_FORMAT = 2  # of these files: work in progress of a release with another format is not continued
_INFO, _NAMES = "info.json", "names.arrow"
_KEYS, _SETS = "keys.u64", "sets.u64"  # without a header: parts of them are read


@dataclass(frozen=True)
class Found:
    """A document as the first step found it.

    Attributes:
        digest: xxh3-128 of its text.
        bare_digest: xxh3-128 of its text without white space.
        text_bytes: size of its text as UTF-8.
        path: path of its file in the repository.
        repository: name of its repository.
        reason: rule that removes it; "" for none.
        value: what made the rule apply.
    """

    digest: bytes
    bare_digest: bytes
    text_bytes: int
    path: str
    repository: str
    reason: str
    value: str


def write_measured(directory: Path, found: Sequence[Found], signatures: Signatures, info: dict[str, Any]) -> None:
    """Atomically write a task's directory; two copies of a task may do so at the same time.

    Args:
        directory: to create.
        found: all documents of the task.
        signatures: of the documents without a reason, in the same order.
        info: facts about the task as a whole.
    """
    import pyarrow as pa

    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir(parents=True)
    kept = np.array([not each.reason for each in found], bool)
    arrays = {
        "digest": np.frombuffer(b"".join(each.digest for each in found), ">u8").reshape(-1, 2).astype(np.uint64),
        "bare_digest": np.frombuffer(b"".join(each.bare_digest for each in found), ">u8")
        .reshape(-1, 2)
        .astype(np.uint64),
        "text_bytes": np.array([each.text_bytes for each in found], np.int64),
        "kept": kept,
        "empty": np.array([each.reason == EMPTY for each in found], bool),
        "row": np.cumsum(kept, dtype=np.int64) - 1,  # in the signatures
        "ends": signatures.ends,
    }
    for name, array in arrays.items():
        np.save(temporary / f"{name}.npy", array)
    signatures.keys.tofile(temporary / _KEYS)
    signatures.sets.tofile(temporary / _SETS)
    columns = ("path", "repository", "reason", "value")
    table = pa.table({name: [getattr(each, name) for each in found] for name in columns})
    with pa.OSFile(str(temporary / _NAMES), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    (temporary / _INFO).write_text(json.dumps(info | {"signatures": len(signatures.ends)}), encoding="utf-8")
    try:
        temporary.rename(directory)
    except OSError:
        shutil.rmtree(temporary)
        if not directory.exists():
            raise


@dataclass(frozen=True)
class Measured:
    """The directory of one task. Its files are opened when they are read: there may be more tasks than open files."""

    directory: Path

    def array(self, name: str) -> np.ndarray:
        """One of the arrays with a row per document, or `ends`."""
        found: np.ndarray = np.load(self.directory / f"{name}.npy")
        return found

    def band(self, band: int) -> np.ndarray:
        """Keys of a band, [documents with a signature] uint64."""
        count = int(self.info["signatures"])
        return np.fromfile(self.directory / _KEYS, np.uint64, count, offset=8 * count * band)

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Keys of all bands for some signatures, [len(rows), bands] uint64."""
        keys = np.memmap(self.directory / _KEYS, np.uint64, "r").reshape(-1, int(self.info["signatures"]))
        return np.array(keys[:, rows].T)  # a copy, so that the file is closed

    def set(self, start: int, stop: int) -> np.ndarray:
        """Token hashes `start` to `stop` - 1 of the task, uint64."""
        return np.fromfile(self.directory / _SETS, np.uint64, stop - start, offset=8 * start)

    def delete_signatures(self) -> None:
        """Delete the keys and token sets, most of the directory, which nothing reads after the comparison."""
        for name in (_KEYS, _SETS):
            (self.directory / name).unlink(missing_ok=True)

    @cached_property
    def info(self) -> dict[str, Any]:
        """Facts about the task as a whole."""
        body: dict[str, Any] = json.loads((self.directory / _INFO).read_text(encoding="utf-8"))
        return body

    @cached_property
    def names(self) -> Any:
        """The table of path, repository, reason and value, memory-mapped."""
        import pyarrow as pa

        with pa.memory_map(str(self.directory / _NAMES)) as file:
            return pa.ipc.open_file(file).read_all()


class AllMeasured:
    """The directories of all tasks.

    Attributes:
        parts: one per task.
        starts: number of the first document of each task, and the total, [tasks + 1].
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        """Open the directories of all tasks, in order."""
        self.parts = [Measured(each) for each in directories]
        counts = [int(each.info["documents"]) for each in self.parts]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def column(self, name: str, half: int | None = None) -> np.ndarray:
        """An array with a row per document, over all tasks; with `half`, only the first or second half of a digest."""
        column = np.empty(0)
        for part, (start, stop) in zip(self.parts, pairwise(self.starts.tolist()), strict=True):
            array = part.array(name) if half is None else part.array(name)[:, half]
            if start == 0 and not len(column):
                column = np.empty((len(self), *array.shape[1:]), array.dtype)
            column[start:stop] = array  # one task at a time, instead of all beside the result
        return column

    def band(self, band: int, documents: np.ndarray) -> np.ndarray:
        """Keys of a band for some documents, [len(documents)] uint64. They must have signatures."""
        keys = np.zeros(len(self), np.uint64)
        for part, start in zip(self.parts, self.starts, strict=False):
            kept = part.array("kept")
            keys[start : start + len(kept)][kept] = part.band(band)
        return keys[documents]

    def locate(self, document: int) -> tuple[Measured, int]:
        """The task of a document, and its row there."""
        task = int(np.searchsorted(self.starts, document, side="right")) - 1
        return self.parts[task], document - int(self.starts[task])

    def name(self, document: int) -> str:
        """Repository and path of a document."""
        part, row = self.locate(document)
        repository, path = (part.names.column(each)[row].as_py() for each in ("repository", "path"))
        return f"{repository} {path}".strip()


class SignaturesOf:
    """The signatures of some documents. Token sets are read when asked for: a component may be larger than memory.

    Attributes:
        keys: keys of all bands, [documents, bands] uint64.
    """

    def __init__(self, measured: AllMeasured, documents: np.ndarray) -> None:
        """Documents must have signatures."""
        self._parts = measured.parts
        self._part = np.searchsorted(measured.starts, documents, side="right") - 1
        self._bounds = np.empty((len(documents), 2), np.int64)
        keys = []
        order = np.argsort(self._part, kind="stable")
        numbers, firsts = np.unique(self._part[order], return_index=True)
        for number, chosen in zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True):
            part = self._parts[number]
            rows = part.array("row")[documents[chosen] - measured.starts[number]]
            ends = np.concatenate([[0], part.array("ends")])
            self._bounds[chosen] = np.stack([ends[rows], ends[rows + 1]], axis=1)
            keys.append(part.keys(rows))
        self.keys = np.empty((len(documents), keys[0].shape[1] if keys else 0), np.uint64)
        if keys:
            self.keys[order] = np.concatenate(keys)

    def sets(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Token hashes of the documents `start` to `stop` - 1, each ascending, uint64."""
        for number in range(start, stop):
            yield self._parts[self._part[number]].set(*self._bounds[number].tolist())
