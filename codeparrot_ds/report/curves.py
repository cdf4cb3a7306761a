"""The curves of a run, read from metrics.jsonl, and a bounded number of points of each that still shows every spike."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.errors import DataError
from codeparrot_ds.run.metrics import iterate_metrics

BUCKETS = 600  # of a curve; wider than the columns of pixels of most charts
# Figures of a step and of an evaluation. Older versions wrote fewer.
TRAIN = (
    "loss",
    "learning_rate",
    "gradient_norm",
    "step_seconds",
    "data_seconds",
    "tokens_per_second",
    "mfu",
    "peak_memory_bytes",
    "tokens_seen",
    "skipped_steps",
)
VALID = ("loss_valid",)


@dataclass(frozen=True)
class Curve:
    """A figure over steps.

    Attributes:
        steps: [points] int64, increasing.
        values: [points] float64, NaN where the figure is not finite.
    """

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        """Number of points."""
        return len(self.steps)

    def finite(self) -> "Curve":
        """The points with a finite value."""
        kept = np.isfinite(self.values)
        return Curve(self.steps[kept], self.values[kept])

    def times(self, factor: float) -> "Curve":
        """This curve with all values multiplied."""
        return Curve(self.steps, self.values * factor)


@dataclass(frozen=True)
class Curves:
    """All curves of a run, by the name that they have in metrics.jsonl.

    Attributes:
        by_name: without figures that are not recorded, or never finite.
        repeated: rows that are ignored because the run took their steps again.
    """

    by_name: Mapping[str, Curve]
    repeated: int

    @property
    def loss(self) -> Curve:
        """Training loss, with its non-finite steps; may be empty."""
        return self.by_name.get("loss", EMPTY)

    def get(self, name: str) -> Curve:
        """A curve; empty if there is none."""
        return self.by_name.get(name, EMPTY)

    @property
    def skipped(self) -> np.ndarray:
        """The steps that were skipped, [n] int64: where the total of skipped steps grows."""
        totals = self.get("skipped_steps")
        return totals.steps[np.diff(totals.values, prepend=0.0) > 0] if len(totals) else totals.steps


EMPTY = Curve(np.empty(0, np.int64), np.empty(0))


def read_curves(path: Path) -> Curves:
    """Read metrics.jsonl; without the file, there are no curves. Raises DataError for a damaged line."""
    columns = {kind: {name: array("d") for name in names} for kind, names in (("train", TRAIN), ("valid", VALID))}
    steps = {kind: array("q") for kind in columns}
    repeated = 0
    try:
        for number, row in enumerate(iterate_metrics(path), start=1):
            kind = row.get("kind") if isinstance(row, dict) else None
            if kind not in columns:
                continue
            try:
                step = int(row["step"])
                values = [_number(row.get(name)) for name in columns[kind]]
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise DataError(
                    f"{path}: row {number} is not a valid record ({type(error).__name__}: {error}). Fix or remove it."
                ) from None
            if steps["train"] and kind == "train" and step <= steps["train"][-1]:  # went back, without dropping rows
                repeated += _rewind(steps, columns, step)
            if kind == "valid" and steps["valid"] and step <= steps["valid"][-1]:
                _cut(steps["valid"], columns["valid"], step)
            steps[kind].append(step)
            for column, value in zip(columns[kind].values(), values, strict=True):
                column.append(value)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: damaged: not UTF-8 text ({error}).") from None
    found = {}
    for kind, of_kind in columns.items():
        for name, column in of_kind.items():
            curve = Curve(np.array(steps[kind], np.int64), np.array(column))
            if name == "loss" or np.isfinite(curve.values).any():
                found[name] = curve
    return Curves({name: curve for name, curve in found.items() if len(curve)}, repeated)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _rewind(steps: dict[str, "array[int]"], columns: dict[str, dict[str, "array[float]"]], step: int) -> int:
    """Drop the rows of `step` and later ones, and evaluations after `step` steps. Returns the number of steps."""
    before = len(steps["train"])
    _cut(steps["train"], columns["train"], step)
    _cut(steps["valid"], columns["valid"], step + 1)
    return before - len(steps["train"])


def _cut(steps: "array[int]", columns: dict[str, "array[float]"], step: int) -> None:
    while steps and steps[-1] >= step:
        steps.pop()
        for column in columns.values():
            column.pop()


def smoothed(curve: Curve) -> tuple[Curve, float]:
    """The exponential moving average of a curve's finite values, and its half-life in recorded steps.

    The half-life is 1 % of the steps. The start is not biased towards 0: weights add up to 1 from the first step on.
    """
    finite = curve.finite()
    half_life = max(len(finite) / 100, 1.0)
    keep = 0.5 ** (1 / half_life)
    out, mean, weight = np.empty(len(finite)), 0.0, 0.0
    for i, value in enumerate(finite.values.tolist()):
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out[i] = mean / weight
    return Curve(finite.steps, out), half_life


def thin(curve: Curve, buckets: int = BUCKETS) -> Curve:
    """A curve with at most 3 points for each of `buckets` equal parts, and its first and last point.

    Of a part with more points, the lowest, the highest and the first that is not finite remain, each at its own step:
    a spike of one step in a million is still there.
    """
    count = len(curve)
    if count <= 2 * buckets:
        return curve
    kept = {0, count - 1}
    edges = np.linspace(0, count, buckets + 1).astype(np.int64)
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = curve.values[low:high]
        finite = np.isfinite(part)
        if not finite.all():
            kept.add(low + int(finite.argmin()))
        if finite.any():
            kept.add(low + int(np.nanargmin(np.where(finite, part, np.nan))))
            kept.add(low + int(np.nanargmax(np.where(finite, part, np.nan))))
    chosen = np.array(sorted(kept), np.int64)
    return Curve(curve.steps[chosen], curve.values[chosen])
