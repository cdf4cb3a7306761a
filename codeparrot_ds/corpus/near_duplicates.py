"""Near-duplicates: MinHash and banding find candidates, and an exact comparison of token sets decides.

Documents are similar if the Jaccard index of their sets of alphanumeric tokens reaches a threshold. Similar documents
form components. Within a component a subset is kept ("extremes"), in canonical order, such that every removed document
is similar to a kept one. Source: CodeParrot's `minhash_deduplication.py`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from codeparrot_ds.corpus.extra import import_extra
from codeparrot_ds.corpus.options import NearDuplicates
from codeparrot_ds.corpus.words import hash_words

_PERMUTATIONS, _SEED = 256, 42
_CHUNK_BYTES = 1 << 19  # of text whose words are hashed at once: the arrays fit in the L2 cache
# [A-Za-z0-9_] stays, everything else separates.
_WORD = bytes(c if c < 128 and (chr(c).isalnum() or c == ord("_")) else ord(" ") for c in range(256))
_MIX = np.uint64(0xFF51AFD7ED558CCD)  # multiplier of MurmurHash3's finalizer


@dataclass(frozen=True)
class Signatures:
    """What is compared of a batch of documents.

    Attributes:
        keys: [bands, documents] uint64; documents with equal keys in a band are candidates. 0: not compared.
        sets: hashes of the distinct tokens of all documents, concatenated, uint64.
        ends: [documents] int64, end of each document's hashes in `sets`.
    """

    keys: np.ndarray
    sets: np.ndarray
    ends: np.ndarray


def sign(texts: Sequence[str], rules: NearDuplicates) -> Signatures:
    """Compute the signatures of documents."""
    rensa = import_extra("rensa", "rensa", "The search for near-duplicates")
    if not texts:
        return Signatures(np.empty((rules.bands, 0), np.uint64), np.empty(0, np.uint64), np.empty(0, np.int64))
    chunks = [_token_sets(chunk, rules.min_tokens) for chunk in _chunks(texts)]
    flat = np.concatenate([hashes for hashes, _, _ in chunks])
    ends = np.cumsum(np.concatenate([sizes for _, sizes, _ in chunks]), dtype=np.int64)
    compared = np.concatenate([compared for _, _, compared in chunks])
    offsets = np.concatenate([[0], ends]).astype(np.uint64)
    permutations = max(_PERMUTATIONS, rules.bands * rules.rows)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, permutations, _SEED)
    values = np.array(matrix.to_rows(), dtype=np.uint64).T  # [permutations, documents]
    keys = np.empty((rules.bands, len(texts)), np.uint64)
    for band in range(rules.bands):
        key = np.full(len(texts), band + 1, np.uint64)
        for row in range(band * rules.rows, (band + 1) * rules.rows):
            key = (key ^ values[row]) * _MIX
            key ^= key >> np.uint64(32)
        keys[band] = np.where(compared, np.maximum(key, 1), 0)
    return Signatures(keys, flat, ends)


def _chunks(texts: Sequence[str]) -> Iterator[list[bytes]]:
    """Encoded texts, with spaces instead of all that is in no token, about `_CHUNK_BYTES` at a time."""
    chunk: list[bytes] = []
    size = 0
    for text in texts:
        chunk.append(text.encode().translate(_WORD))
        size += len(chunk[-1])
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _token_sets(texts: Sequence[bytes], min_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of the distinct tokens of documents.

    Returns:
        Hashes in ascending order within each document, concatenated, uint64; number of hashes of each document; and
        whether each is compared. One with fewer tokens than `min_tokens` is not, and has no hashes.
    """
    hashes, starts = hash_words(b" ".join(texts))
    first_bytes = np.cumsum([0, *(len(text) + 1 for text in texts)])
    bounds = np.searchsorted(starts, first_bytes)
    tokens = np.diff(bounds)
    compared = tokens >= min_tokens
    for start, stop in pairwise(bounds.tolist()):
        hashes[start:stop].sort()
    taken = np.ones(len(hashes), bool)
    taken[1:] = hashes[1:] != hashes[:-1]
    taken[bounds[:-1][tokens > 0]] = True
    taken &= np.repeat(compared, tokens)
    return hashes[taken], np.diff(np.concatenate([[0], np.cumsum(taken)])[bounds]), compared


