"""Resumable task lists over local processes, and progress that suits a terminal or a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOG_SECONDS = 10.0  # one plain line every ten seconds where there is no terminal


def say(message: str) -> None:
    """One plain line for the user, on standard error: standard output is for results."""
    print(message, file=sys.stderr, flush=True)


def progress(items: Iterable[Item], what: str, total: int, unit: str = "file") -> Iterator[Item]:
    """Pass `items` on, with a bar on a terminal and a plain line now and then in a log."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=total, unit=unit, leave=False)
        return
    last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last >= _LOG_SECONDS:
            last = time.monotonic()
            say(f"{what}: {done:,} of {total:,} ({unit})")


def run_tasks(function: Callable[[Item], Result], tasks: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield `function(task)` in the order of `tasks`, computed by `workers` processes.

    Fork is avoided: the encoders' thread pools do not survive it. An exception in a task ends the list.
    """
    if workers <= 1 or len(tasks) <= 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(max_workers=min(workers, len(tasks)), mp_context=get_context("spawn"))
    with pool:
        try:
            yield from pool.map(function, tasks)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
