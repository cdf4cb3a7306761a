"""Figures of a finished run, from source files to converted model, collected from the outputs of all stages."""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from codeparrot_ds.documents.splits import SPLITS
from codeparrot_ds.errors import DataError
from codeparrot_ds.evaluation.loss import ValidationLoss
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.metrics import read_metrics
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.system.paths import is_remote


@dataclass(frozen=True)
class Summary:
    """Figures of one run. Losses are nats per token; `seconds` is the wall time measured by the caller."""

    files: int
    tokens: int
    vocab_size: int
    parameters: int
    tokens_per_second: float
    loss_step0: float
    loss_valid: float
    perplexity_valid: float
    loss_unigram: float
    perplexity_unigram: float
    seconds: float | None
    paths: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def summarize(run: RunDirectory, model: Path, tokenizer: Path, loss: ValidationLoss, seconds: float | None) -> Summary:
    """Collect the figures of a finished run.

    Args:
        run: a run trained to its last step.
        model: converted model of the run.
        tokenizer: directory of the tokenizer that the shards were built with.
        loss: loss of `model` on the run's validation sequences.
        seconds: wall time to report, or None.

    Raises:
        DataError: the run has not finished.
    """
    status = run.read_status()
    if status.get("state") != "finished":
        raise DataError(f"{run.status_file}: the run is {status.get('state')!r}, not finished. Train it first.")
    directories = list(load_recipe(run.recipe).data.sources)
    manifests = [Manifest.read(directory) for directory in directories]
    steps = [row for row in read_metrics(run.metrics) if row["kind"] == "train"]
    return Summary(
        files=sum(shard.documents for manifest in manifests for shard in manifest.shards),
        tokens=sum(manifest.tokens(split) for manifest in manifests for split in SPLITS),
        vocab_size=manifests[0].vocab_size,
        parameters=status["parameters"],
        tokens_per_second=median(row["tokens_per_second"] for row in steps),
        loss_step0=steps[0]["loss"],
        loss_valid=loss.loss_valid,
        perplexity_valid=loss.perplexity_valid,
        loss_unigram=loss.loss_unigram,
        perplexity_unigram=loss.perplexity_unigram,
        seconds=seconds,
        paths={
            "corpus": ", ".join(
                name if is_remote(name) else _shown(Path(name)) for manifest in manifests for name in manifest.inputs
            ),
            "tokenizer": str(tokenizer),
            "shards": ", ".join(map(_shown, directories)),
            "run": str(run.path),
            "checkpoint": status["checkpoint"],
            "model": str(model),
        },
    )


def _shown(path: Path) -> str:
    """Return `path` relative to the current directory if it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def as_rows(summary: Summary) -> list[tuple[str, str]]:
    """Return (name, value) of each figure, for a table."""
    rows = [
        ("source files", f"{summary.files:,}"),
        ("tokens", f"{summary.tokens:,} ({summary.vocab_size:,} in the vocabulary)"),
        ("parameters", f"{summary.parameters:,}"),
        ("training speed", f"{summary.tokens_per_second:,.0f} tokens/s"),
        ("loss at step 0", f"{summary.loss_step0:.4f}"),
        ("validation loss", f"{summary.loss_valid:.4f} (unigram {summary.loss_unigram:.4f})"),
        ("perplexity", f"{summary.perplexity_valid:,.1f} (unigram {summary.perplexity_unigram:,.1f})"),
    ]
    if summary.seconds is not None:
        rows.append(("time", f"{summary.seconds:,.0f} s"))
    return rows + [(name, path) for name, path in summary.paths.items()]
