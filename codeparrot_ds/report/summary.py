"""Figures of a run, from source files to converted model, collected from the outputs of all stages."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codeparrot_ds.documents.splits import SPLITS
from codeparrot_ds.report.run_facts import RunFacts
from codeparrot_ds.shards.validation import perplexity
from codeparrot_ds.system.paths import is_remote

if TYPE_CHECKING:  # it imports torch
    from codeparrot_ds.evaluation.loss import ValidationLoss


@dataclass(frozen=True)
class Summary:
    """Figures of one run; None for what is not known. Losses are nats per token.

    Attributes:
        state: "finished", "running", "dead", "preempted", "failed", ...
        step: optimizer steps taken.
        files, tokens, vocab_size: of the shards.
        parameters: number of parameters.
        tokens_per_second: median over the steps.
        loss_step0: training loss of the first step.
        loss_valid, perplexity_valid, bits_per_byte: of the converted model if it was measured, else as the run
            recorded it last.
        loss_unigram, perplexity_unigram: of the best model that ignores context.
        seconds: wall time measured by the caller, or recorded by the run.
        paths: what the figures are of.
    """

    state: str
    step: int
    files: int | None
    tokens: int | None
    vocab_size: int | None
    parameters: int | None
    tokens_per_second: float | None
    loss_step0: float | None
    loss_valid: float | None
    perplexity_valid: float | None
    bits_per_byte: float | None
    loss_unigram: float | None
    perplexity_unigram: float | None
    seconds: float | None
    paths: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def summarize(facts: RunFacts, loss: "ValidationLoss | None" = None, seconds: float | None = None) -> Summary:
    """Collect the figures of a run.

    Args:
        facts: of the run.
        loss: loss of its converted model on its validation sequences, if it was measured.
        seconds: wall time to report; default: that of its attempts.
    """
    curves, manifests, held_out = facts.curves, facts.manifests, facts.held_out
    speed, first = curves.get("tokens_per_second").finite(), curves.loss
    loss_valid = facts.loss_valid if loss is None else loss.loss_valid
    unigram = held_out.loss_unigram if held_out is not None else None
    bits = held_out.bits_per_byte(loss_valid) if held_out is not None and loss_valid is not None else None
    if loss is not None:
        unigram, bits = loss.loss_unigram, loss.bits_per_byte
    return Summary(
        state=facts.state,
        step=facts.steps_taken,
        files=None if manifests is None else sum(s.documents for manifest in manifests for s in manifest.shards),
        tokens=None if manifests is None else sum(manifest.tokens(s) for manifest in manifests for s in SPLITS),
        vocab_size=None if manifests is None else manifests[0].vocab_size,
        parameters=facts.parameters,
        tokens_per_second=float(np.median(speed.values)) if len(speed) else None,
        loss_step0=float(first.values[0]) if len(first) and np.isfinite(first.values[0]) else None,
        loss_valid=loss_valid,
        perplexity_valid=None if loss_valid is None else perplexity(loss_valid),
        bits_per_byte=bits,
        loss_unigram=unigram,
        perplexity_unigram=None if unigram is None else perplexity(unigram),
        seconds=facts.history.seconds if seconds is None else seconds,
        paths=_paths(facts),
    )


def _paths(facts: RunFacts) -> dict[str, str]:
    """What is where; without what is not there."""
    inputs = [name for manifest in facts.manifests or [] for name in manifest.inputs]
    checkpoint = facts.status.facts.get("checkpoint")
    found = {
        "corpus": ", ".join(name if is_remote(name) else _shown(Path(name)) for name in inputs),
        "tokenizer": "" if facts.tokenizer is None else _shown(facts.tokenizer),
        "shards": ", ".join(map(_shown, facts.shards)),
        "run": str(facts.run.path),
        "checkpoint": checkpoint if isinstance(checkpoint, str) else "",
        "model": "" if facts.model is None else str(facts.model),
    }
    return {name: path for name, path in found.items() if path}


def _shown(path: Path) -> str:
    """Return `path` relative to the current directory if it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def as_rows(summary: Summary) -> list[tuple[str, str]]:
    """Return (name, value) of each figure that is known, for a table."""

    def and_unigram(value: float | None, unigram: float | None, digits: str) -> str | None:
        if value is None:
            return None
        return f"{value:{digits}}" + ("" if unigram is None else f" (unigram {unigram:{digits}})")

    vocabulary = "" if summary.vocab_size is None else f" ({summary.vocab_size:,} in the vocabulary)"
    bits = summary.bits_per_byte
    rows = [
        ("state", None if summary.state == "finished" else f"{summary.state}, {summary.step:,} steps taken"),
        ("source files", _count(summary.files)),
        ("tokens", None if summary.tokens is None else f"{summary.tokens:,}{vocabulary}"),
        ("parameters", _count(summary.parameters)),
        ("training speed", None if summary.tokens_per_second is None else f"{summary.tokens_per_second:,.0f} tokens/s"),
        ("loss at step 0", None if summary.loss_step0 is None else f"{summary.loss_step0:.4f}"),
        ("validation loss", and_unigram(summary.loss_valid, summary.loss_unigram, ".4f")),
        ("perplexity", and_unigram(summary.perplexity_valid, summary.perplexity_unigram, ",.1f")),
        ("bits per byte", None if bits is None else f"{bits:.4f}"),
        ("time", None if summary.seconds is None else f"{summary.seconds:,.0f} s"),
    ]
    return [(name, value) for name, value in rows if value is not None] + list(summary.paths.items())


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"
