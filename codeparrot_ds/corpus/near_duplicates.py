"""Near-duplicates: MinHash and banding find candidates, and an exact comparison of token sets decides.

Documents are similar if the Jaccard index of their sets of alphanumeric tokens reaches a threshold. Similar documents
form components. Within a component a subset is kept ("extremes"), in canonical order, such that every removed document
is similar to a kept one. Source: CodeParrot's `minhash_deduplication.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from codeparrot_ds.corpus.extra import import_extra
from codeparrot_ds.corpus.options import NearDuplicates

_PERMUTATIONS, _SEED = 256, 42
_CACHED_TOKENS = 500_000  # hashes kept per process; names repeat from file to file
# [A-Za-z0-9_] stays, everything else separates.
_WORD = bytes(c if c < 128 and (chr(c).isalnum() or c == ord("_")) else ord(" ") for c in range(256))
_MIX = np.uint64(0xFF51AFD7ED558CCD)  # multiplier of MurmurHash3's finalizer


class _TokenHashes(dict[bytes, int]):
    def __missing__(self, token: bytes) -> int:
        value = xxhash.xxh3_64_intdigest(token)
        if len(self) < _CACHED_TOKENS:
            self[token] = value
        return value


token_hash = _TokenHashes().__getitem__


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
    sets, compared = [], []
    for text in texts:
        words = text.encode().translate(_WORD).split()
        compared.append(len(words) >= rules.min_tokens)
        distinct = set(words) if compared[-1] else set()
        sets.append(np.fromiter(map(token_hash, distinct), np.uint64, len(distinct)))
    ends = np.cumsum([len(each) for each in sets], dtype=np.int64)
    flat = np.concatenate(sets) if sets else np.empty(0, np.uint64)
    if not texts:
        return Signatures(np.empty((rules.bands, 0), np.uint64), flat, ends)
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


def find_removed(sets: Sequence[np.ndarray], keys: np.ndarray, jaccard: float) -> Iterator[tuple[int, int, float]]:
    """Yield (removed document, similar kept document, Jaccard index) within one component.

    Args:
        sets: token hashes of each document, in canonical order: earlier documents are kept rather than later ones.
        keys: [documents, bands] uint64; only documents that share a key are compared.
        jaccard: threshold.
    """
    kept_by_key: dict[tuple[int, int], list[int]] = {}
    kept_sets: dict[int, set[int]] = {}
    for document, its_keys in enumerate(keys.tolist()):
        tokens = set(sets[document].tolist())
        buckets = [(band, key) for band, key in enumerate(its_keys) if key]
        candidates = dict.fromkeys(other for bucket in buckets for other in kept_by_key.get(bucket, ()))
        for other in candidates:
            its_tokens = kept_sets[other]
            smaller, larger = sorted((len(tokens), len(its_tokens)))
            if smaller < jaccard * larger:  # cannot reach the threshold
                continue
            shared = len(tokens & its_tokens)
            index = shared / (len(tokens) + len(its_tokens) - shared)
            if index >= jaccard:
                yield document, other, index
                break
        else:
            kept_sets[document] = tokens
            for bucket in buckets:
                kept_by_key.setdefault(bucket, []).append(document)
