"""What the first step of `corpus clean` finds out about each document, as files that the later steps read.

Each task writes one directory: arrays with a row per document, in input order, and an Arrow table with the names.
Documents are numbered over all tasks in this order.
"""

import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.corpus.near_duplicates import Signatures

EMPTY = "empty"
_INFO, _NAMES = "info.json", "names.arrow"


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
        "keys": signatures.keys,
        "sets": signatures.sets,
        "ends": signatures.ends,
    }
    for name, array in arrays.items():
        np.save(temporary / f"{name}.npy", array)
    columns = ("path", "repository", "reason", "value")
    table = pa.table({name: [getattr(each, name) for each in found] for name in columns})
    with pa.OSFile(str(temporary / _NAMES), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    (temporary / _INFO).write_text(json.dumps(info), encoding="utf-8")
    try:
        temporary.rename(directory)
    except OSError:
        shutil.rmtree(temporary)
        if not directory.exists():
            raise


@dataclass(frozen=True)
class Measured:
    """The directory of one task, read on demand."""

    directory: Path
    _open: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def array(self, name: str) -> np.ndarray:
        """One of the arrays, memory-mapped."""
        if name not in self._open:
            self._open[name] = np.load(self.directory / f"{name}.npy", mmap_mode="r")
        return self._open[name]

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

    def column(self, name: str) -> np.ndarray:
        """An array with a row per document, over all tasks."""
        return np.concatenate([part.array(name) for part in self.parts])

    def band(self, band: int, documents: np.ndarray) -> np.ndarray:
        """Keys of a band for some documents, [len(documents)] uint64. They must have signatures."""
        keys = np.zeros(len(self), np.uint64)
        for part, start in zip(self.parts, self.starts, strict=False):
            kept = part.array("kept")
            keys[start : start + len(kept)][kept] = part.array("keys")[band]
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


class SetsOf(Sequence[np.ndarray]):
    """The token sets of some documents, read when asked for: a component may be larger than memory."""

    def __init__(self, measured: AllMeasured, documents: np.ndarray) -> None:
        """Documents must have signatures."""
        self._measured, self._documents = measured, documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, number: Any) -> Any:
        part, row = self._measured.locate(int(self._documents[number]))
        signature = int(part.array("row")[row])
        ends = part.array("ends")
        return part.array("sets")[int(ends[signature - 1]) if signature else 0 : int(ends[signature])]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))

    def keys(self) -> np.ndarray:
        """Keys of all bands, [documents, bands] uint64."""
        found = []
        for document in self._documents.tolist():
            part, row = self._measured.locate(document)
            found.append(part.array("keys")[:, int(part.array("row")[row])])
        return np.stack(found)
