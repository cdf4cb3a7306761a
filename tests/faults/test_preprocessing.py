"""Shards are byte-identical when processes, slices or nodes are killed, and for any distribution of the work."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from codeparrot_ds.shards import build as building
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.shards.verify import verify
from codeparrot_ds.system.files import MANIFEST
from codeparrot_ds.system.jobs import Slice
from codeparrot_ds.system.storage import LocalDirectory
from tests.conftest import ROOT
from tests.shard_commands import COMMAND, TIMEOUT, Corpus, Done, environment, error_of, files_of, shards, write_corpus
from tests.unit.test_jobs import array, open_mpi, pmi, step, torchrun

GONE_SECONDS = 5  # time limit for the workers of a killed process to exit


# Killed


@pytest.fixture(scope="module")
def large(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Eight tasks that take two workers a few tenths of a second."""
    return write_corpus(tmp_path_factory.mktemp("large") / "corpus", data / "tokenizer", 5_000, 200)


def start(corpus: Corpus, output: Path, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a build in its own session."""
    with open(log, "wb") as file:
        return subprocess.Popen(
            [*COMMAND, *map(str, corpus.command(output, "--workers", "2", *options))],
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def session_of(pid: int) -> list[psutil.Process]:
    """Running processes of the session led by `pid`, including orphans."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == pid and is_alive(process):
                found.append(process)
        except ProcessLookupError:
            pass
    return found


def until(condition: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def end_session(pid: int) -> None:
    for process in session_of(pid):
        process.kill()


def kill(process: subprocess.Popen[bytes], whom: str) -> bool:
    """SIGKILL the parent, a worker or the group. Returns False if there was nothing left to kill."""
    if whom == "worker":
        workers = []
        until(lambda: process.poll() is not None or workers.extend(_workers(process)) or workers, 30)
        if process.poll() is not None or not workers:
            return False
        os.kill(workers[-1], signal.SIGKILL)
        return True
    if process.poll() is not None:
        return False
    if whom == "parent":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    return True


def _workers(process: subprocess.Popen[bytes]) -> list[int]:
    return [other.pid for other in session_of(process.pid) if other.pid != process.pid]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [8, pytest.param(30, marks=pytest.mark.nightly)])
def test_killed_anywhere_the_same_command_makes_the_same_bytes(large: Corpus, tmp_path: Path, kills: int) -> None:
    """Fault 24. `hits` counts kills that left a non-empty directory without a manifest."""
    assert shards(*large.command(tmp_path / "whole", "--workers", "2")).returncode == 0
    whole = files_of(tmp_path / "whole")
    assert sum(name.startswith("train-") and name.endswith(".bin") for name in whole) == large.tasks
    begun = time.monotonic()  # the second time, because the first may have included the encoder proof
    assert shards(*large.command(tmp_path / "again", "--workers", "2")).returncode == 0
    seconds = time.monotonic() - begun
    assert files_of(tmp_path / "again") == whole
    shutil.rmtree(tmp_path / "again")

    moments = random.Random(24)
    hits, resumed, broken = 0, 0, 0
    for number in range(kills):
        whom = ("parent", "worker", "group")[number % 3]
        moment = (0.2 + 0.8 * (number + moments.random()) / kills) * seconds  # from early to late
        where = f"kill {number} of the {whom} after {moment:.3f} of {seconds:.3f} s"
        output, log = tmp_path / f"killed-{number}", tmp_path / f"log-{number}"
        process = start(large, output, log)
        try:
            time.sleep(moment)
            killed = kill(process, whom)
            code = process.wait(60)
            assert until(lambda pid=process.pid: not session_of(pid), GONE_SECONDS), f"{where}: processes live on"
        finally:
            end_session(process.pid)
        said = log.read_text()
        left = files_of(output) if output.exists() else {}
        if MANIFEST in left:
            verify(output, deep=True)
        else:
            hits += killed and bool(left)
            resumed += any(name.startswith(".task-") for name in left)
            if killed and whom == "worker":
                assert code == 1, f"{where}: {code}\n{said}"
                assert said.count("error: ") == 1, said
                assert "error: a worker process was killed" in said, said
                broken += 1
        assert "Traceback" not in said, f"{where}: {said}"
        done = shards(*large.command(output, "--workers", "2"))
        assert done.returncode == 0, f"{where}: {done.stderr}"
        found = files_of(output)
        assert sorted(found) == sorted(whole), where
        assert found == whole, where
        shutil.rmtree(output)
    assert hits >= kills // 3, f"{hits} of {kills} kills hit work"
    assert resumed >= kills // 10 + 1, f"{resumed} kills came after a finished task"
    assert broken >= kills // 10 + 1, f"{broken} builds ended for a killed worker"


@pytest.mark.slow
def test_killed_before_any_operation_on_its_files_a_build_is_completed_by_the_next(data: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", data / "tokenizer", 60, 60)
    (tmp_path / "scratch").mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.faults.probe_crashes", corpus.tokenizer, tmp_path / "scratch"),
            *(str(4 * corpus.shard_tokens), *corpus.inputs),
        ],
        cwd=ROOT,
        env=environment(OPENBLAS_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["crashes"] > 50
    assert report["wrong"] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_stopped_build_leaves_no_process_and_resumes(
    large: Corpus, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    output, log = tmp_path / "shards", tmp_path / "log"
    process = start(large, output, log, "--encoder", "tokenizers")
    try:
        assert until(lambda: list(output.glob(".*-00000.bin.tmp")), 60), log.read_text()
        os.killpg(process.pid, number)
        assert process.wait(60) == code, log.read_text()
        assert until(lambda: not session_of(process.pid), GONE_SECONDS)
    finally:
        end_session(process.pid)
    assert "Traceback" not in log.read_text()
    assert not (output / MANIFEST).exists()
    assert shards(*large.command(output, "--workers", "2")).returncode == 0
    verify(output, deep=True)
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


# Slices


@pytest.fixture(scope="module")
def small(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Eight short tasks."""
    return write_corpus(tmp_path_factory.mktemp("small") / "corpus", data / "tokenizer", 200, 40)


@pytest.fixture(scope="module")
def whole(small: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of `small`, from one local run."""
    output = tmp_path_factory.mktemp("whole") / "shards"
    done = shards(*small.command(output, "--workers", "1"))
    assert done.returncode == 0, done.stderr
    return files_of(output)


def expect_others(done: Done, output: Path, tasks: int) -> None:
    """A slice that is not the last reports what is left, and succeeds without a manifest."""
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert f"{output}: {tasks} of 8 tasks remain for other slices; the last one finishes the build." in done.stderr
    assert not (output / MANIFEST).exists()


def expect_finished(done: Done, output: Path, whole: dict[str, bytes]) -> None:
    """The last slice finishes the directory."""
    assert done.returncode == 0, done.stderr
    assert "train tokens" in done.stdout
    assert files_of(output) == whole


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_slices_in_any_order_give_the_bytes_of_one_run(
    small: Corpus, whole: dict[str, bytes], tmp_path: Path, order: tuple[int, ...]
) -> None:
    output, left = tmp_path / "shards", 8
    for index in order:
        done = shards(*small.command(output, "--slice", f"{index}/3", "--workers", "2"))
        left -= (3, 3, 2)[index]
        if left:
            expect_others(done, output, left)
    expect_finished(done, output, whole)
    again = shards(*small.command(output, "--slice", f"{order[0]}/3"))  # a job that was submitted twice
    expect_finished(again, output, whole)


def test_more_slices_than_tasks_leave_some_without_work(small: Corpus, whole: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "shards"
    expect_others(shards(*small.command(output, "--slice", "9/10", "--workers", "2")), output, 8)
    for index in range(7):
        expect_others(shards(*small.command(output, "--slice", f"{index}/10")), output, 7 - index)
    expect_finished(shards(*small.command(output, "--slice", "7/10")), output, whole)


def at_once(jobs: list[Callable[[], Done]]) -> list[Done]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


@pytest.mark.parametrize("attempt", range(4))
def test_slices_at_once_give_the_bytes_of_one_run(
    small: Corpus, whole: dict[str, bytes], tmp_path: Path, attempt: int
) -> None:
    output = tmp_path / "shards"
    commands = [small.command(output, "--slice", f"{index}/3", "--workers", "1") for index in range(3)]
    done = at_once([lambda c=command: shards(*c) for command in commands])
    for one in done:
        assert one.returncode == 0, one.stderr
        assert "error" not in one.stderr
    assert any("train tokens" in one.stdout for one in done)
    assert files_of(output) == whole


def build_slice(corpus: Corpus, output: Path, part: Slice) -> None:
    build(
        corpus.inputs,
        corpus.tokenizer,
        output,
        BuildOptions(
            shard_tokens=corpus.shard_tokens, valid_fraction=0.2, on_bad_document="skip", workers=1, part=part
        ),
    )


def finish_around_another(corpus: Corpus, output: Path, number: int) -> int:
    """Finish slice 1/2 while 0/2, whose tasks are done, finishes just before write `number` (from 0) of 1/2.

    Returns the number of writes.
    """
    publish, finish = LocalDirectory.publish, building._finish
    finishing, writes = False, 0

    def note_finish(*arguments: Any, **also: Any) -> Any:
        nonlocal finishing
        finishing = True
        return finish(*arguments, **also)

    def interrupted(self: LocalDirectory, files: dict[str, Path]) -> None:
        nonlocal writes
        writes += finishing
        if finishing and writes == number + 1:
            with pytest.MonkeyPatch.context() as undisturbed:
                undisturbed.setattr(LocalDirectory, "publish", publish)
                undisturbed.setattr(building, "_finish", finish)
                build_slice(corpus, output, Slice(0, 2))
        publish(self, files)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "_finish", note_finish)
        patch.setattr(LocalDirectory, "publish", interrupted)
        build_slice(corpus, output, Slice(1, 2))
    return writes


@pytest.mark.parametrize("number", range(4))
def test_two_slices_that_finish_at_the_same_moment_both_succeed(
    small: Corpus, whole: dict[str, bytes], tmp_path: Path, number: int
) -> None:
    """The other finishes before the quarantine, the tokenizer's two files or the manifest are written."""
    output = tmp_path / "shards"
    expect_others(shards(*small.command(output, "--slice", "0/2")), output, 4)
    writes = finish_around_another(small, output, number)
    assert number < writes <= 4
    assert files_of(output) == whole


SCHEDULERS: dict[str, list[dict[str, str]]] = {
    "Slurm array": [array(number, 0, 2, 3) for number in range(3)],
    "Slurm array in tens": [array(number, 10, 30, 3) for number in (10, 20, 30)],
    "Slurm step": [step(rank, 3) for rank in range(3)],
    "Slurm array of steps": [{**array(n, 1, 2, 2), **step(rank, 2)} for n in (1, 2) for rank in range(2)],
    "torchrun": [torchrun(rank, 2) for rank in range(2)],
    "Open MPI": [open_mpi(rank, 2) for rank in range(2)],
    "PMI": [pmi(rank, 2) for rank in range(2)],
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_divide_the_work_by_their_environment(
    small: Corpus, whole: dict[str, bytes], tmp_path: Path, scheduler: str
) -> None:
    output, parts = tmp_path / "shards", SCHEDULERS[scheduler]
    left = 8
    for index in reversed(range(len(parts))):
        done = shards(*small.command(output, "--workers", "1"), **parts[index])
        assert f"building only slice {index}/{len(parts)}, as set by the scheduler's environment" in done.stderr
        left -= len(range(index, 8, len(parts)))
        if left:
            expect_others(done, output, left)
    expect_finished(done, output, whole)


def test_an_explicit_slice_overrides_the_scheduler(small: Corpus, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    expect_others(shards(*small.command(output, "--slice", "0/8"), **array(0, 0, 5, 2)), output, 7)


def test_an_array_with_gaps_and_an_invalid_slice_are_refused(small: Corpus, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    assert "the task ids have gaps" in error_of(shards(*small.command(output), **array(1, 0, 5, 3)))
    assert "write I/N" in error_of(shards(*small.command(output, "--slice", "3/3")))
    both = shards(*small.command(output, "--slice", "0/3", "--engine", "ray"))
    assert "omit --slice, or omit --engine ray" in error_of(both)
    assert not output.exists()


def test_a_batch_script_outside_srun_does_all_the_work(small: Corpus, whole: dict[str, bytes], tmp_path: Path) -> None:
    done = shards(*small.command(tmp_path / "shards"), SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_JOB_ID="7")
    assert "slice" not in done.stderr
    expect_finished(done, tmp_path / "shards", whole)


def test_a_killed_slice_is_completed_by_the_same_command(
    small: Corpus, whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "shards"
    process = start(small, output, tmp_path / "log", "--slice", "0/2", "--encoder", "tokenizers")
    try:
        assert until(lambda: list(output.glob(".*-00000.bin.tmp")), 60)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        assert until(lambda: not session_of(process.pid), GONE_SECONDS)
    finally:
        end_session(process.pid)
    left = 4 - len(list(output.glob(".task-*.json")))
    expect_others(shards(*small.command(output, "--slice", "1/2")), output, left)
    expect_finished(shards(*small.command(output, "--slice", "0/2")), output, whole)


@pytest.mark.slow
def test_real_torchrun_workers_share_the_work(small: Corpus, whole: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "shards"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", *COMMAND[2:], *map(str, small.command(output, "--workers", "1"))],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "slice 0/2" in done.stderr and "slice 1/2" in done.stderr
    assert files_of(output) == whole


# Ray

ON_LOOPBACK = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # otherwise Ray uses this host's network address instead of 127.0.0.1
}


class RayCluster:
    """A Ray cluster of two one-CPU nodes, in a separate process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = str(self._read()["address"])

    def ask(self, what: str) -> dict[str, Any]:
        """Send a line and read the answer."""
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return dict(json.loads(line))
        raise AssertionError("the Ray cluster has ended")

    def environment(self) -> dict[str, str]:
        """Environment of its clients."""
        return {**ON_LOOPBACK, "RAY_ADDRESS": self.address}


@contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """Start a cluster; afterwards check that none of its processes is left."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as directory:  # socket paths must be short
        with open(Path(directory) / "stderr", "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.probe_ray", directory],
                cwd=ROOT,
                env=environment(**ON_LOOPBACK),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        family: list[psutil.Process] = []
        try:
            yield RayCluster(process)
            family = psutil.Process(process.pid).children(recursive=True)
            process.communicate(timeout=60)  # closes its input, which shuts it down
            assert process.returncode == 0
            assert until(lambda: not any(map(is_alive, family)) and not session_of(process.pid), 10), [
                (other.pid, other.name()) for other in [*family, *session_of(process.pid)] if is_alive(other)
            ]
        finally:
            if process.poll() is None:  # the test has failed
                family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait(10)
            end_session(process.pid)
            for other in family:
                if is_alive(other):
                    other.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A cluster that keeps its nodes."""
    with ray_cluster() as started:
        yield started


@pytest.mark.slow
def test_ray_gives_the_bytes_of_one_run_and_names_the_problem(
    small: Corpus, whole: dict[str, bytes], tmp_path: Path, cluster: RayCluster
) -> None:
    output = tmp_path / "shards"
    done = shards(*small.command(output, "--engine", "ray"), **cluster.environment())
    expect_finished(done, output, whole)
    bad = small.command(tmp_path / "bad", on_bad="fail")
    on_ray = error_of(shards(*bad, "--engine", "ray", **cluster.environment()))
    assert on_ray == error_of(shards(*bad, "--workers", "2"))
    assert "plain.jsonl at byte" in on_ray and "not valid JSON" in on_ray
    assert not (tmp_path / "bad" / MANIFEST).exists()
    resumed = shards(*small.command(tmp_path / "bad", "--engine", "ray"), **cluster.environment())
    expect_finished(resumed, tmp_path / "bad", whole)
    addresses = cluster.ask("connections")["addresses"]
    assert addresses and {address.removeprefix("::ffff:") for address in addresses} <= {"127.0.0.1", "::1", "::"}


@pytest.mark.slow
def test_a_corpus_cleaned_on_ray_has_the_bytes_of_one_run(small: Corpus, tmp_path: Path, cluster: RayCluster) -> None:
    """With several tasks in each step."""
    program = (
        "import sys; from codeparrot_ds.corpus import clean, decisions; from codeparrot_ds.cli import main; "
        "clean._TASK_BYTES, decisions._GROUP_DOCUMENTS = 200_000, 10; sys.argv[0] = 'codeparrot-ds'; main()"
    )
    (tmp_path / "clean.yaml").write_text("near_duplicates: {jaccard: 0.2, bands: 10, rows: 1}\nheuristics: null\n")
    options = ["--config", tmp_path / "clean.yaml", "--no-decontaminate", "--on-bad-document", "skip"]
    for name, engine in (("local", ("--workers", "1")), ("ray", ("--engine", "ray"))):
        output = ["-o", tmp_path / name, "--file-size", "100kB"]
        done = subprocess.run(
            [sys.executable, "-c", program, "corpus", "clean", *small.inputs, *output, *options, *engine],
            cwd=ROOT,
            env=environment(**cluster.environment()),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    found = files_of(tmp_path / "ray")
    assert found == files_of(tmp_path / "local")
    assert sum(name.startswith("documents-") for name in found) > 2
    removed = json.loads(found[MANIFEST])["removed"]
    assert 20 < removed["near-duplicate"] < 150 and removed["unreadable"] == 2, removed


@pytest.mark.slow
def test_ray_gives_the_same_bytes_when_a_node_is_lost(data: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", data / "tokenizer", 2_000, 100)
    reference = shards(*corpus.command(tmp_path / "whole", "--workers", "2"))
    assert reference.returncode == 0, reference.stderr
    output = tmp_path / "shards"
    command = corpus.command(output, "--engine", "ray", "--encoder", "tokenizers")  # slow enough to be interrupted
    with ray_cluster() as cluster, ThreadPoolExecutor(1) as pool:
        building = pool.submit(shards, *command, timeout=180, **cluster.environment())
        assert until(lambda: list(output.glob(".task-*.json")) or building.done(), 60)
        answer = cluster.ask("remove")
        assert not building.done() and not (output / MANIFEST).exists(), building.result()
        assert any("_build_one" in task for task in answer["cut_off"]), answer
        expect_finished(building.result(), output, files_of(tmp_path / "whole"))


def test_without_a_ray_cluster_there_is_one_clear_message(small: Corpus, tmp_path: Path) -> None:
    # Ray looks for processes of a cluster. Other tests may run one at the same time, but not in this namespace.
    alone = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    done = subprocess.run(
        [*alone, *COMMAND, *map(str, small.command(tmp_path / "shards", "--engine", "ray"))],
        cwd=ROOT,
        env=environment(RAY_TMPDIR=str(tmp_path), **ON_LOOPBACK),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    message = error_of(done)
    assert "no Ray cluster found" in message and "ray start --head" in message


@pytest.mark.parametrize("address", ["nonsense", pytest.param("127.0.0.1:1", marks=pytest.mark.slow)])
def test_a_ray_address_without_a_cluster_is_named_within_a_minute(small: Corpus, tmp_path: Path, address: str) -> None:
    command = small.command(tmp_path / "shards", "--engine", "ray")
    message = error_of(shards(*command, timeout=60, RAY_ADDRESS=address, **ON_LOOPBACK))
    assert address in message and "RAY_ADDRESS" in message


def test_without_the_ray_package_the_message_says_how_to_install_it(small: Corpus, tmp_path: Path) -> None:
    hide = "import sys; sys.modules['ray'] = None; from codeparrot_ds.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hide, "shards", *map(str, small.command(tmp_path / "shards", "--engine", "ray"))],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "pip install 'codeparrot-ds[ray]'" in error_of(done)
