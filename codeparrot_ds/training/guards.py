"""What keeps a run from going on wrongly, or from not going on: requests to stop, hangs, skipped steps, loss spikes.

Every decision that ends or turns a run is taken by all ranks at the same step.
"""

import faulthandler
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TextIO

import psutil
import torch

from codeparrot_ds.errors import EXIT_CRASHED, TrainingError
from codeparrot_ds.hosts.lifeline import Lifeline
from codeparrot_ds.training.metrics import log
from codeparrot_ds.training.ranks import LAUNCHER, Ranks

_POLL_SECONDS = 1.0
_FIRST_STEP = 3.0  # times the limit: the first compiles, allocates, and waits for slow disks
_KEPT_LOSSES, _FEWEST_LOSSES = 64, 16
_DIGEST_WORDS = 1 << 22  # at a time: 32 MB as int64
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """SIGTERM, SIGUSR1, a file named `stop` in the run directory, the supervisor's word, or the end of whatever started
    the launcher.

    Each asks for a checkpoint and a clean end. What one rank has heard, all ranks learn at the end of the same step.
    """

    def __init__(self, stop_file: Path, ranks: Ranks, lifeline: Lifeline) -> None:
        self._stop_file, self._ranks, self._lifeline = stop_file, ranks, lifeline
        self._reason: str | None = None
        self._exchange: Callable[[], list[int]] | None = None
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        if ranks.rank == 0 and not lifeline.connected:  # else `launch` has done so, once for all its attempts
            stop_file.unlink(missing_ok=True)  # of an earlier run, which it has stopped
        # A supervisor's connection says more, and an ssh session that was lost is no reason to stop.
        self._launcher = None if lifeline.connected else _launcher()
        self._grandparent = self._launcher.ppid() if self._launcher else None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name

    def _look(self) -> None:
        if self._reason is None:
            self._reason = self._lifeline.stop_reason
        if self._reason is None and self._ranks.rank == 0 and self._stop_file.exists():
            self._reason = f"the file {self._stop_file}"
        if self._reason is None and self._launcher is not None:
            # DeepSpeed's runner may die without a word to the launcher and the ranks below it.
            try:
                orphaned = self._launcher.ppid() != self._grandparent
            except psutil.NoSuchProcess:
                orphaned = True
            if orphaned:
                self._reason = "the end of the command that started the launcher"

    def begin_exchange(self, save_now: bool = False, writing: bool = False) -> None:
        """Tell the other ranks, while they and this one compute, whether to stop or to save after this step, and
        whether this one still writes a checkpoint."""
        self._look()
        self._exchange = self._ranks.begin_max([int(self._reason is not None), int(save_now), int(writing)])

    def finish_exchange(self) -> tuple[bool, bool, bool]:
        """(stop, save now, writing) where it holds for any rank: the same on all ranks."""
        assert self._exchange is not None
        stop, save_now, writing = self._exchange()
        self._exchange = None
        return bool(stop), bool(save_now), bool(writing)

    @property
    def reason(self) -> str:
        """Why this rank was asked to stop."""
        return self._reason or self._lifeline.stop_reason or "a request to another rank"


def _launcher() -> psutil.Process | None:
    parent = psutil.Process(os.getppid())
    return parent if LAUNCHER in parent.cmdline() else None


class Watchdog:
    """Ends this rank when it makes no progress: every thread's stack goes to `file`, and the launcher ends the rest.

    A Python thread does it, which can say why and tell the status file; where it cannot run, because some library
    holds the interpreter's lock, a thread of `faulthandler` does the same a quarter of the time later.
    """

    def __init__(self, seconds: float | None, file: TextIO, on_hang: Callable[[str], None]) -> None:
        self._seconds, self._file, self._on_hang = seconds, file, on_hang
        self.doing = "starting"
        self._deadline = 0.0
        self._stopped = threading.Event()
        if seconds is not None:
            self.beat("the first step", _FIRST_STEP)
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self, what: str, times: float = 1.0) -> None:
        """This rank makes progress: it begins `what`, for which it has `times` the limit."""
        self.doing = what
        if self._seconds is None:
            return
        allowed = self._seconds * times
        self._deadline = time.monotonic() + allowed
        faulthandler.dump_traceback_later(1.25 * allowed + 2 * _POLL_SECONDS, file=self._file, exit=True)

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._stopped.wait(min(_POLL_SECONDS, self._seconds / 4)):
            if time.monotonic() <= self._deadline:
                continue
            message = f"hung in {self.doing}: no progress within guards.hang_seconds; the stacks of its threads follow"
            log.error("%s", message)
            faulthandler.dump_traceback(self._file, all_threads=True)
            self._file.flush()
            try:
                self._on_hang(message.partition(";")[0])
            finally:
                os._exit(EXIT_CRASHED)


class SkippedSteps:
    """Raises the alarm when the engine skips a step, for gradients that are not finite, and ends a run of them."""

    def __init__(self, most: int, so_far: int) -> None:
        self._most, self._total, self._in_a_row = most, so_far, 0

    def look(self, step: int, total: int) -> bool:
        """Whether optimizer step `step` was skipped, given the engine's count so far. Raises TrainingError when too
        many were in a row."""
        skipped, self._total = total > self._total, total
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if skipped:
            log.warning(
                "step %d: skipped, its gradients are not finite (%d in a row, %d in all)", step, self._in_a_row, total
            )
        if self._in_a_row > self._most:
            raise TrainingError(
                f"step {step}: {self._in_a_row} steps in a row were skipped, for gradients that are not finite; "
                f"guards.max_skipped_steps is {self._most}. None of them changed a weight. Lower the learning rate, "
                "or look at the data of these steps: `codeparrot-ds shards inspect`."
            )
        return skipped


class SpikeDetector:
    """Finds a loss far above the recent ones."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._recent: deque[float] = deque(maxlen=_KEPT_LOSSES)

    def look(self, loss: float) -> float | None:
        """The median (nats) that `loss` lies too far above, or None. A spike does not count among the recent."""
        if len(self._recent) >= _FEWEST_LOSSES:
            median = statistics.median(self._recent)
            if not loss <= median + self._threshold:
                return median
        self._recent.append(loss)
        return None


def replicas_differ(network: torch.nn.Module, ranks: Ranks) -> list[int]:
    """Ranks whose weights differ, bit for bit, from those of most ranks; below ZeRO-3, where each holds all of them.
    All ranks must call."""
    total = torch.zeros((), dtype=torch.int64, device=ranks.device)
    for number, parameter in enumerate(network.parameters(), start=1):
        word = {2: torch.int16, 4: torch.int32}[parameter.element_size()]
        for part in parameter.detach().flatten().view(word).split(_DIGEST_WORDS):
            # Odd weights by place, so that two changes do not cancel out; sums wrap, on every rank alike.
            places = torch.arange(1, 2 * len(part), 2, device=part.device)
            total += (part.long() * places).sum() * (2 * number + 1)
    digests = ranks.gather(int(total))
    most = max(digests, key=digests.count)
    different = [rank for rank, digest in enumerate(digests) if digest != most]
    return different if 2 * len(different) < len(digests) else list(range(len(digests)))  # nobody knows who is right
