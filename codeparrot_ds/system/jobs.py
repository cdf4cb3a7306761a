"""Run lists of independent tasks: in local processes, on a Ray cluster, or one slice of them per array job.

Tasks are deterministic and their writes atomic, so a lost task can be rerun anywhere, even while its first run is
still alive. Resuming is up to the caller, which omits the finished tasks.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from codeparrot_ds.errors import ClusterError, ConfigError
from codeparrot_ds.system.launched import task_of_launcher
from codeparrot_ds.system.processes import kill_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

ENGINES = ("local", "ray")
_LOG_SECONDS = 10.0  # interval between progress lines without a terminal
_RETRIES = 5  # of a Ray task whose worker or node was lost
_CONNECT_SECONDS = 10.0
_forked_from: int | None = None  # inherited by workers forked from this process


def say(message: str) -> None:
    """Print one line for the user on stderr; stdout is reserved for results."""
    with contextlib.suppress(OSError, ValueError):  # a closed terminal or a pipe without a reader
        print(message, file=sys.stderr, flush=True)


def progress(items: Iterable[Item], what: str, total: int, unit: str = "file", done: int = 0) -> Iterator[Item]:
    """Yield `items` with a progress bar on a terminal, or periodic lines in a log; `done` items precede them.

    Both show the time left, at the mean rate so far.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # its monitor thread would prevent forking
        yield from tqdm(items, desc=what, total=total, unit=unit, leave=False, initial=done)
        return
    started = last = time.monotonic()
    for count, item in enumerate(items, start=done + 1):
        yield item
        now = time.monotonic()
        if now - last >= _LOG_SECONDS:
            last = now
            left = timedelta(seconds=round((now - started) / (count - done) * (total - count)))
            say(f"{what}: {count:,} of {total:,} ({unit}), {left} left")


def run_tasks(
    function: Callable[[Item], Result],
    tasks: Sequence[Item],
    workers: int,
    *,
    engine: str = "local",
    preload: str | None = None,
    prepare: Callable[[], object] | None = None,
) -> Iterator[Result]:
    """Yield `function(task)` for every task, in order of completion.

    Args:
        function: must be importable by name, because it runs in other processes.
        tasks: picklable.
        workers: number of local processes; 1 runs the tasks in this process. Ray uses all CPUs of its cluster.
        engine: "local" or "ray".
        preload: a module that is imported once and shared by the local workers.
        prepare: called in this process before workers are forked from it, so that they share what it loads. Workers
            that start from a fork server load that themselves.

    Raises:
        ClusterError: a worker was killed, or Ray gave up on a task.
        Exception: the first exception raised by a task; tasks that have not started are dropped.
    """
    if engine == "ray":
        yield from _run_on_ray(function, tasks)
    elif workers <= 1 or not tasks:
        yield from map(function, tasks)
    else:
        yield from _run_locally(function, tasks, min(workers, len(tasks)), preload, prepare)


def run_apart(function: Callable[[Item], Result], task: Item) -> Result:
    """Run `function(task)` in a separate process, so that its memory is returned to the system afterwards."""
    return next(_run_locally(function, [task], 1))


def _run_locally(
    function: Callable[[Item], Result],
    tasks: Sequence[Item],
    workers: int,
    preload: str | None = None,
    prepare: Callable[[], object] | None = None,
) -> Iterator[Result]:
    pool = ProcessPoolExecutor(workers, mp_context=_context(preload, prepare), initializer=_start_worker)
    waiting: set[Future[Result]] = set()
    remaining = iter(tasks)
    try:
        while True:
            for task in remaining:
                with _interrupts_held():  # a worker starting here must not die of Ctrl-C with a traceback
                    waiting.add(pool.submit(function, task))
                if len(waiting) > workers:  # one task more than workers, so that no worker is idle
                    break
            if not waiting:
                return
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    except BrokenProcessPool:
        raise ClusterError(
            "a worker process was killed, most likely because memory ran out. Finished work is kept: run the same "
            "command again, with fewer --workers if memory is short."
        ) from None
    finally:
        # Workers are idle now, or their tasks may be discarded. Kill them rather than shut them down: a worker that was
        # killed while waiting for work leaves the queue's lock held, and Python would wait for the others forever.
        for worker in list((pool._processes or {}).values()):
            worker.kill()
        pool.shutdown(cancel_futures=True)


def _context(preload: str | None, prepare: Callable[[], object] | None) -> BaseContext:
    """Choose how workers start so that they share what `preload` imports and, if forked here, what `prepare` loads.

    A fork inherits locks held by other threads. If this process has a single thread there are none, and workers are
    forked from it (modules imported by `preload` may start threads but must be fork-safe, as with the fork server).
    Otherwise workers are forked from a fork server, a clean process that costs one Python start-up.
    """
    global _forked_from
    if len(threads()) == 1:
        _forked_from = os.getpid()
        if preload is not None:
            importlib.import_module(preload)
        if prepare is not None:
            with contextlib.suppress(Exception):  # the task that needs it reports what is wrong
                prepare()
        return get_context("fork")
    context = get_context("forkserver")
    context.set_forkserver_preload([preload] if preload is not None else [])
    return context


