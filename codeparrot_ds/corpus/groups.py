"""Statistics of a cleaned corpus for its manifest: sizes of documents, and groups of duplicates."""

from typing import Any

import numpy as np

from codeparrot_ds.corpus.decisions import Decision, Decisions
from codeparrot_ds.corpus.measured import AllMeasured

_LARGEST = 5
_GROUPS = {"exact": Decision.EXACT_DUPLICATE, "near": Decision.NEAR_DUPLICATE}


def describe_sizes(sizes: np.ndarray) -> dict[str, int]:
    """Number, sum and distribution of sizes of documents (bytes of text)."""
    if not len(sizes):
        return {"documents": 0, "bytes": 0}
    ordered = np.sort(sizes)
    # The smallest size that at least this share of the documents does not exceed.
    ranks = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    places = {name: max(int(np.ceil(share * len(ordered))) - 1, 0) for name, share in ranks.items()}
    total = int(ordered.sum())
    return {
        "documents": len(ordered),
        "bytes": total,
        "mean": total // len(ordered),
        **{name: int(ordered[place]) for name, place in places.items()},
    }


def describe_groups(measured: AllMeasured, decisions: Decisions) -> dict[str, Any]:
    """Groups of exact duplicates and of near-duplicates: a document, and those that are removed because of it.

    Returns:
        For "exact" and "near": the number of `groups` and of their `documents`; `by_size`, the number of groups by size
        ("2", "3-4", "5-8", ...); and the `largest`, with the document that they were removed for and their `size`.
    """
    described = {}
    for name, decision in _GROUPS.items():
        twins, removed = np.unique(decisions.instead[decisions.decision == decision], return_counts=True)
        order = np.lexsort((twins, -removed))[:_LARGEST]
        exponents, counts = np.unique(np.ceil(np.log2(removed + 1)).astype(int), return_counts=True)
        described[name] = {
            "groups": len(twins),
            "documents": int(removed.sum()) + len(twins),
            "by_size": dict(zip(map(_size_range, exponents.tolist()), counts.tolist(), strict=True)),
            "largest": [
                {"document": measured.name(int(twins[place])), "size": int(removed[place]) + 1}
                for place in order.tolist()
            ],
        }
    return described


def _size_range(exponent: int) -> str:
    first, last = 2 ** (exponent - 1) + 1, 2**exponent
    return str(last) if first == last else f"{first:,}-{last:,}"
