"""The validation sequences of a run: what a model that ignores context loses on them, and their bytes per token."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.shards.validation import unigram_loss, validation_sequences
from codeparrot_ds.tokenizer.encode import Encoder


@dataclass(frozen=True)
class HeldOut:
    """Validation sequences.

    Attributes:
        sequences, tokens, bytes: number of sequences, of targets in them, and of the bytes of text these stand for.
        loss_unigram: nats per token of the best model that ignores context.
    """

    sequences: int
    tokens: int
    bytes: int
    loss_unigram: float

    def bits_per_byte(self, loss: float) -> float | None:
        """A mean loss over these sequences, nats per token, in bits per byte of UTF-8; None without text."""
        return loss * self.tokens / (self.bytes * math.log(2)) if self.bytes else None


def read_held_out(shards: Mapping[Path, float], seq_len: int, sequences: int) -> HeldOut:
    """Read the validation sequences that training evaluates on. Raises DataError without intact shards.

    Args:
        shards: the directories of a recipe with their weights.
        seq_len: length of a sequence (tokens).
        sequences: maximum number of sequences.
    """
    data = Dataset.open(shards, seq_len)
    valid = data.require_valid()
    targets = valid.batch(validation_sequences(len(valid), sequences))[:, 1:]
    encoder = Encoder(next(iter(shards)) / "tokenizer")
    size = max(int(targets.max()) + 1, encoder.vocab_size)
    bytes_of = np.zeros(size, np.int64)  # ids without a token have no bytes
    known = encoder.token_bytes()
    bytes_of[: len(known)] = known
    return HeldOut(len(targets), targets.size, int(bytes_of[targets].sum()), unigram_loss(targets, size))
