"""Compare two models on the same validation sequences: the paired difference of their losses, with its interval."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.evaluation.document_loss import Measured, measure
from codeparrot_ds.evaluation.loss import ratio
from codeparrot_ds.evaluation.pretrained import load_pretrained

_NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Difference:
    """B minus A, so that a negative difference means that B is better.

    Attributes:
        a, b: bits per byte of each model.
        difference: bits per byte.
        error: standard error of the difference; null for a single document. Documents on which both models are
            equally good or bad do not add to it, so it is smaller than the errors of `a` and `b`.
        low, high: 95 % confidence interval of the difference.
        loss_a, loss_b: nats per token.
        documents, tokens, bytes: what was evaluated on.
        b_better: share of documents on which B has the lower loss.
    """

    a: float
    b: float
    difference: float
    error: float | None
    low: float | None
    high: float | None
    loss_a: float
    loss_b: float
    documents: int
    tokens: int
    bytes: int
    b_better: float

    def verdict(self) -> str:
        """Which model is better, as far as these documents tell."""
        if self.low is None or self.high is None:
            return "a single document does not tell"
        if self.low <= 0 <= self.high:
            return "no difference beyond chance"
        return "B is better" if self.high < 0 else "A is better"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "verdict": self.verdict()}


def compare_losses(
    a: str | Path, b: str | Path, sources: Mapping[Path, float], sequences: int, seq_len: int | None = None
) -> Difference:
    """Measure two models on the same sequences, one after the other, and compare them.

    Args:
        a, b: see `pretrained.find_model`.
        sources: shard directories built with the tokenizer of both models, with their weights.
        sequences: maximum number of sequences, evenly spaced.
        seq_len: length of a sequence (tokens); default: the smaller context of the two.
    """
    first = load_pretrained(a)
    second = load_pretrained(b)
    contexts = [each.context for each in (first, second) if each.context is not None]
    length = seq_len or min(contexts, default=None)
    return difference(*(measure(each, sources, sequences, length) for each in (first, second)))


def difference(a: Measured, b: Measured) -> Difference:
    """Compare two models, measured on the same sequences."""
    assert [each.key for each in a.documents] == [each.key for each in b.documents]
    nats_a, nats_b = (np.array([each.nats for each in measured.documents]) for measured in (a, b))
    size = np.array([each.bytes for each in a.documents], np.float64)
    tokens = sum(each.tokens for each in a.documents)
    delta, error = ratio((nats_b - nats_a) / math.log(2), size)
    first, _ = ratio(nats_a / math.log(2), size)
    second, _ = ratio(nats_b / math.log(2), size)
    assert delta is not None and first is not None and second is not None, "the sequences contain text"
    return Difference(
        a=first,
        b=second,
        difference=delta,
        error=error,
        low=None if error is None else delta - _NORMAL_95 * error,
        high=None if error is None else delta + _NORMAL_95 * error,
        loss_a=float(nats_a.sum()) / tokens,
        loss_b=float(nats_b.sum()) / tokens,
        documents=len(size),
        tokens=tokens,
        bytes=int(size.sum()),
        b_better=float((nats_b < nats_a).mean()),
    )
