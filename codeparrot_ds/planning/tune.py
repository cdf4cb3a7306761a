"""Time real steps of a recipe on this machine: one trial, or one for each choice that may be the fastest."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import ClusterError
from codeparrot_ds.hosts.launchers import find_deepspeed, ranks_here
from codeparrot_ds.planning.plan import Choice, Plan, Prediction
from codeparrot_ds.system.network import free_port

_SECONDS = 1800.0  # limit per trial; the first compiles operators
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Trial:
    """Result of trying one choice.

    Attributes:
        prediction: the plan's estimate for it.
        result: measurements of `codeparrot_ds.trial`; None when it failed.
        failure: error message of a failed trial; empty when it ran out of memory.
    """

    prediction: Prediction
    result: dict[str, Any] | None
    failure: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all ranks, excluding the first step; 0 for a failed trial."""
        if self.result is None:
            return 0.0
        seconds = self.result["step_seconds"][1:]
        return float(self.result["tokens_per_step"]) * len(seconds) / sum(seconds)


def run_trial(
    recipe: Path, overrides: Sequence[str], choice: Choice | None, ranks: int, steps: int, on_cpu: bool
) -> dict[str, Any] | None:
    """Take `steps` optimizer steps with `deepspeed` on this machine.

    Returns:
        The result of `codeparrot_ds.trial`; None when it ran out of memory.

    Raises:
        ClusterError: when the trial fails for another reason or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix="codeparrot-trial-") as directory:
        output, log = Path(directory) / "result.json", Path(directory) / "log"
        changes = _with_choice(overrides, choice)
        command = [*find_deepspeed(), "--quiet", "--master_port", free_port(), *ranks_here(ranks, on_cpu)]
        command += ["--module", "codeparrot_ds.trial", str(recipe), "--steps", str(steps), "--output", str(output)]
        command += [part for change in changes for part in ("--set", change)]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        if on_cpu:
            environment["DS_ACCELERATOR"] = "cpu"
        code = run_group(command, environment, log, _SECONDS)
        if output.exists():
            result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
            return result
        text = log.read_text(encoding="utf-8", errors="replace")
        if says_out_of_memory(text):
            return None
        what = f"took more than {_SECONDS:,.0f} s" if code is None else f"failed with exit code {code}"
        raise ClusterError(f"a trial {what}:\n" + "\n".join(text.splitlines()[-15:]))


def run_group(command: Sequence[str], environment: Mapping[str, str], log: Path, seconds: float) -> int | None:
    """Run a command in its own process group for up to `seconds`. Returns its exit code, or None after a timeout."""
    with open(log, "ab") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # ranks have their own process groups and exit with their launcher
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_SECONDS)
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def says_out_of_memory(text: str) -> bool:
    """Whether `text` contains an out-of-memory error of PyTorch, CUDA, NCCL or the kernel."""
    return re.search(r"out of memory|OutOfMemoryError|ALLOC_FAILED|can.t allocate memory|MemoryError", text) is not None


def candidates(plan: Plan) -> list[Prediction]:
    """Return the choices worth timing, in order.

    First the largest micro-batch that fits for each DeepSpeed JSON and recomputation, fastest by estimate first; then
    the next smaller of each, and so on. Offload is included only where nothing else fits.
    """
    fitting = [each for each in (plan.own, *plan.others) if each.fits]
    on_device = [each for each in fitting if not each.offloads]
    ways: dict[tuple[Path, str], list[Prediction]] = {}
    for each in sorted(on_device or fitting, key=lambda each: -each.choice.micro_batch_size):
        ways.setdefault((each.choice.deepspeed, each.choice.recompute), []).append(each)
    by_speed = sorted(ways.values(), key=lambda way: way[0].time.no_overlap_seconds)
    rounds = max(map(len, by_speed), default=0)
    return [way[number] for number in range(rounds) for way in by_speed if number < len(way)]


def tune(plan: Plan, recipe: Path, overrides: Sequence[str], steps: int, most: int) -> Iterator[Trial]:
    """Try up to `most` candidates. When a smaller micro-batch was slower for a DeepSpeed JSON and recomputation, still
    smaller ones are skipped."""
    machine, tried = plan.machine, 0
    best: dict[tuple[Path, str], float] = {}
    done: set[tuple[Path, str]] = set()
    for prediction in candidates(plan):
        choice = prediction.choice
        way = (choice.deepspeed, choice.recompute)
        if tried == most or way in done:
            continue
        try:
            trial = Trial(prediction, run_trial(recipe, overrides, choice, machine.cluster.gpus, steps, machine.on_cpu))
        except ClusterError as error:  # other candidates may still work
            trial = Trial(prediction, None, str(error))
        yield trial
        tried += 1
        if trial.tokens_per_second < best.get(way, 0.0):
            done.add(way)
        best[way] = max(best.get(way, 0.0), trial.tokens_per_second)


def winner(trials: Sequence[Trial]) -> Trial:
    """Return the fastest trial. Raises ClusterError when all failed."""
    fastest = max(trials, key=lambda trial: trial.tokens_per_second, default=None)
    if fastest is None or fastest.result is None:
        reasons = [trial.failure for trial in trials if trial.failure]
        raise ClusterError(
            reasons[0] if reasons else "no trial fit in memory. Run `codeparrot-ds plan` to see what this recipe needs."
        )
    return fastest


def _with_choice(overrides: Sequence[str], choice: Choice | None) -> list[str]:
    """`overrides` with the options of `choice`, which replace those of the same keys."""
    chosen = choice.overrides() if choice else []
    keys = {each.partition("=")[0] for each in chosen}
    return [*(each for each in overrides if each.partition("=")[0] not in keys), *chosen]


def write_recipe(source: Path, overrides: Sequence[str], fastest: Trial, trials: Sequence[Trial], output: Path) -> None:
    """Write the recipe with the options of the fastest trial and absolute paths, and all measurements as comments."""
    from codeparrot_ds.run.recipe import load_recipe, make_paths_absolute, read_recipe
    from codeparrot_ds.system.files import write_atomically
    from codeparrot_ds.system.typed_yaml import dump_yaml

    body = read_recipe(source, _with_choice(overrides, fastest.prediction.choice))
    make_paths_absolute(body)
    result = fastest.result or {}
    lines = [f"# {source.name}, tuned on {result['world_size']} x {result['device']}. Tokens per second:"]
    for trial in sorted(trials, key=lambda trial: -trial.tokens_per_second):
        each = trial.prediction.choice
        speed = f"{trial.tokens_per_second:>13,.0f}" if trial.result else "failed" if trial.failure else "out of memory"
        way = f"{each.deepspeed.name}, recomputing {each.recompute}, micro-batch {each.micro_batch_size}"
        lines.append(f"# {speed:>13}  {way}")
    write_atomically(output, "\n".join([*lines, dump_yaml(body)]))
    load_recipe(output)
