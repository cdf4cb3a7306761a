"""Clean a corpus repeatedly, each time killed at a random moment of a step, and report failed recoveries.

Run as `python -m tests.faults.probe_clean SCRATCH KILLS SEED INPUT...`: KILLS in each step. Prints one JSON object. A
moment is before one of the operations on files in the output, by a worker or by the process that it works for. Either
that process or all of them are killed. This process has no threads, so that each run is a fork of it.
"""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.corpus import clean, decisions
from codeparrot_ds.corpus.options import Cleaning
from codeparrot_ds.system.files import MANIFEST, digest_file
from tests.faults.probe_crashes import EVENTS
from tests.shard_commands import files_of

STEPS = {"measure_task": 0, "keep_one_of_equals": 1, "write_edges": 2, "remove_similar": 3, "write_file": 4}
CLEANING = Cleaning.model_validate({"decontamination": {"enabled": False}, "secrets": None})


class Moments:
    """Counts operations on files by step, over all processes of a run, and kills at one of them."""

    def __init__(self, output: Path, step: int, number: int, whole: bool) -> None:
        self._output, self._at, self._whole = str(output), (step, number), whole
        # A worker that starts from a fork server is not counted.
        self._shared = np.frombuffer(mmap(-1, 8 * (1 + len(STEPS))), np.int64)  # the step, and the counts

    @property
    def counts(self) -> list[int]:
        return list(map(int, self._shared[1:]))

    def install(self) -> None:
        """In the process that cleans, before it starts workers."""
        run, keep = clean._Cleaner._run, clean.keep_one_of_equals

        def noted_run(cleaner: Any, function: Callable[..., Any], *rest: Any, **more: Any) -> None:
            self._shared[0] = STEPS[function.__name__]
            run(cleaner, function, *rest, **more)

        def noted_keep(*arguments: Any) -> Any:
            self._shared[0] = STEPS["keep_one_of_equals"]
            return keep(*arguments)

        clean._Cleaner._run, clean.keep_one_of_equals = noted_run, noted_keep  # type: ignore[method-assign]
        sys.addaudithook(self._count)

    def _count(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not str(arguments[0]).startswith(self._output):
            return
        step, number = self._at
        self._shared[1 + self._shared[0]] += 1
        if self._shared[0] == step and self._shared[1 + step] >= number:
            if self._whole:
                os.killpg(0, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def run(inputs: list[str], output: Path, workers: int, moments: Moments) -> int:
    """Clean in a fork; returns its wait status."""
    if (child := os.fork()) == 0:
        os.setsid()
        moments.install()
        try:
            options = clean.CleanOptions(cleaning=CLEANING, workers=workers, file_bytes=4_000)
            clean.clean(inputs, output, options)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def verify(output: Path) -> list[str]:
    """What is wrong with a directory that has a manifest."""
    files = json.loads((output / MANIFEST).read_text())["files"]
    return [
        f"its manifest lies: {each['name']}" for each in files if digest_file(output / each["name"]) != each["xxh3_128"]
    ]


def main(inputs: list[str], scratch: Path, kills: int, seed: int) -> None:
    """Kill in every step, `kills` times each."""
    clean._TASK_BYTES, decisions._GROUP_DOCUMENTS = 4_000, 4
    for library in ("pyarrow", "rensa", "scipy.sparse.csgraph"):  # once, instead of in each fork
        import_module(library)
    totals = {}
    for workers in (1, 2):
        moments = Moments(scratch / str(workers), -1, 0, False)
        assert run(inputs, scratch / str(workers), workers, moments) == 0
        totals[workers] = moments.counts
    whole = files_of(scratch / "1")
    chosen, killed = random.Random(seed), [0] * len(STEPS)
    wrong = [f"left over: {name}" for name in whole if name.startswith(".")]
    if files_of(scratch / "2") != whole:
        wrong.append("two workers make other files than one")
    for name, step in STEPS.items():
        for number in range(kills):
            workers, output = 1 + number % 2, scratch / "killed"
            for _ in range(5):  # on a busy machine, workers may start from a fork server, and are not counted
                moment, all_of_them = chosen.randint(1, totals[workers][step]), bool(step % 2)
                where = f"{name}, {workers} workers, operation {moment} of {totals[workers][step]}"
                shutil.rmtree(output, ignore_errors=True)
                status = run(inputs, output, workers, Moments(output, step, moment, all_of_them))
                if status != 0:
                    break
            killed[step] += status != 0
            problems = verify(output) if (output / MANIFEST).exists() else []
            if run(inputs, output, 1, Moments(output, -1, 0, False)) != 0:
                problems.append("the same command does not succeed")
            elif found := {name for name, _ in files_of(output).items() ^ whole.items()}:
                problems.append(f"files that differ or are left over: {sorted(found)}")
            wrong += [f"{where}: {problem}" for problem in problems]
            shutil.rmtree(output)
    print(json.dumps({"killed": killed, "operations": totals, "wrong": wrong}, indent=1))


if __name__ == "__main__":
    main(sys.argv[4:], Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
