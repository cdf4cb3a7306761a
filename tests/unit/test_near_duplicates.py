"""Near-duplicates: candidates are found, and what is removed is exactly what has a similar kept document."""

import numpy as np

from codeparrot_ds.corpus.near_duplicates import find_edges, find_removed, join, sign
from codeparrot_ds.corpus.options import NearDuplicates

RULES = NearDuplicates()


def words(*ranges: range) -> str:
    return " ".join(f"name_{i}" for each in ranges for i in each)


def jaccard(one: str, other: str) -> float:
    a, b = set(one.split()), set(other.split())
    return len(a & b) / len(a | b)


def components(texts: list[str]) -> np.ndarray:
    labels = np.arange(len(texts), dtype=np.int32)
    for keys in sign(texts, RULES).keys:
        labels = join(labels, find_edges(keys))
    return labels


def removed(texts: list[str], threshold: float = 0.85) -> list[tuple[int, int, float]]:
    found = sign(texts, RULES)
    sets = np.split(found.sets, found.ends[:-1])
    return list(find_removed(sets, found.keys.T, threshold))


def test_tokens_are_ascii_letters_digits_and_underscores() -> None:
    """As in the original, whose pattern is [^A-Za-z_0-9]: other letters separate."""
    found = sign(["a1_B+é2 x.y x\n" + "t " * 10, "2 B a1_ x y t" + " t" * 10], RULES)
    assert found.ends.tolist() == [5, 11]  # a1_B, 2, x, y, t; then 2, B, a1_, x, y, t


def test_a_removed_document_has_a_kept_one_at_the_threshold() -> None:
    """100 common tokens of 117 and 118: the Jaccard indices are worked out by hand."""
    base, near, far = words(range(100)), words(range(100), range(200, 217)), words(range(100), range(300, 318))
    assert jaccard(base, near) == 100 / 117 and jaccard(base, far) == 100 / 118
    assert removed([base, base, near, far]) == [(1, 0, 1.0), (2, 0, 100 / 117)]


def test_a_chain_keeps_what_is_far_from_the_first() -> None:
    """Each is similar to the next only; the third is not similar to the first, which is kept."""
    chain = [words(range(8 * i, 100 + 8 * i)) for i in range(3)]
    assert jaccard(chain[0], chain[1]) == 92 / 108 > 0.85 > jaccard(chain[0], chain[2])
    assert removed(chain) == [(1, 0, 92 / 108)]
    assert removed([chain[1], chain[0], chain[2]]) == [(1, 0, 92 / 108), (2, 0, 92 / 108)]


def test_short_documents_are_not_compared() -> None:
    nine, ten = "a b c d e f g h i", "a b c d e f g h i i"
    assert removed([nine, nine]) == []
    assert removed([ten, ten]) == [(1, 0, 1.0)]
    assert components([nine, nine, ten, ten]).tolist() == [0, 1, 2, 2]


def test_documents_in_a_row_may_consist_of_the_same_tokens() -> None:
    found = sign(["t " * 10, "t " * 9, "t " * 11, "", "t " * 10], RULES)
    assert found.ends.tolist() == [1, 1, 2, 2, 3]
    assert len(set(found.sets.tolist())) == 1
    assert [bool(key) for key in found.keys[0]] == [True, False, True, False, True]


def test_components_join_over_bands() -> None:
    labels = np.arange(6, dtype=np.int32)
    labels = join(labels, find_edges(np.array([7, 7, 8, 9, 0, 0], np.uint64)))
    assert labels.tolist() == [0, 0, 2, 3, 4, 5]
    labels = join(labels, find_edges(np.array([1, 5, 5, 6, 6, 2], np.uint64)))
    assert labels.tolist() == [0, 0, 0, 3, 3, 5]
    assert join(labels, find_edges(np.array([1, 2, 3, 4, 5, 6], np.uint64))) is labels
    assert join(labels, find_edges(np.array([1, 2, 3, 4, 5, 1], np.uint64))).tolist() == [0, 0, 0, 3, 3, 0]


def test_signatures_do_not_depend_on_the_batch() -> None:
    texts = [words(range(i, i + 60)) for i in range(0, 50, 5)]
    whole = sign(texts, RULES)
    for i, text in enumerate(texts):
        alone = sign([text], RULES)
        assert np.array_equal(alone.keys[:, 0], whole.keys[:, i])
        start = whole.ends[i - 1] if i else 0
        assert set(alone.sets) == set(whole.sets[start : whole.ends[i]])
    assert sign([], RULES).keys.shape == (21, 0)
