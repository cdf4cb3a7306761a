"""Results of the first step of `corpus clean` as the later steps read them, over many tasks."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from codeparrot_ds.corpus import decisions
from codeparrot_ds.corpus.measured import AllMeasured, Found, SignaturesOf, write_measured
from codeparrot_ds.corpus.near_duplicates import Signatures

BANDS, TASKS, DOCUMENTS = 3, 60, 7


@pytest.fixture
def tasks(tmp_path: Path) -> tuple[list[Path], np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Directories of tasks, numbers of the documents with signatures, and the keys and the token set of each."""
    rng = np.random.default_rng(0)
    directories, expected = [], {}
    first = np.empty(0, np.uint64), np.empty(BANDS, np.uint64)
    for task in range(TASKS):
        kept = [number for number in range(DOCUMENTS) if (number + task) % 3]
        sets = [np.sort(rng.integers(1, 1 << 60, rng.integers(1, 9)).astype(np.uint64)) for _ in kept]
        keys = rng.integers(1, 1 << 60, (BANDS, len(kept))).astype(np.uint64)
        if task:
            sets[0], keys[:, 0] = first  # every task has a copy of the same document
        first = sets[0], keys[:, 0]
        found = [
            Found(rng.bytes(16), rng.bytes(16), 1, "x.py", "r", "" if number in kept else "generated", "")
            for number in range(DOCUMENTS)
        ]
        signatures = Signatures(keys, np.concatenate(sets), np.cumsum([len(each) for each in sets], dtype=np.int64))
        directories.append(tmp_path / f"measured-{task:05d}")
        write_measured(directories[-1], found, signatures, {"documents": DOCUMENTS})
        for i, number in enumerate(kept):
            expected[task * DOCUMENTS + number] = (keys[:, i].copy(), sets[i])
    return directories, np.array(list(expected)), expected


@pytest.fixture
def few_open_files() -> Iterator[None]:
    """Fewer than there are tasks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (names suffice)
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + TASKS // 2, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_signatures_of_documents_of_many_tasks(tasks: tuple, few_open_files: None) -> None:
    directories, numbers, expected = tasks
    chosen = np.random.default_rng(1).permutation(numbers)
    found = SignaturesOf(AllMeasured(directories), chosen)
    assert all(np.array_equal(keys, expected[number][0]) for keys, number in zip(found.keys, chosen, strict=True))
    start, stop = 5, len(chosen) - 5
    sets = list(found.sets(start, stop))
    assert len(sets) == stop - start
    assert all(np.array_equal(each, expected[number][1]) for each, number in zip(sets, chosen[start:stop], strict=True))
    for band in range(BANDS):
        assert AllMeasured(directories).band(band, chosen).tolist() == [int(expected[n][0][band]) for n in chosen]


def test_there_may_be_more_tasks_than_open_files(tasks: tuple, few_open_files: None, tmp_path: Path) -> None:
    directories, numbers, _ = tasks
    measured = AllMeasured(directories)
    representative = decisions.keep_one_of_equals(measured)
    assert representative.tolist() == list(range(TASKS * DOCUMENTS))
    compared = decisions.compared_documents(measured, representative)
    assert sorted(compared.tolist()) == sorted(numbers.tolist())
    decisions.save(tmp_path / "compared.npy", compared)
    edges = [tmp_path / f"edges-{band}.npy" for band in range(BANDS)]
    for band, path in enumerate(edges):
        decisions.write_edges(decisions.BandTask(band, directories, tmp_path / "compared.npy", path))
    members, starts = decisions.find_components(len(compared), edges)
    assert np.diff(starts).tolist() == [TASKS]
    decisions.save(tmp_path / "members.npy", members)
    decisions.save(tmp_path / "starts.npy", starts)
    places = (tmp_path / "compared.npy", tmp_path / "members.npy", tmp_path / "starts.npy", tmp_path / "removed.npy")
    decisions.remove_similar(decisions.GroupTask(0, 0, 1, 0.85, directories, *places))
    removed = np.load(tmp_path / "removed.npy")
    assert len(removed) == TASKS - 1 and set(removed[:, 1]) == {float(compared[members[0]])}
