"""Near-duplicates that `corpus clean` finds, beside an exact join: the Jaccard index of every pair of documents.

The join shares nothing with the package: tokens by a regular expression, numbered by a dictionary, and intersections as
the product of a matrix with itself.
"""

import json
import re
import sysconfig
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from scipy import sparse

from codeparrot_ds.corpus.clean import CleanOptions, clean
from codeparrot_ds.corpus.near_duplicates import sign
from codeparrot_ds.corpus.options import Cleaning, NearDuplicates

EDGES = (0.85, 0.87, 0.90, 0.92, 0.94, 0.96, 0.98, 1.0)
RULES = {"heuristics": None, "secrets": None, "decontamination": {"enabled": False}}
ROWS = 500  # of the matrix of all pairs at a time


def tokens_of(text: str) -> list[str]:
    return re.findall("[A-Za-z0-9_]+", text)


def plant(originals: list[list[str]], pairs: int, rng: np.random.Generator) -> Iterator[str]:
    """For each bin, variants of `pairs` originals with tokens replaced, added or removed, to fall into the bin."""
    number = 0
    for low, high in pairwise(EDGES):
        for choice in rng.permutation(len(originals))[:pairs]:
            tokens = originals[choice]
            size, wanted, kind = len(tokens), rng.uniform(low, high), rng.integers(3)
            changed = size * (1 - wanted) / (1 + wanted if kind == 0 else wanted if kind == 1 else 1)
            changed = min(max(int(changed + rng.random()), 0), size // 4)
            new = [f"planted_{number}_{i}" for i in range(changed if kind < 2 else 0)]
            variant = (tokens[changed:] if kind != 1 else tokens) + new
            yield " ".join(rng.permutation(np.array(variant, object)))
            number += 1


def exact_pairs(sets: list[set[str]]) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of documents at a Jaccard index of 0.85 or above, [2, pairs] in ascending order, and their indices."""
    numbers: dict[str, int] = {}
    columns = [numbers.setdefault(token, len(numbers)) for tokens in sets for token in tokens]
    sizes = np.array([len(tokens) for tokens in sets])
    ends = np.concatenate([[0], np.cumsum(sizes)])
    matrix = sparse.csr_array((np.ones(len(columns), np.float32), columns, ends), shape=(len(sets), len(numbers)))
    common = np.bincount(columns, minlength=len(numbers)) > max(50, len(sets) // 20)
    dense, rare = matrix[:, np.flatnonzero(common)].toarray(), matrix[:, np.flatnonzero(~common)]
    rare_across = rare.T.tocsr()
    pairs, indices = [], []
    for start in range(0, len(sets), ROWS):
        shared = dense[start : start + ROWS] @ dense.T + (rare[start : start + ROWS] @ rare_across).toarray()
        union = sizes[start : start + ROWS, None] + sizes - shared
        ones, others = np.nonzero(20 * shared >= 17 * union)
        later = others > ones + start
        ones, others = ones[later], others[later]
        pairs.append(np.stack([ones + start, others]))
        indices.append((shared[ones, others] / union[ones, others]).astype(np.float64))
    return np.concatenate(pairs, axis=1), np.concatenate(indices)


def removed_exactly(documents: int, pairs: np.ndarray) -> set[int]:
    """What is removed when every document that is similar to an earlier kept one is, in order."""
    earlier: list[list[int]] = [[] for _ in range(documents)]
    for one, other in pairs.T.tolist():
        earlier[other].append(one)
    removed: set[int] = set()
    for document, similar in enumerate(earlier):
        if any(other not in removed for other in similar):
            removed.add(document)
    return removed


def synthetic(count: int, rng: np.random.Generator) -> list[list[str]]:
    """Sets of tokens as in code: common ones in most of them, and rare ones."""
    found = []
    for document in range(count):
        size = int(rng.integers(80, 400))
        common = {f"common_{i}" for i in rng.zipf(1.3, size // 2) if i < 5000}
        found.append(sorted(common) + [f"name_{document}_{i}" for i in range(size - len(common))])
    return found


def installed(count: int) -> list[list[str]]:
    """Distinct tokens of Python files of this interpreter, those with the smallest digests of their text."""
    roots = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    texts: set[str] = set()
    for file in {file for root in roots for file in root.rglob("*.py")}:
        if 1024 <= file.stat().st_size < 100_000:
            texts.add(file.read_text(encoding="utf-8", errors="ignore"))
    chosen = sorted(texts, key=lambda text: xxhash.xxh3_128_digest(text.encode()))[:count]
    return [sorted(set(tokens_of(text))) for text in chosen]


def check(texts: list[str], tmp_path: Path, *, pairs_per_bin: int) -> None:
    """Compare what `clean` finds in distinct texts with the exact join."""
    texts = sorted(texts, key=lambda text: xxhash.xxh3_128_digest(text.encode()))  # canonical order
    assert min(len(tokens_of(text)) for text in texts) >= NearDuplicates().min_tokens
    pairs, indices = exact_pairs([set(tokens_of(text)) for text in texts])

    keys = np.concatenate(
        [sign(texts[i : i + 1000], NearDuplicates()).keys for i in range(0, len(texts), 1000)], axis=1
    )
    candidates = (keys[:, pairs[0]] == keys[:, pairs[1]]).any(axis=0)
    for low, high in pairwise(EDGES):
        inside = (indices >= low) & ((indices < high) | (high == 1.0))
        recall = float(candidates[inside].mean())
        print(f"Jaccard {low:.2f} to {high:.2f}: {int(inside.sum()):,} pairs, recall of candidates {recall:.4f}")
        assert inside.sum() >= pairs_per_bin and recall >= 0.97

    rows = [{"content": text, "path": str(number)} for number, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clean([tmp_path / "in.jsonl"], tmp_path / "out", CleanOptions(cleaning=Cleaning.model_validate(RULES), workers=1))
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert {row["reason"] for row in rejected} == {"near-duplicate"}
    removed = {int(row["path"]): row["value"].split() for row in rejected}
    exactly = removed_exactly(len(texts), pairs)
    print(f"{len(texts):,} documents, {len(exactly):,} removed exactly, {len(removed):,} by clean")
    assert len(removed) >= 0.99 * len(exactly)
    exact_index = dict(zip(zip(*pairs.tolist(), strict=True), indices.tolist(), strict=True))
    for document, (index, twin) in removed.items():
        assert int(twin) not in removed
        found = exact_index[min(document, int(twin)), max(document, int(twin))]  # a KeyError: below 0.85
        assert abs(found - float(index)) < 1e-4


def test_planted_pairs_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    originals = synthetic(700, rng)
    texts = {*map(" ".join, originals), *plant(originals, 350, rng)}
    check(list(texts), tmp_path, pairs_per_bin=250)


@pytest.mark.nightly
def test_pairs_of_real_files_are_found(tmp_path: Path) -> None:
    """4,000 files of this machine, with the near-duplicates that they have, and planted ones."""
    rng = np.random.default_rng(2)
    originals = [tokens for tokens in installed(4000) if len(tokens) >= 40]
    texts = {*map(" ".join, originals), *plant(originals, 1000, rng)}
    check(list(texts), tmp_path, pairs_per_bin=500)
