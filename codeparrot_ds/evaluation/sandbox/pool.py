"""Run many programs, as many at a time as there are cores."""

import math
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from codeparrot_ds.evaluation.sandbox.bubble import Bubble
from codeparrot_ds.evaluation.sandbox.outcome import Limits, Outcome, Verdict
from codeparrot_ds.system.processes import available_cores

# CPU time (seconds) after which a program that still runs has to start again when all others have had as much. Of
# HumanEval's 164 solutions three need more than the first.
_SLICES = (0.012, 0.25)


class Program(NamedTuple):
    """A program, and the problem that it is to solve: programs of one problem are likely to take the same time."""

    source: str
    problem: str = ""


class _Queue:
    """Programs that wait, by the number of slices they had.

    Later slices start with the problems whose solutions take longest, those without a solution first: their programs
    are the least likely to be endless loops.
    """

    def __init__(self, programs: Sequence[Program]) -> None:
        self._programs = programs
        self._levels = [deque(range(len(programs)))]
        self._level = 0
        self._needed: dict[str, float] = {}  # problem -> CPU seconds of its slowest solution so far
        self._lock = threading.Lock()

    def take(self) -> tuple[int, int] | None:
        """The next (program, level), or None if none waits."""
        with self._lock:
            while self._level < len(self._levels):
                if self._levels[self._level]:
                    return self._levels[self._level].popleft(), self._level
                self._level += 1
                if self._level < len(self._levels):
                    self._levels[self._level] = deque(sorted(self._levels[self._level], key=self._needs, reverse=True))
            return None

    def put_back(self, program: int, level: int) -> None:
        """Let a program wait for its slice of `level`."""
        with self._lock:
            while len(self._levels) <= level:
                self._levels.append(deque())
            self._levels[level].append(program)
            self._level = min(self._level, level)  # others may have gone on while this one ran

    def passed(self, program: int, cpu_seconds: float) -> None:
        """Note that a program solves its problem in this time."""
        with self._lock:
            problem = self._programs[program].problem
            self._needed[problem] = max(cpu_seconds, self._needed.get(problem, 0.0))

    def _needs(self, program: int) -> float:
        return self._needed.get(self._programs[program].problem, math.inf)


def run_programs(
    programs: Sequence[Program],
    limits: Limits | None = None,
    workers: int | None = None,
    packages: Sequence[str] = (),
    second_run: bool = True,
) -> Iterator[tuple[int, Outcome]]:
    """Run every program in a sandbox and yield (its number, outcome), in order of completion.

    Args:
        programs: Python sources, none of which is trusted.
        limits: of each; the defaults if None.
        workers: sandboxes, each of which uses a core; as many as there are cores if None.
        packages: names of installed packages that programs may import besides the standard library.
        second_run: see `Bubble.run`.

    Raises:
        ConfigError: this machine cannot run the sandbox.
    """
    limits = limits or Limits()
    slices = [*(it for it in _SLICES if it < limits.timeout), limits.timeout]
    waiting, stop = _Queue(programs), threading.Event()
    done: queue.SimpleQueue[tuple[int, Outcome] | BaseException] = queue.SimpleQueue()

    bubbles: list[Bubble] = []

    def work() -> None:
        try:
            bubble = Bubble(limits, packages)
            bubbles.append(bubble)
            try:
                while not stop.is_set() and (taken := waiting.take()) is not None:
                    program, level = taken
                    outcome = bubble.run(programs[program].source, slices[level], second_run)
                    if outcome.verdict == Verdict.TIMED_OUT and level + 1 < len(slices):
                        waiting.put_back(program, level + 1)
                        continue
                    if outcome.passed:
                        waiting.passed(program, outcome.cpu_seconds)
                    done.put((program, outcome))
            finally:
                bubble.close()
        except BaseException as error:
            done.put(error)

    count = min(workers or available_cores(), len(programs))
    threads = [threading.Thread(target=work, name=f"sandbox-{i}", daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    unfinished = len(programs)
    try:
        while unfinished:
            item = done.get()
            if isinstance(item, BaseException):
                raise item
            unfinished -= 1
            yield item
    finally:
        stop.set()
        if unfinished:
            for started in bubbles:
                started.kill()
        for thread in threads:
            thread.join()
