"""Validation loss and bits per byte, with standard errors, in total and by kind of document."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.errors import DataError
from codeparrot_ds.evaluation.document_loss import DocumentLoss, Measured, measure, merge_documents
from codeparrot_ds.evaluation.pretrained import load_pretrained
from codeparrot_ds.shards.validation import perplexity

_LENGTHS = (256, 1024, 4096, 16384)  # tokens: bounds of the groups by length
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Group:
    """Losses of the documents that have something in common.

    Attributes:
        name: what they have in common.
        documents, tokens, bytes: their number, their targets, and the bytes of text that these stand for.
        loss: nats per token.
        bits_per_byte: bits per byte of UTF-8; null without text.
        bits_per_byte_error: its standard error; null for a single document.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    loss: float
    bits_per_byte: float | None
    bits_per_byte_error: float | None


@dataclass(frozen=True)
class ValidationLoss:
    """Losses over `tokens` targets in `sequences` sequences.

    Attributes:
        loss_valid: nats per token.
        loss_error: its standard error, for which the documents count as independent; null for a single document.
        perplexity_valid: exp(loss_valid).
        bits_per_byte: bits per byte of UTF-8; the end token of a document costs bits and has no bytes. Independent of
            the tokenizer.
        bits_per_byte_error: its standard error.
        loss_unigram, perplexity_unigram: of the best model that ignores context.
        sequences, documents, tokens, bytes: what was evaluated on.
        by_licence, by_repository, by_length: groups of documents, the most bytes first; lengths in order.
    """

    loss_valid: float
    loss_error: float | None
    perplexity_valid: float
    bits_per_byte: float | None
    bits_per_byte_error: float | None
    loss_unigram: float
    perplexity_unigram: float
    sequences: int
    documents: int
    tokens: int
    bytes: int
    by_licence: list[Group]
    by_repository: list[Group]
    by_length: list[Group]

    @classmethod
    def of(cls, measured: Measured) -> "ValidationLoss":
        """Sum up. With nothing measured (an empty slice) the loss is 0."""
        documents = measured.documents
        tokens, nats = _column(documents, "tokens"), _column(documents, "nats")
        loss, loss_error = ratio(nats, tokens) if documents else (0.0, None)
        bits, bits_error = ratio(nats / math.log(2), _column(documents, "bytes"))
        return cls(
            loss_valid=loss or 0.0,
            loss_error=loss_error,
            perplexity_valid=perplexity(loss or 0.0),
            bits_per_byte=bits,
            bits_per_byte_error=bits_error,
            loss_unigram=measured.loss_unigram,
            perplexity_unigram=perplexity(measured.loss_unigram),
            sequences=measured.sequences,
            documents=len(documents),
            tokens=int(tokens.sum()),
            bytes=int(_column(documents, "bytes").sum()),
            by_licence=_groups(documents, lambda each: each.licence or UNKNOWN),
            by_repository=_groups(documents, lambda each: each.repository or UNKNOWN),
            by_length=sorted(_groups(documents, _length_group), key=lambda group: _LENGTH_NAMES.index(group.name)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float | None, float | None]:
    """The ratio of two sums over documents, and its standard error.

    The documents are taken as a sample of independent ones, so that tokens of a document may depend on one another:
    error² = n / (n - 1) * sum((numerator - ratio * denominator)²) / sum(denominator)². Source: Cochran, Sampling
    Techniques, chapter 6.

    Args:
        numerators: one per document, [documents] float64.
        denominators: one per document, [documents].

    Returns:
        None instead of the ratio if the denominators are 0, instead of the error if there is only one document.
    """
    total, count = float(denominators.sum()), len(denominators)
    if total == 0:
        return None, None
    found = float(numerators.sum()) / total
    if count < 2:
        return found, None
    residuals = numerators - found * denominators
    return found, math.sqrt(count / (count - 1) * float((residuals**2).sum())) / abs(total)


_LENGTH_NAMES = [
    f"below {_LENGTHS[0]:,} tokens",
    *(f"{low:,} to {high - 1:,} tokens" for low, high in pairwise(_LENGTHS)),
    f"{_LENGTHS[-1]:,} tokens and more",
]


def _length_group(document: DocumentLoss) -> str:
    return _LENGTH_NAMES[int(np.searchsorted(_LENGTHS, document.length, side="right"))]


def _column(documents: Sequence[DocumentLoss], name: str) -> np.ndarray:
    return np.array([getattr(each, name) for each in documents], np.float64)


def _groups(documents: Sequence[DocumentLoss], name_of: Callable[[DocumentLoss], str]) -> list[Group]:
    members: dict[str, list[DocumentLoss]] = {}
    for document in documents:
        members.setdefault(name_of(document), []).append(document)
    groups = []
    for name, each in members.items():
        nats, tokens, size = (_column(each, column) for column in ("nats", "tokens", "bytes"))
        loss, _ = ratio(nats, tokens)
        bits, error = ratio(nats / math.log(2), size)
        assert loss is not None
        groups.append(Group(name, len(each), int(tokens.sum()), int(size.sum()), loss, bits, error))
    return sorted(groups, key=lambda group: (-group.bytes, group.name))


def dump_measured(measured: Measured) -> str:
    """One line of JSON, for `merge_measured` on another host."""
    return json.dumps(asdict(measured))


def merge_measured(outputs: Sequence[str]) -> Measured:
    """Combine the slices of one set of sequences, from the output of `evaluate loss --slice` on each host.

    Raises DataError if one returned no loss, or the hosts evaluated different sequences.
    """
    parts = []
    for output in outputs:
        try:
            body = json.loads(output[output.rindex('{"documents"') :])  # the shell may print text before it
            parts.append(Measured(**{**body, "documents": [DocumentLoss(**each) for each in body["documents"]]}))
        except (ValueError, TypeError, KeyError):
            raise DataError(f"a host returned no loss. The end of its output: {output[-200:]!r}.") from None
    unigram = parts[0].loss_unigram
    if not all(math.isclose(part.loss_unigram, unigram, rel_tol=1e-9) for part in parts):
        raise DataError("the hosts evaluated different sequences. Place the same shards at the same path on each.")
    documents = merge_documents([document for part in parts for document in part.documents])
    return Measured(documents, sum(part.sequences for part in parts), unigram)


def validation_loss(
    model: str | Path, shards: Path | Mapping[Path, float], sequences: int, seq_len: int | None = None
) -> ValidationLoss:
    """Compute the loss of a model on the validation split of `shards`, and that of a unigram model.

    Args:
        model: see `pretrained.find_model`.
        shards: a shard directory built with the same tokenizer, or a recipe's directories with their weights.
        sequences: maximum number of sequences, evenly spaced.
        seq_len: length of a sequence (tokens); default: the model's context.
    """
    sources = {shards: 1.0} if isinstance(shards, Path) else shards
    return ValidationLoss.of(measure(load_pretrained(model), sources, sequences, seq_len))
