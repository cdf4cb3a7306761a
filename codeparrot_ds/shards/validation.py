"""The fixed validation set and its baseline losses, shared by training, evaluation and conversion."""

import math

import numpy as np


def validation_sequences(available: int, wanted: int) -> np.ndarray:
    """Up to `wanted` evenly spaced sequence numbers out of `available`, [n] int64. Deterministic."""
    count = min(available, wanted)
    return np.arange(count, dtype=np.int64) * available // max(count, 1)


def unigram_loss(targets: np.ndarray, vocab_size: int) -> float:
    """Mean loss (nats per token) of the best model that ignores context: the entropy of the targets' frequencies.

    The frequencies are fitted to the same tokens, so a model must use context to get a lower loss.

    Args:
        targets: integers below `vocab_size`, of any shape.
        vocab_size: number of token ids.
    """
    counts = np.bincount(targets.ravel(), minlength=vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def perplexity(loss: float) -> float:
    """exp(loss), or inf if that overflows a double."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
