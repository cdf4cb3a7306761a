"""Guards of a run: stop requests, hangs, skipped steps, loss spikes and diverging replicas.

Every decision that stops or rewinds a run is taken by all ranks at the same step.
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
from codeparrot_ds.hosts.working_directory import LAUNCHER
from codeparrot_ds.training.metrics import log
from codeparrot_ds.training.ranks import Ranks

_POLL_SECONDS = 1.0
_FIRST_STEP = 3.0  # factor on the limit: the first step compiles, allocates, and waits for slow disks
_KEPT_LOSSES, _MIN_LOSSES = 64, 16
_DIGEST_WORDS = 1 << 22  # hashed at a time: 32 MB as int64
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Requests to save a checkpoint and exit cleanly.

    Sources are SIGTERM, SIGUSR1, a file named `stop` in the run directory, a message of the supervisor, and the exit of
    the process that started the launcher. A request that reaches one rank is known to all ranks at the end of the same
    step.
    """

    def __init__(self, stop_file: Path, ranks: Ranks, lifeline: Lifeline) -> None:
        self._stop_file, self._ranks, self._lifeline = stop_file, ranks, lifeline
        self._reason: str | None = None
        self._exchange: Callable[[], list[int]] | None = None
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        if ranks.rank == 0 and not lifeline.connected:  # otherwise `launch` has removed it, once for all its attempts
            stop_file.unlink(missing_ok=True)  # left over from a run that it has stopped
        # With a supervisor, its connection is authoritative: losing an ssh session is no reason to stop.
        self._launcher = None if lifeline.connected else _launcher()
        self._grandparent = self._launcher.ppid() if self._launcher else None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name

    def _poll(self) -> None:
        if self._reason is None:
            self._reason = self._lifeline.stop_reason
        if self._reason is None and self._ranks.rank == 0 and self._stop_file.exists():
            self._reason = f"the file {self._stop_file}"
        if self._reason is None and self._launcher is not None:
            # DeepSpeed's runner may die without notifying its launcher and ranks.
            try:
                orphaned = self._launcher.ppid() != self._grandparent
            except psutil.NoSuchProcess:
                orphaned = True
            if orphaned:
                self._reason = "the end of the command that started the launcher"

    def begin_exchange(self, save_now: bool = False, writing: bool = False) -> None:
        """Start an exchange between ranks, concurrent with computation: whether to stop or save after this step, and
        whether this rank is still writing a checkpoint."""
        self._poll()
        self._exchange = self._ranks.begin_max([int(self._reason is not None), int(save_now), int(writing)])

    def finish_exchange(self) -> tuple[bool, bool, bool]:
        """Return (stop, save now, writing), each true if true on any rank: the same result on all ranks."""
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
    """Kills this rank when it makes no progress, after writing the stack of every thread to `file`. The launcher then
    kills the other ranks.

    A Python thread watches the rank: it can log the reason and update the status file. If a library holds the GIL, that
    thread cannot run; a thread of `faulthandler` then kills the rank after another quarter of the time limit.
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
        """Report progress: this rank begins `what`, and may take `times` the limit for it."""
        self.doing = what
        if self._seconds is None:
            return
        allowed = self._seconds * times
        self._deadline = time.monotonic() + allowed
        faulthandler.dump_traceback_later(1.25 * allowed + 2 * _POLL_SECONDS, file=self._file, exit=True)

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._stopped.wait(min(_POLL_SECONDS, self._seconds / 4)):
            if time.monotonic() <= self._deadline:
                continue
            message = f"hung during {self.doing}: no progress within guards.hang_seconds; thread stacks follow"
            log.error("%s", message)
            faulthandler.dump_traceback(self._file, all_threads=True)
            self._file.flush()
            try:
                self._on_hang(message.partition(";")[0])
            finally:
                os._exit(EXIT_CRASHED)


class SkippedSteps:
    """Warns when the engine skips a step because of non-finite gradients, and ends a run with too many in a row."""

    def __init__(self, most: int, so_far: int) -> None:
        self._most, self._total, self._in_a_row = most, so_far, 0

    def check(self, step: int, total: int) -> bool:
        """Return whether optimizer step `step` was skipped, given the engine's `total` so far. Raises TrainingError
        when too many steps in a row were skipped."""
        skipped, self._total = total > self._total, total
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if skipped:
            log.warning(
                "step %d: skipped, gradients are not finite (%d in a row, %d in total)", step, self._in_a_row, total
            )
        if self._in_a_row > self._most:
            raise TrainingError(
                f"step {step}: {self._in_a_row} steps in a row were skipped because of non-finite gradients; "
                f"guards.max_skipped_steps is {self._most}. Skipped steps change no weights. Lower the learning rate, "
                "or inspect the data of these steps: `codeparrot-ds shards inspect`."
            )
        return skipped


class SpikeDetector:
    """Detects a loss far above the recent ones."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._recent: deque[float] = deque(maxlen=_KEPT_LOSSES)

    def check(self, loss: float) -> float | None:
        """Return the recent median (nats) if `loss` is a spike, else None. Spikes do not enter the median."""
        if len(self._recent) >= _MIN_LOSSES:
            median = statistics.median(self._recent)
            if not loss <= median + self._threshold:
                return median
        self._recent.append(loss)
        return None


def replicas_differ(network: torch.nn.Module, ranks: Ranks) -> list[int]:
    """Return the ranks whose weights are not bitwise equal to those of the majority; all ranks if there is none.

    Only for stages below ZeRO-3, where every rank holds all weights. Collective: all ranks must call.
    """
    total = torch.zeros((), dtype=torch.int64, device=ranks.device)
    for number, parameter in enumerate(network.parameters(), start=1):
        word = {2: torch.int16, 4: torch.int32}[parameter.element_size()]
        for part in parameter.detach().flatten().view(word).split(_DIGEST_WORDS):
            # Odd factors that depend on position, so that two changes do not cancel out. Sums wrap alike on all ranks.
            places = torch.arange(1, 2 * len(part), 2, device=part.device)
            total += (part.long() * places).sum() * (2 * number + 1)
    digests = ranks.gather(int(total))
    most = max(digests, key=digests.count)
    different = [rank for rank, digest in enumerate(digests) if digest != most]
    return different if 2 * len(different) < len(digests) else list(range(len(digests)))  # no majority
