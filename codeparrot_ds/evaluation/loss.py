"""Validation loss of a Hugging Face model on the fixed sequences that training evaluates on."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.evaluation.pretrained import load_pretrained
from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.shards.validation import perplexity, unigram_loss, validation_sequences
from codeparrot_ds.system.jobs import Slice, progress
from codeparrot_ds.tokenizer.directory import TOKENIZER_FILE, require_same_encoding


@dataclass(frozen=True)
class ValidationLoss:
    """Losses in nats per token, over `tokens` targets in `sequences` sequences."""

    loss_valid: float
    perplexity_valid: float
    loss_unigram: float
    perplexity_unigram: float
    sequences: int
    tokens: int

    @classmethod
    def parse(cls, output: str) -> "ValidationLoss":
        """Parse the output of `evaluate loss --json` on another host. Raises DataError."""
        try:
            return cls(**json.loads(output[output.rindex("{") :]))  # the shell may print text before it
        except (ValueError, TypeError):
            raise DataError(f"a host returned no loss. The end of its output: {output[-200:]!r}.") from None

    @classmethod
    def merge(cls, parts: Sequence["ValidationLoss"]) -> "ValidationLoss":
        """Combine the slices of one set of sequences. Raises DataError if the sequences differ."""
        unigram_loss = parts[0].loss_unigram
        if not all(math.isclose(part.loss_unigram, unigram_loss, rel_tol=1e-9) for part in parts):
            raise DataError("the hosts evaluated different sequences. Place the same shards at the same path on each.")
        tokens = sum(part.tokens for part in parts)
        loss = sum(part.loss_valid * part.tokens for part in parts) / tokens
        sequences = sum(part.sequences for part in parts)
        return cls(loss, perplexity(loss), unigram_loss, perplexity(unigram_loss), sequences, tokens)


def validation_loss(
    model_directory: Path,
    shards: Path | Mapping[Path, float],
    sequences: int,
    batch_size: int = 8,
    part: Slice | None = None,
) -> ValidationLoss:
    """Compute the loss of a converted model on the validation split of `shards`, and that of a unigram model.

    Args:
        model_directory: a Hugging Face directory.
        shards: a shard directory built with the same tokenizer, or a recipe's directories with their weights.
        sequences: maximum number of sequences, evenly spaced; each as long as the model's context.
        batch_size: sequences per forward pass.
        part: evaluate only this slice; the unigram loss covers all sequences. If the slice is empty, its loss is 0.
    """
    model, _, device = load_pretrained(model_directory)
    sources = {shards: 1.0} if isinstance(shards, Path) else shards
    valid = Dataset.open(sources, model.config.n_positions).require_valid()
    for directory in sources if (model_directory / TOKENIZER_FILE).exists() else ():
        fix = "Ids mean something else to the model: use shards that were built with its tokenizer."
        require_same_encoding(directory / "tokenizer", model_directory, fix)
    numbers = validation_sequences(len(valid), sequences)
    ids = torch.from_numpy(valid.batch(numbers))
    if int(ids.max()) >= model.config.vocab_size:
        raise ConfigError(
            f"{', '.join(map(str, sources))}: contains token ids beyond the model's vocabulary of "
            f"{model.config.vocab_size:,}. Use shards that were built with the model's tokenizer."
        )
    unigram = unigram_loss(ids[:, 1:].numpy(), model.config.vocab_size)
    total, ids = 0.0, ids if part is None else ids[part.index :: part.count]
    batches = ids.split(batch_size) if len(ids) else ()
    with torch.no_grad():
        for batch in progress(batches, "evaluating", len(batches), "batch"):
            logits = model(input_ids=batch[:, :-1].to(device)).logits.float()
            targets = batch[:, 1:].to(device)
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    loss = total / max(1, len(ids) * valid.seq_len)
    return ValidationLoss(loss, perplexity(loss), unigram, perplexity(unigram), len(ids), len(ids) * valid.seq_len)
