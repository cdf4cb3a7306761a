"""Tasks complete or fail with one error; slices partition a list, whichever scheduler selects them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeparrot_ds.errors import ClusterError, ConfigError, DataError
from codeparrot_ds.system import jobs
from codeparrot_ds.system.jobs import Slice, progress, run_apart, run_tasks, slice_from_environment
from tests.conftest import ROOT

# Slices

PARTS = st.integers(1, 40).flatmap(lambda count: st.tuples(st.integers(0, count - 1), st.just(count)))


@given(PARTS)
def test_a_slice_is_read_as_it_is_written(part: tuple[int, int]) -> None:
    assert Slice.parse(str(Slice(*part))) == Slice(*part)
    assert Slice.parse(f" {part[0]}/{part[1]} ") == Slice(*part)


@pytest.mark.parametrize(
    "text", ["", "3", "3/", "/3", "3/3", "4/3", "-1/3", "0/0", "1/3/4", "a/b", "1.0/3", "0x1/3", "1 / 3"]
)
def test_an_invalid_slice_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="write I/N with I from 0 to N - 1"):
        Slice.parse(text)


@given(st.integers(0, 60), st.integers(1, 20))
def test_slices_take_every_task_once_and_even_shares(tasks: int, count: int) -> None:
    shares = [Slice(index, count).of(range(tasks)) for index in range(count)]
    assert sorted(task for share in shares for task in share) == list(range(tasks))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def array(number: int, low: int, high: int, count: int) -> dict[str, str]:
    """The environment of a Slurm array job: its batch script is rank 0 of a task, outside any step."""
    return {
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_ARRAY_TASK_MIN": str(low),
        "SLURM_ARRAY_TASK_MAX": str(high),
        "SLURM_ARRAY_TASK_COUNT": str(count),
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "1",
    }


def step(rank: int, count: int) -> dict[str, str]:
    """The environment of a task under srun."""
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_ID": "0",
    }


def torchrun(rank: int, count: int) -> dict[str, str]:
    """The environment of a torchrun worker."""
    return {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}


def open_mpi(rank: int, count: int) -> dict[str, str]:
    """The environment of an Open MPI rank."""
    return {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(count)}


def pmi(rank: int, count: int) -> dict[str, str]:
    """The environment of an MPICH or Intel MPI rank."""
    return {"PMI_RANK": str(rank), "PMI_SIZE": str(count)}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (array(0, 0, 2, 3), "0/3"),
        (array(3, 1, 3, 3), "2/3"),
        (array(30, 10, 50, 5), "2/5"),  # --array=10-50:10
        (array(7, 7, 7, 1), "0/1"),
        (step(2, 4), "2/4"),
        (torchrun(1, 2), "1/2"),
        (open_mpi(5, 8), "5/8"),
        (pmi(0, 2), "0/2"),
        ({**step(1, 2), **pmi(1, 2)}, "1/2"),  # srun --mpi=pmi2 sets both
        ({**array(1, 0, 2, 3), **step(3, 4)}, "7/12"),
    ],
)
def test_a_scheduler_says_which_slice_this_is(variables: dict[str, str], expected: str) -> None:
    assert str(slice_from_environment({"PATH": "/bin", **variables})) == expected


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script outside srun: the only process
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"},
        {"RANK": "1", "WORLD_SIZE": "4"},  # left over in a shell, not set by torchrun
        step(0, 1),
        torchrun(0, 1),
    ],
)
def test_a_single_process_has_no_slice(variables: dict[str, str]) -> None:
    assert slice_from_environment(variables) is None


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 9), st.integers(1, 5))
def test_each_step_of_each_array_job_has_a_slice_of_its_own(jobs: int, ranks: int, low: int, stride: int) -> None:
    numbers = [low + stride * job for job in range(jobs)]
    found = [
        slice_from_environment({**array(number, low, numbers[-1], jobs), **step(rank, ranks)})
        for number in numbers
        for rank in range(ranks)
    ]
    assert found == [Slice(index, jobs * ranks) for index in range(jobs * ranks)]


@pytest.mark.parametrize("numbers", [(0, 1, 5), (1, 2, 4, 8), (1, 2, 5), (0, 3, 4)])
def test_an_array_with_gaps_is_never_mistaken_for_a_complete_one(numbers: tuple[int, ...]) -> None:
    """Some of its jobs may not detect the gaps, but then the others fail."""
    found: list[Slice | None] = []
    for number in numbers:
        try:
            found.append(slice_from_environment(array(number, numbers[0], numbers[-1], len(numbers))))
        except ConfigError as error:
            assert "--slice I/N" in str(error)
    assert len(found) < len(numbers)
    assert len(set(found)) == len(found)


# Tasks


def square(number: int) -> int:
    return number * number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise DataError("task three is damaged")
    return number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def note(task: tuple[Path, int]) -> int:
    directory, number = task
    (directory / str(number)).touch()
    if number == 0:
        raise DataError("the first task is damaged")
    time.sleep(0.02)
    return number


def process_id(_: int) -> int:
    return os.getpid()


@pytest.fixture(params=["fork", "forkserver"])
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How workers start: from a process without other threads, or from one with threads."""
    monkeypatch.setattr(jobs, "threads", lambda: {1} if request.param == "fork" else {1, 2})
    return str(request.param)


