"""Timing of a read function, shared by the drivers of the loader benchmark."""

import time
from collections.abc import Callable


def sequences_per_second(take: Callable[[], object], sequences: int, seconds: float) -> float:
    """Call `take`, which reads `sequences`, for about `seconds`, after a warm-up of a tenth of that."""
    _calls(take, seconds / 10)
    started = time.perf_counter()
    calls = _calls(take, seconds)
    return calls * sequences / (time.perf_counter() - started)


def _calls(take: Callable[[], object], seconds: float) -> int:
    calls, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        take()
        calls += 1
    return calls
