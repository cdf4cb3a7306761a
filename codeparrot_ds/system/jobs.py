"""Run lists of independent tasks: in local processes, on a Ray cluster, or a slice of them in an array job.

A task's result is a function of the task alone, and what it writes is whole or absent, so a task may be lost and run
again anywhere, even while its first run is still alive. How a list is resumed is the caller's affair: it leaves out
the tasks that are done.
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
_LOG_SECONDS = 10.0  # one plain line every ten seconds where there is no terminal
_RETRIES = 5  # of a Ray task whose worker or node was lost
_CONNECT_SECONDS = 10.0
_forked_from: int | None = None  # inherited by workers that are forked from this process


def say(message: str) -> None:
    """One plain line for the user, on standard error: standard output is for results."""
    with contextlib.suppress(OSError, ValueError):  # a terminal that is closed, a pipe that nobody reads
        print(message, file=sys.stderr, flush=True)


def progress(items: Iterable[Item], what: str, total: int, unit: str = "file", done: int = 0) -> Iterator[Item]:
    """Pass `items` on, with a bar on a terminal and a plain line now and then in a log; `done` came before them."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # its thread would stand in the way of forks
        yield from tqdm(items, desc=what, total=total, unit=unit, leave=False, initial=done)
        return
    last = time.monotonic()
    for count, item in enumerate(items, start=done + 1):
        yield item
        if time.monotonic() - last >= _LOG_SECONDS:
            last = time.monotonic()
            say(f"{what}: {count:,} of {total:,} ({unit})")


def run_tasks(
    function: Callable[[Item], Result],
    tasks: Sequence[Item],
    workers: int,
    *,
    engine: str = "local",
    preload: str | None = None,
    prepare: Callable[[], object] | None = None,
) -> Iterator[Result]:
    """Yield `function(task)` of every task as they finish.

    Args:
        function: importable by name, for it runs in other processes.
        tasks: picklable.
        workers: local processes; one runs the tasks in this process. Ray takes what CPUs its cluster has.
        engine: "local" or "ray".
        preload: a module that local workers share instead of importing each its own.
        prepare: called in this process when workers are forked from it, so that they share what it loads. Where they
            are not, each has to load that for itself.

    Raises:
        ClusterError: a worker was killed, or Ray gave a task up.
        Exception: the first that a task raised; the tasks not begun are dropped.
    """
    if engine == "ray":
        yield from _run_on_ray(function, tasks)
    elif workers <= 1 or not tasks:
        yield from map(function, tasks)
    else:
        yield from _run_locally(function, tasks, min(workers, len(tasks)), preload, prepare)


def run_apart(function: Callable[[Item], Result], task: Item) -> Result:
    """`function(task)` in a process of its own, whose memory goes back to the system afterwards."""
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
                with _interrupts_held():  # a worker starts here, and must not die of Ctrl-C with a traceback
                    waiting.add(pool.submit(function, task))
                if len(waiting) > workers:  # one task more than workers, so that none waits for work
                    break
            if not waiting:
                return
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    except BrokenProcessPool:
        raise ClusterError(
            "a worker process was killed from outside, most likely for lack of memory. What is finished is kept: "
            "run the same command again, with fewer --workers if memory is short."
        ) from None
    finally:
        # Workers are idle now, or their tasks may be lost. They are not asked to end: one that was killed while it
        # waited for work has left the queue's lock held, and Python would wait for the others for ever.
        for worker in list((pool._processes or {}).values()):
            worker.kill()
        pool.shutdown(cancel_futures=True)


def _context(preload: str | None, prepare: Callable[[], object] | None) -> BaseContext:
    """How workers start: they share what `preload` imports, and where they fork from here what `prepare` loads.

    A fork inherits locks that other threads hold at that moment. With this thread alone there are none, and workers
    fork from this process (what `preload` imports may start threads of its own, and has to know forks, as with the
    server); otherwise from a fork server, a clean process that costs as much as a start of Python.
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
    """Ids of this process's threads, those of libraries included; empty where the system does not say."""
    tasks = Path("/proc/self/task")
    return {int(entry.name) for entry in tasks.iterdir()} if tasks.is_dir() else set()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold SIGINT back; processes that start meanwhile inherit that until they ignore it themselves."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker() -> None:
    die_with_parent()
    gc.freeze()  # what was imported stays: the collector need not look at it again and again
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers for Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallel by processes


def die_with_parent() -> None:
    """End this worker when the process that it works for ends, however that ends.

    The kernel sees to a forked worker; one of a fork server, whose parent is another process, watches as well.
    """
    kill_with_parent(_forked_from)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _run_on_ray(function: Callable[[Item], Result], tasks: Sequence[Item]) -> Iterator[Result]:
    """Spread the tasks over the cluster that RAY_ADDRESS names or that this machine belongs to."""
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
                f"no Ray cluster was found at RAY_ADDRESS={address} ({reason}). Start one with `ray start --head`, or "
                "name one: RAY_ADDRESS=HOST:6379"
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
                # No ray.cancel for the others: Ray 2.60 aborts this process when one of them ends at that moment. They
                # end with this process's connection to the cluster.
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise ClusterError(
                    f"Ray gave a task up after {_RETRIES} retries ({str(error).splitlines()[0]}). What is finished is "
                    "kept: see to the cluster and run the same command again."
                ) from None


def _require_listener(address: str) -> None:
    """Raise OSError or ValueError unless something listens at a Ray address: Ray itself tries for minutes."""
    if address in ("auto", "local"):
        return
    match = re.fullmatch(r"(?:ray://)?\[?([^\[\]]+)\]?:(\d+)", address)
    if match is None:
        raise ValueError(f"RAY_ADDRESS={address} is not HOST:PORT")
    socket.create_connection((match[1], int(match[2])), timeout=_CONNECT_SECONDS).close()


@dataclass(frozen=True)
class Slice:
    """Part `index` (from 0) of `count` equal parts of a task list, by every count-th task."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """From "3/16": the fourth of sixteen. Raises ConfigError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or int(match[1]) >= int(match[2]):
            raise ConfigError(f"slice {text!r}: write I/N with I from 0 to N - 1, e.g. 0/16 for the first of sixteen.")
        return cls(int(match[1]), int(match[2]))

    def of(self, items: Sequence[Item]) -> list[Item]:
        """This slice of `items`."""
        return list(items[self.index :: self.count])

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def slice_from_environment(environment: Mapping[str, str]) -> Slice | None:
    """The slice that a scheduler has given this process, or None outside of one.

    Read are Slurm's array and step variables, torchrun's, Open MPI's and PMI's (MPICH, Intel MPI). In a Slurm array
    whose jobs start several steps, each step of each job has a slice.

    Raises ConfigError when an array's numbers have gaps, so that its parts cannot be counted.
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
            f"SLURM_ARRAY_TASK_ID {number} of an array of {count} between {low} and {high}: its numbers have gaps. "
            "Say which part this is: --slice I/N."
        )
    return Slice((number - low) // stride, count)
