"""The fixed validation set, and what a loss on it is worth: shared by training, evaluation and conversion."""

import math

import numpy as np


def validation_sequences(available: int, wanted: int) -> np.ndarray:
    """`wanted` of `available` sequence numbers (or all of them), evenly spread, [n] int64. Always the same."""
    count = min(available, wanted)
    return np.arange(count, dtype=np.int64) * available // max(count, 1)


def unigram_loss(targets: np.ndarray, vocab_size: int) -> float:
    """Mean loss (nats per token) of the best model that ignores context: the entropy of the targets' own counts.

    targets: integers of any shape below vocab_size. Fitted to the very tokens it is scored on, so a model must
    use context to come below it.
    """
    counts = np.bincount(targets.ravel(), minlength=vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def perplexity(loss: float) -> float:
    """exp(loss), with inf where that overflows a double."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