@pytest.mark.parametrize("tasks", [0, 1, 2, 50])
def test_every_task_gives_its_result_once(start: str, tasks: int) -> None:
    for workers in (1, 2, 5):
        found = list(run_tasks(square, range(tasks), workers))
        assert Counter(found) == Counter(n * n for n in range(tasks))


def test_one_worker_runs_the_tasks_in_order_in_this_process() -> None:
    assert list(run_tasks(square, range(10), 1)) == [n * n for n in range(10)]
    assert set(run_tasks(process_id, range(4), 1)) == {os.getpid()}


def test_run_apart_uses_another_process_that_exits(start: str) -> None:
    other = run_apart(process_id, 0)
    assert other != os.getpid()
    assert _gone([other])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_of_a_task_ends_the_list_as_it_was_raised(start: str, workers: int) -> None:
    with pytest.raises(DataError, match=r"^task three is damaged$"):
        list(run_tasks(fail_at_three, range(100), workers))


def test_tasks_not_started_are_dropped_after_an_error(start: str, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        list(run_tasks(note, [(tmp_path, number) for number in range(500)], 2))
    assert len(list(tmp_path.iterdir())) < 50


def test_a_killed_worker_is_reported_with_the_fix(start: str) -> None:
    with pytest.raises(ClusterError, match=r"a worker process was killed.*run the same command again"):
        list(run_tasks(die_at_three, range(100), 2))


def test_workers_end_with_the_list(start: str) -> None:
    workers = set(run_tasks(process_id, range(20), 2))
    assert os.getpid() not in workers
    assert _gone(workers)


def test_a_worker_killed_when_all_is_done_is_not_waited_for() -> None:
    """A worker dies holding the queue's lock, so the other is never told to exit: stock Python then often hangs."""
    subprocess.run([sys.executable, "-c", textwrap.dedent(KILLER)], cwd=ROOT, check=True, timeout=60)


KILLER = """
    import os, signal, time
    from codeparrot_ds.system import jobs
    from tests.unit.test_jobs import process_id_after
    jobs.threads = lambda: {1}  # workers fork, which takes no time
    for number in range(50):
        results = jobs.run_tasks(process_id_after, [0.01] * 2, 2)
        workers = sorted({next(results), next(results)})
        time.sleep(0.005)  # both wait for work, one of them with the lock
        os.kill(workers[number % len(workers)], signal.SIGKILL)
        assert list(results) == []
"""


def process_id_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


# A worker reports its pid and waits while its parent is killed. argv: output file, threads, the module.
PARENT = """
    import sys, threading, time
    from pathlib import Path
    from tests.unit import test_jobs
    from codeparrot_ds.system import jobs
    if sys.argv[2] == "2":
        threading.Thread(target=time.sleep, args=(120,), daemon=True).start()
    if sys.argv[3] == "late":
        jobs.die_with_parent = test_jobs.late_die_with_parent
        import os
        os.environ["SAY_PID"] = sys.argv[1]
    list(jobs.run_tasks(test_jobs.say_pid_and_wait, [Path(sys.argv[1])] * 2, 2))
"""


def say_pid_and_wait(directory: Path) -> None:
    (directory / str(os.getpid())).touch()
    time.sleep(120)


_die_with_parent = jobs.die_with_parent


def late_die_with_parent() -> None:
    """As on a busy machine: the parent is killed before the worker reaches this line."""
    (Path(os.environ["SAY_PID"]) / str(os.getpid())).touch()
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _die_with_parent()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part of it is Linux's")
@pytest.mark.parametrize("moment", ["working", "late"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_workers_die_with_a_killed_parent(tmp_path: Path, threads: str, moment: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(tmp_path), threads, moment],
        cwd=ROOT,
        start_new_session=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        assert _until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
        workers = [int(path.name) for path in tmp_path.iterdir()]
        parent.kill()
        parent.wait(10)
        assert _gone(workers)
    finally:
        parent.kill()
        parent.wait(10)
        for pid in _in_session(parent.pid):
            psutil.Process(pid).kill()


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _gone(pids: Iterable[int], seconds: float = 5) -> bool:
    """Whether these processes exit within some seconds."""
    left = list(pids)
    return _until(lambda: not any(map(_alive, left)), seconds)


def _in_session(session: int) -> list[int]:
    """Running processes of a session."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == session and _alive(pid):
                found.append(pid)
        except ProcessLookupError:
            pass
    return found


# Progress


def test_progress_in_a_log_is_an_occasional_plain_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 4))  # seconds, at each call: one per item
    monkeypatch.setattr(jobs.time, "monotonic", lambda: next(clock))
    assert list(progress(range(9), "encoding", 2012, "shard", done=2003)) == list(range(9))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "encoding: 2,006 of 2,012 (shard), 0:00:24 left\n"
        "encoding: 2,009 of 2,012 (shard), 0:00:12 left\n"
        "encoding: 2,012 of 2,012 (shard), 0:00:00 left\n"
    )


def test_progress_is_silent_about_quick_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress("abc", "encoding", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
