"""Loss of a model on the fixed validation sequences that training evaluates on, document by document."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.evaluation.pretrained import Pretrained
from codeparrot_ds.shards.inspect import documents_of
from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.shards.validation import unigram_loss, validation_sequences
from codeparrot_ds.system.jobs import Slice, progress

_BATCH = 8  # sequences per forward pass


@dataclass(frozen=True)
class DocumentLoss:
    """What a model predicted of one document: those of its tokens that are targets in the sequences.

    Attributes:
        source, shard, document: index of the shard directory, name of the shard, index in it.
        repository, licence: where the document is from; None if unknown.
        length: tokens of the whole document.
        tokens, bytes: targets, and bytes of text that they stand for; end tokens stand for none.
        nats: sum of the losses of these targets.
    """

    source: int
    shard: str
    document: int
    repository: str | None
    licence: str | None
    length: int
    tokens: int
    bytes: int
    nats: float

    @property
    def key(self) -> tuple[int, str, int]:
        """Equal for parts of the same document."""
        return self.source, self.shard, self.document


@dataclass(frozen=True)
class Measured:
    """The loss on some sequences.

    Attributes:
        documents: of these sequences.
        sequences: number of sequences.
        loss_unigram: loss of a unigram model on all sequences, whatever the slice (nats per token).
    """

    documents: list[DocumentLoss]
    sequences: int
    loss_unigram: float


def measure(
    found: Pretrained,
    sources: Mapping[Path, float],
    sequences: int,
    seq_len: int | None = None,
    part: Slice | None = None,
) -> Measured:
    """Compute the loss of a model on the validation split of `sources`.

    Args:
        found: the model.
        sources: shard directories built with the model's tokenizer, with their weights, as in a recipe.
        sequences: maximum number of sequences, evenly spaced.
        seq_len: length of a sequence (tokens); default: the model's context.
        part: evaluate only this slice of the sequences.

    Raises:
        ConfigError: `seq_len` exceeds the context, or is needed because the model states none.
        DataError: the shards are damaged, too small, or were built with another tokenizer.
    """
    length = seq_len or found.context
    if length is None:
        raise ConfigError(f"{found.name}: states no context. Set the length of the sequences: --seq-len.")
    if found.context is not None and length > found.context:
        raise ConfigError(f"--seq-len {length:,}: exceeds the model's context of {found.context:,} tokens.")
    data = Dataset.open(sources, length)
    data.require_valid()
    fix = "Ids mean something else to the model: use shards that were built with its tokenizer."
    for directory in sources:
        found.encoder.require_same_ids(directory / "tokenizer", fix)
    numbers = validation_sequences(len(data.valid), sequences)
    ids = data.valid.batch(numbers)
    rows = found.model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= rows:
        raise ConfigError(
            f"{', '.join(map(str, sources))}: contains token ids beyond the model's vocabulary of {rows:,}. Use shards "
            "that were built with the model's tokenizer."
        )
    unigram = unigram_loss(ids[:, 1:], rows)
    if part is not None:
        numbers, ids = numbers[part.index :: part.count], ids[part.index :: part.count]
    losses = _losses(found, ids)
    return Measured(_by_document(found, data, numbers, ids, losses), len(ids), unigram)


def _losses(found: Pretrained, ids: np.ndarray) -> np.ndarray:
    """Loss of each target of `ids`, [sequences, seq_len + 1], as [sequences, seq_len] float64 (nats)."""
    losses = np.empty((len(ids), ids.shape[1] - 1))
    starts = range(0, len(ids), _BATCH)
    with torch.inference_mode():
        for start in progress(starts, "evaluating", len(starts), "batch"):
            batch = torch.from_numpy(ids[start : start + _BATCH]).to(found.device)
            logits = found.model(input_ids=batch[:, :-1]).logits.float()
            each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            losses[start : start + len(batch)] = each.view(len(batch), -1).double().cpu().numpy()
    return losses


def _by_document(
    found: Pretrained, data: Dataset, numbers: np.ndarray, ids: np.ndarray, losses: np.ndarray
) -> list[DocumentLoss]:
    sizes = np.zeros(found.model.get_input_embeddings().weight.shape[0], np.int64)  # ids without a token have no bytes
    known = found.encoder.token_bytes()
    sizes[: len(known)] = known
    documents = []
    for row, (_, source, excerpts) in enumerate(documents_of(data, "valid", numbers)):
        start = -1  # of the excerpt among the targets; the sequence's first token is not one
        for each in excerpts:
            targets = slice(max(start, 0), start + each.stop - each.start)
            start = targets.stop
            if targets.start == targets.stop:
                continue
            provenance = each.provenance
            documents.append(
                DocumentLoss(
                    source=source,
                    shard=each.shard,
                    document=each.document,
                    repository=(provenance.repository or None) if provenance else None,
                    licence=(provenance.licence or None) if provenance else None,
                    length=each.tokens,
                    tokens=targets.stop - targets.start,
                    bytes=int(sizes[ids[row, 1:][targets]].sum()),
                    nats=float(losses[row, targets].sum()),
                )
            )
    return merge_documents(documents)


def merge_documents(documents: list[DocumentLoss]) -> list[DocumentLoss]:
    """Add up the parts of each document, which may be in several sequences. Sorted by position in the shards."""
    merged: dict[tuple[int, str, int], DocumentLoss] = {}
    for each in sorted(documents, key=lambda part: part.key):
        before = merged.get(each.key)
        if before is not None:
            sums = {name: getattr(before, name) + getattr(each, name) for name in ("tokens", "bytes", "nats")}
            each = DocumentLoss(**{**vars(each), **sums})
        merged[each.key] = each
    return list(merged.values())