def threads() -> set[int]:
    """Ids of all threads of this process, including library threads; empty on systems without /proc."""
    tasks = Path("/proc/self/task")
    return {int(entry.name) for entry in tasks.iterdir()} if tasks.is_dir() else set()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block SIGINT; processes started meanwhile inherit the mask until they ignore the signal themselves."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker() -> None:
    die_with_parent()
    gc.freeze()  # imported objects are permanent, so exclude them from garbage collection
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallelism comes from processes


def die_with_parent() -> None:
    """Terminate this worker when the process that it works for exits for any reason.

    The kernel handles forked workers. A worker of a fork server has a different parent, so a thread also watches the
    process that it works for.
    """
    kill_with_parent(_forked_from)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _run_on_ray(function: Callable[[Item], Result], tasks: Sequence[Item]) -> Iterator[Result]:
    """Run the tasks on the cluster at RAY_ADDRESS, or on the one that this machine belongs to."""
    try:
        import ray
    except ImportError:
        raise ConfigError("--engine ray needs Ray. Install it: pip install 'codeparrot-ds[ray]'") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            _require_listener(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ClusterError(
                f"no Ray cluster found at RAY_ADDRESS={address} ({reason}). Start one with `ray start --head`, or "
                "set RAY_ADDRESS=HOST:6379."
            ) from None
    remote = ray.remote(num_cpus=1, max_retries=_RETRIES, scheduling_strategy="SPREAD")(function)
    remaining = iter(tasks)
    waiting: list[Any] = []
    while True:
        at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # nodes may come and go
        while len(waiting) < at_once and (task := next(remaining, None)) is not None:
            waiting.append(remote.remote(task))
        if not waiting:
            return
        finished, waiting = ray.wait(waiting)
        for reference in finished:
            try:
                yield ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                # Do not ray.cancel the others: Ray 2.60 aborts this process when one of them finishes at that moment.
                # They stop when this process disconnects from the cluster.
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise ClusterError(
                    f"Ray gave up on a task after {_RETRIES} retries ({str(error).splitlines()[0]}). Finished work is "
                    "kept: check the cluster and run the same command again."
                ) from None


def _require_listener(address: str) -> None:
    """Raise OSError or ValueError unless a server listens at a Ray address; Ray itself would retry for minutes."""
    if address in ("auto", "local"):
        return
    match = re.fullmatch(r"(?:ray://)?\[?([^\[\]]+)\]?:(\d+)", address)
    if match is None:
        raise ValueError(f"RAY_ADDRESS={address} is not HOST:PORT")
    socket.create_connection((match[1], int(match[2])), timeout=_CONNECT_SECONDS).close()


@dataclass(frozen=True)
class Slice:
    """Part `index` (from 0) of `count` equal parts of a task list: every count-th task."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """Parse "I/N", e.g. "3/16" for the fourth of sixteen. Raises ConfigError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or int(match[1]) >= int(match[2]):
            raise ConfigError(f"slice {text!r}: write I/N with I from 0 to N - 1, e.g. 0/16 for the first of sixteen.")
        return cls(int(match[1]), int(match[2]))

    def of(self, items: Sequence[Item]) -> list[Item]:
        """The items of this slice."""
        return list(items[self.index :: self.count])

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def slice_from_environment(environment: Mapping[str, str]) -> Slice | None:
    """The slice that a scheduler assigned to this process, or None without a scheduler.

    Reads the array and step variables of Slurm and the variables of torchrun, Open MPI and PMI (MPICH, Intel MPI). In
    a Slurm array whose jobs start several tasks, each task of each job gets its own slice.

    Raises ConfigError when the array's task ids have gaps, so that the parts cannot be numbered.
    """
    array, task = _array_slice(environment), task_of_launcher(environment)
    if task is None:
        return array
    step = Slice(*task)
    return step if array is None else Slice(array.index * step.count + step.index, array.count * step.count)


def _array_slice(environment: Mapping[str, str]) -> Slice | None:
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    if not all(name in environment for name in names):
        return None
    number, low, high, count = (int(environment[name]) for name in names)
    stride = max(1, (high - low) // max(1, count - 1))
    if low + stride * (count - 1) != high or (number - low) % stride:
        raise ConfigError(
            f"SLURM_ARRAY_TASK_ID {number} of an array of {count} tasks between {low} and {high}: the task ids have "
            "gaps. Select this job's part with --slice I/N."
        )
    return Slice((number - low) // stride, count)
