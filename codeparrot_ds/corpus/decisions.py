"""Later steps of `corpus clean`: which documents are removed, as duplicates of others and by rules on themselves."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

from codeparrot_ds.corpus.measured import AllMeasured, SignaturesOf
from codeparrot_ds.corpus.near_duplicates import find_edges, find_removed, join

_GROUP_DOCUMENTS = 20_000  # about this many documents of components are compared in one task


def keep_one_of_equals(measured: AllMeasured) -> np.ndarray:
    """The document that represents each, [documents] int64: itself, or the one that an exact duplicate is removed for.

    Of documents that are equal but for white space, the one with the smallest digest is kept, and of copies the first.
    """
    representative = np.arange(len(measured), dtype=np.int64)
    halves = measured.column("bare_digest", 0)
    order = np.argsort(halves)
    equal = np.flatnonzero(halves[order[1:]] == halves[order[:-1]])
    copies = np.unique(np.concatenate([order[equal], order[equal + 1]]))  # in input order; perhaps all but few are not
    bare, digest = measured.column("bare_digest")[copies], measured.column("digest")[copies]
    order = np.lexsort((digest[:, 1], digest[:, 0], bare[:, 1], bare[:, 0]))  # stable: copies stay in input order
    ordered = bare[order]
    first = np.ones(len(order), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(1)
    firsts = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    representative[copies[order]] = copies[order[firsts]]
    return representative


def compared_documents(measured: AllMeasured, representative: np.ndarray) -> np.ndarray:
    """Documents that no other rule removes, in canonical order: by digest."""
    kept = np.flatnonzero(measured.column("kept") & (representative == np.arange(len(representative))))
    first, second = (measured.column("digest", half)[kept] for half in range(2))
    return kept[np.lexsort((second, first))]


class BandTask(msgspec.Struct, frozen=True):
    """One band of the signatures. `work` has the directories of all tasks in `measured` and the file `compared`."""

    band: int
    measured: list[Path]
    compared: Path
    output: Path


def write_edges(task: BandTask) -> int:
    """Write the pairs of documents with equal keys in a band, and return its number."""
    keys = AllMeasured(task.measured).band(task.band, np.load(task.compared))
    save(task.output, find_edges(keys))
    return task.band


def find_components(documents: int, edges: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Components of more than one document, from the pairs of all bands.

    Returns:
        Documents of all components, [members] int32, in order of component and document, and where each component
        starts in it, with the total, [components + 1] int64. Documents are positions in canonical order.
    """
    labels = np.arange(documents, dtype=np.int32)
    for path in edges:
        labels = join(labels, np.load(path))
    order = np.argsort(labels, kind="stable").astype(np.int32)
    ordered = labels[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]])) if documents else np.zeros(1)
    sizes = np.diff(starts)
    large = np.repeat(sizes > 1, sizes.astype(np.int64))
    return order[large], np.concatenate([[0], np.cumsum(sizes[sizes > 1], dtype=np.int64)]).astype(np.int64)


class GroupTask(msgspec.Struct, frozen=True):
    """Components `first` to `last` - 1."""

    number: int
    first: int
    last: int
    jaccard: float
    measured: list[Path]
    compared: Path
    members: Path
    starts: Path
    output: Path


def group_components(starts: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of components with about `_GROUP_DOCUMENTS` documents each."""
    groups, first = [], 0
    for component in range(1, len(starts)):
        if starts[component] - starts[first] >= _GROUP_DOCUMENTS or component == len(starts) - 1:
            groups.append((first, component))
            first = component
    return groups


def remove_similar(task: GroupTask) -> int:
    """Write what is removed of a group of components, and return its number: [removed, 3] float64.

    A row is the removed document, the kept one that it is similar to, and their Jaccard index.
    """
    measured = AllMeasured(task.measured)
    compared, members = np.load(task.compared, mmap_mode="r"), np.load(task.members, mmap_mode="r")
    starts = np.load(task.starts)[task.first : task.last + 1]
    documents = compared[members[starts[0] : starts[-1]]]
    signatures = SignaturesOf(measured, documents)
    rows: list[tuple[int, int, float]] = []
    for start, stop in pairwise((starts - starts[0]).tolist()):
        found = find_removed(signatures.sets(start, stop), signatures.keys[start:stop], task.jaccard)
        rows += [(int(documents[start + one]), int(documents[start + other]), index) for one, other, index in found]
    save(task.output, np.array(rows, np.float64).reshape(-1, 3))
    return task.number


class Decision(IntEnum):
    """What happens to a document."""

    KEPT = 0
    REMOVED_BY_RULE = 1
    EXACT_DUPLICATE = 2
    NEAR_DUPLICATE = 3


@dataclass(frozen=True)
class Decisions:
    """What happens to each document.

    Attributes:
        decision: [documents] uint8, values of `Decision`.
        instead: [documents] int64, the document that a duplicate is removed for.
        jaccard: [documents] float64, of a near-duplicate with that document.
    """

    decision: np.ndarray
    instead: np.ndarray
    jaccard: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """Whether each document is kept, [documents] bool."""
        return self.decision == Decision.KEPT


def decide(measured: AllMeasured, representative: np.ndarray, similar: Sequence[Path]) -> Decisions:
    """Combine the results of all steps.

    Args:
        measured: the first step.
        representative: the document that is kept instead of each exact duplicate, or the document itself.
        similar: files that `remove_similar` wrote.
    """
    decision = np.where(measured.column("kept"), Decision.KEPT, Decision.REMOVED_BY_RULE).astype(np.uint8)
    copies = (representative != np.arange(len(representative))) & ~measured.column("empty")
    decision[copies] = Decision.EXACT_DUPLICATE
    instead, jaccard = representative.copy(), np.ones(len(representative))
    for path in similar:
        removed, twins, index = np.load(path).T
        numbers = removed.astype(np.int64)
        decision[numbers] = Decision.NEAR_DUPLICATE
        instead[numbers] = twins.astype(np.int64)
        jaccard[numbers] = index
    return Decisions(decision, instead, jaccard)


def save(path: Path, array: np.ndarray) -> None:
    """Atomically write an array; two copies of a task may do so at the same time."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
    temporary.replace(path)
