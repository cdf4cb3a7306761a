"""Compare two runs step by step: the data they saw, their losses, and the first step at which they differ.

Reads only the two run directories, so it works while the runs are in progress and after they were killed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.run.changes import flatten
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.metrics import iterate_metrics
from codeparrot_ds.system.files import read_json

# Keys that two runs cannot share, or that are mere paths. The content of ds_config.json is compared instead.
_IGNORED = {"name", "runs", "engine.deepspeed"}
_SPREAD, _BEFORE, _AFTER = 6, 2, 3  # rows of the table: over all steps, and around the first difference


@dataclass(frozen=True)
class Side:
    """One of the two runs.

    Attributes:
        run: run directory.
        state: state in status.json ("running" also after a kill), or None.
        world_size: number of ranks, if status.json has it.
        steps: training steps recorded in the requested range.
        only_here: steps of these that the other run lacks.
        taken_again: rows in all of metrics.jsonl that are ignored because the run went back and repeated these steps.
    """

    run: str
    state: str | None
    world_size: int | None
    steps: int
    only_here: int
    taken_again: int


@dataclass(frozen=True)
class Peak:
    """The largest difference between the runs, and the first step at which it occurs."""

    difference: float
    step: int


@dataclass(frozen=True)
class DataAgreement:
    """Digests of the token ids fed to the model: steps compared, number that differ, and the first that differs."""

    steps: int
    different: int
    first_different: int | None


@dataclass(frozen=True)
class Agreement:
    """Agreement of one figure between both runs.

    Attributes:
        steps: number of steps compared.
        different: number of steps at which any bit differs.
        first_different: first of these steps.
        first_beyond: first step whose difference exceeds the tolerance, or at which only one run has a number.
        absolute: largest absolute difference over the steps at which both runs have a number; None if there are none.
        relative: largest difference relative to the larger of the two figures, over the same steps.
        not_finite: steps at which a run has no number: NaN and infinity are null in metrics.jsonl. Two nulls are equal.
    """

    steps: int
    different: int
    first_different: int | None
    first_beyond: int | None
    absolute: Peak | None
    relative: Peak | None
    not_finite: int


@dataclass(frozen=True)
class Row:
    """A step of the table. Losses are nats per token, None if not finite; `difference` is B minus A."""

    step: int
    same_data: bool
    loss_a: float | None
    loss_b: float | None
    difference: float | None


@dataclass(frozen=True)
class Comparison:
    """Comparison of two runs over their common steps.

    Attributes:
        tolerance: relative tolerance of losses; 0 requires bit-identical losses.
        first_step, last_step: first and last step compared.
        recipe: dotted key -> its values in A and B, for keys that differ (engine keys are prefixed with "ds_config.");
            None for a key that one of them lacks.
        table: steps around the first difference, evenly spaced steps, and the steps named in `loss`.
    """

    a: Side
    b: Side
    tolerance: float
    first_step: int
    last_step: int
    recipe: dict[str, tuple[Any, Any]]
    data: DataAgreement
    loss: Agreement
    loss_valid: Agreement
    learning_rate: Agreement
    table: list[Row]

    @property
    def same(self) -> bool:
        """Whether the data is the same at every common step, and every loss is within the tolerance."""
        return not self.data.different and self.loss.first_beyond is None and self.loss_valid.first_beyond is None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"same": self.same, **asdict(self)}


def compare(
    run_a: RunDirectory, run_b: RunDirectory, tolerance: float = 1e-3, first: int = 0, end: int | None = None
) -> Comparison:
    """Compare two runs, finished or not.

    Args:
        run_a, run_b: the run directories.
        tolerance: relative tolerance of losses; 0 requires bit-identical losses.
        first, end: compare training steps from `first` to `end`, `end` excluded, and validation losses from `first` to
            `end` included, which is the evaluation after the last of these steps.

    Raises:
        DataError: no such run, no metrics in it, or no common step.
        ConfigError: the global batch sizes differ, so that steps do not correspond, or the tolerance is negative or
            not finite.
    """
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance {tolerance}: give 0 or a positive number, e.g. 1e-3.")
    a, b = _Recorded.read(run_a), _Recorded.read(run_b)
    if a.global_batch_size != b.global_batch_size:
        raise ConfigError(
            f"{run_a.path} takes {a.global_batch_size} sequences per step, {run_b.path} {b.global_batch_size} "
            "(batch.global_batch_size): their steps do not correspond. Compare runs with the same global batch size."
        )
    last = math.inf if end is None else end
    steps_a, steps_b = ({step for step in side.train if first <= step < last} for side in (a, b))
    common = sorted(steps_a & steps_b)
    if not common:
        asked = "" if end is None and first == 0 else f" within --steps {first}:{'' if end is None else end}"
        raise DataError(
            f"no common steps{asked}: {run_a.path} has {step_span(a.train)}, {run_b.path} has {step_span(b.train)}. "
            "Train one of them further, or compare other runs."
        )
    differing = [step for step in common if a.train[step].batch_digest != b.train[step].batch_digest]
    evaluated = sorted(step for step in a.valid.keys() & b.valid.keys() if first <= step <= last)
    data = DataAgreement(len(common), len(differing), differing[0] if differing else None)
    loss = _agreement([(k, a.train[k].loss, b.train[k].loss) for k in common], tolerance)
    rates = [(k, a.train[k].learning_rate, b.train[k].learning_rate) for k in common]
    return Comparison(
        a=a.side(steps_a, steps_b),
        b=b.side(steps_b, steps_a),
        tolerance=tolerance,
        first_step=common[0],
        last_step=common[-1],
        recipe={
            key: (a.recipe.get(key), b.recipe.get(key))
            for key in [*a.recipe, *(key for key in b.recipe if key not in a.recipe)]
            if key not in _IGNORED and a.recipe.get(key) != b.recipe.get(key)
        },
        data=data,
        loss=loss,
        loss_valid=_agreement([(k, a.valid[k], b.valid[k]) for k in evaluated], tolerance),
        learning_rate=_agreement(rates, tolerance),
        table=[_row(k, a.train[k], b.train[k]) for k in _table_steps(common, data, loss)],
    )


@dataclass(frozen=True)
class _Step:
    batch_digest: str
    loss: float | None
    learning_rate: float | None


@dataclass(frozen=True)
class _Recorded:
    """Content of a run directory: flat recipe, status, and training steps and validation losses by step."""

    run: RunDirectory
    recipe: dict[str, Any]
    status: dict[str, Any]
    train: dict[int, _Step]
    valid: dict[int, float | None]
    taken_again: int

    @classmethod
    def read(cls, run: RunDirectory) -> "_Recorded":
        """Read a run directory. Raises DataError if it is not a run, or has recorded no step."""
        if not run.path.is_dir():
            raise DataError(
                f"{run.path}: no such run. Give the directory that holds its recipe.yaml and metrics.jsonl."
            )
        recipe = read_settings(run)
        train: dict[int, _Step] = {}
        valid: dict[int, float | None] = {}
        taken_again = 0
        for number, row in enumerate(_read_rows(run.metrics), start=1):
            try:
                if row["kind"] == "train":
                    step = int(row["step"])
                    if step in train:  # the run went back: its later rows no longer count
                        rows = len(train)
                        train = {k: v for k, v in train.items() if k < step}
                        valid = {k: v for k, v in valid.items() if k <= step}
                        taken_again += rows - len(train)
                    train[step] = _Step(row["batch_digest"], _number(row["loss"]), _number(row["learning_rate"]))
                elif row["kind"] == "valid":
                    valid[int(row["step"])] = _number(row["loss_valid"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{run.metrics}: row {number} is not a valid training record ({type(error).__name__}: {error})."
                ) from None
        if not train:
            raise DataError(
                f"{run.metrics}: no training step recorded. A run records its steps every logging.every_steps "
                f"({recipe.get('logging.every_steps')}) steps: wait for the first, or give another run."
            )
        status = run.read_status() if run.status_file.exists() else {}
        return cls(run, recipe, status, train, valid, taken_again)

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.recipe["batch.global_batch_size"]

    def side(self, steps: set[int], others: set[int]) -> Side:
        """Summarize this run relative to the other, whose steps are `others`."""
        return Side(
            run=str(self.run.path),
            state=self.status.get("state"),
            world_size=self.status.get("world_size"),
            steps=len(steps),
            only_here=len(steps - others),
            taken_again=self.taken_again,
        )


def read_settings(run: RunDirectory) -> dict[str, Any]:
    """Read resolved recipe and DeepSpeed JSON into dotted keys, unvalidated: another version may have written them."""
    try:
        body = yaml.safe_load(run.recipe.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{run.path}: no run here: a run directory holds recipe.yaml and metrics.jsonl.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{run.recipe}: not valid YAML ({' '.join(str(error).split())}).") from None
    recipe = flatten(body)
    if "batch.global_batch_size" not in recipe:
        raise DataError(f"{run.recipe}: not the recipe of a run: batch.global_batch_size is missing.")
    if run.ds_config.exists():
        recipe |= flatten({"ds_config": read_json(run.ds_config, "DeepSpeed JSON")})
    return recipe


def _read_rows(metrics: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from iterate_metrics(metrics)
    except UnicodeDecodeError as error:
        raise DataError(f"{metrics}: damaged: not UTF-8 text ({error}).") from None


def _number(value: Any) -> float | None:
    """Return a finite float, or None."""
    return float(value) if value is not None and math.isfinite(float(value)) else None


def _agreement(pairs: Sequence[tuple[int, float | None, float | None]], tolerance: float) -> Agreement:
    """Compare (step, figure of A, figure of B) tuples, in step order."""
    different, beyond, not_finite = [], [], 0
    absolute, relative = [], []
    for step, a, b in pairs:
        if a != b:
            different.append(step)
        if a is None or b is None:
            not_finite += 1
            if a != b:
                beyond.append(step)
            continue
        distance = abs(a - b)
        share = distance / max(abs(a), abs(b)) if distance else 0.0
        absolute.append(Peak(distance, step))
        relative.append(Peak(share, step))
        if share > tolerance:
            beyond.append(step)
    return Agreement(
        steps=len(pairs),
        different=len(different),
        first_different=different[0] if different else None,
        first_beyond=beyond[0] if beyond else None,
        absolute=max(absolute, key=lambda peak: peak.difference, default=None),
        relative=max(relative, key=lambda peak: peak.difference, default=None),
        not_finite=not_finite,
    )


def _row(step: int, a: _Step, b: _Step) -> Row:
    difference = None if a.loss is None or b.loss is None else b.loss - a.loss
    return Row(step, a.batch_digest == b.batch_digest, a.loss, b.loss, difference)


def _table_steps(common: Sequence[int], data: DataAgreement, loss: Agreement) -> list[int]:
    """Choose table steps: evenly spaced, around the first difference, first beyond the tolerance, most different."""
    shown = {common[i * (len(common) - 1) // (_SPREAD - 1)] for i in range(_SPREAD)}
    firsts = [step for step in (data.first_different, loss.first_different) if step is not None]
    if firsts:
        at = common.index(min(firsts))
        shown.update(common[max(at - _BEFORE, 0) : at + _AFTER + 1])
    if loss.first_beyond is not None:
        shown.add(loss.first_beyond)
    if loss.absolute is not None and loss.absolute.difference:
        shown.add(loss.absolute.step)
    return sorted(shown)


def step_span(steps: Mapping[int, Any]) -> str:
    """Format the first and last step for a message."""
    return f"steps {min(steps)} to {max(steps)}"