def concatenate(parts: Sequence[Signatures]) -> Signatures:
    """The signatures of all batches as one."""
    if not parts:
        return Signatures(np.empty((0, 0), np.uint64), np.empty(0, np.uint64), np.empty(0, np.int64))
    before = np.cumsum([0, *(len(part.sets) for part in parts[:-1])])
    return Signatures(
        np.concatenate([part.keys for part in parts], axis=1),
        np.concatenate([part.sets for part in parts]),
        np.concatenate([part.ends + start for part, start in zip(parts, before, strict=True)]),
    )


def find_edges(keys: np.ndarray) -> np.ndarray:
    """Pairs of documents that join all with equal keys in one band, [2, pairs] of indices in `keys`.

    Args:
        keys: [documents] uint64 of the band; 0 equals nothing.
    """
    order = np.argsort(keys, kind="stable").astype(np.int32)
    ordered = keys[order]
    same = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0))
    return np.stack([order[same], order[same + 1]])


def join(labels: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Join the components that edges connect.

    Args:
        labels: [documents] int32, the component of each document, named by its smallest document.
        edges: [2, pairs] documents.

    Returns:
        New labels.
    """
    sparse = import_extra("scipy.sparse", "scipy", "The search for near-duplicates")
    csgraph = import_extra("scipy.sparse.csgraph", "scipy", "The search for near-duplicates")
    ones, others = labels[edges[0]], labels[edges[1]]
    differing = ones != others
    ones, others = ones[differing], others[differing]
    if not len(ones):
        return labels
    joined, places = np.unique(np.concatenate([ones, others]), return_inverse=True)
    pairs = (np.ones(len(ones), np.int8), (places[: len(ones)], places[len(ones) :]))
    _, found = csgraph.connected_components(sparse.coo_matrix(pairs, shape=(len(joined), len(joined))), directed=False)
    smallest = np.full(found.max() + 1, np.iinfo(labels.dtype).max, labels.dtype)
    np.minimum.at(smallest, found, joined)
    renamed = np.arange(len(labels), dtype=labels.dtype)
    renamed[joined] = smallest[found]
    return renamed[labels]


def find_removed(sets: Iterable[np.ndarray], keys: np.ndarray, jaccard: float) -> Iterator[tuple[int, int, float]]:
    """Yield (removed document, similar kept document, Jaccard index) within one component.

    Args:
        sets: distinct token hashes of each document, ascending, in canonical order: earlier documents are kept rather
            than later ones.
        keys: [documents, bands] uint64; only documents that share a key are compared.
        jaccard: threshold.
    """
    kept_by_key: dict[tuple[int, int], list[int]] = {}
    kept_sets: dict[int, np.ndarray] = {}
    for document, tokens in enumerate(sets):
        buckets = [(band, key) for band, key in enumerate(keys[document].tolist()) if key]
        candidates = dict.fromkeys(other for bucket in buckets for other in kept_by_key.get(bucket, ()))
        for other in candidates:
            its_tokens = kept_sets[other]
            smaller, larger = sorted((len(tokens), len(its_tokens)))
            if smaller < jaccard * larger:  # cannot reach the threshold
                continue
            shared = _count_shared(tokens, its_tokens)
            index = shared / (len(tokens) + len(its_tokens) - shared)
            if index >= jaccard:
                yield document, other, index
                break
        else:
            kept_sets[document] = tokens
            for bucket in buckets:
                kept_by_key.setdefault(bucket, []).append(document)


def _count_shared(ones: np.ndarray, others: np.ndarray) -> int:
    """Number of values that two ascending arrays of distinct values have in common."""
    both = np.concatenate([ones, others])
    both.sort()
    return int(np.count_nonzero(both[1:] == both[:-1]))
