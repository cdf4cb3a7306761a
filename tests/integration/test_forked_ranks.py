"""Forked ranks exit like those of DeepSpeed's launcher."""

import signal
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, RunRanks
from tests.faults.jobs import until
from tests.forked_ranks import ForkServer

pytestmark = pytest.mark.slow


def script(path: Path, code: str) -> Path:
    path.write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\n{code}", encoding="utf-8")
    return path


def test_each_rank_has_its_environment_its_arguments_and_the_same_output(forked: RunRanks, tmp_path: Path) -> None:
    code = "print(rank, os.environ['WORLD_SIZE'], os.environ['ASKED'], *sys.argv[1:], os.getcwd())"
    done = forked(script(tmp_path / "probe.py", code), "a b", ranks=3, cwd=tmp_path, env={"ASKED": "yes"})
    assert done.returncode == 0
    expected = [f"{rank} 3 yes a b --local_rank={rank} {tmp_path}" for rank in range(3)]
    assert sorted(done.output.splitlines()) == expected


@pytest.mark.parametrize(
    ("end", "code"),
    [("sys.exit(7)", 7), ("sys.exit('why')", 1), ("raise ValueError('why')", 1), ("os.kill(os.getpid(), 9)", -9)],
)
def test_the_first_rank_to_fail_decides_and_the_others_are_told(
    forked: RunRanks, tmp_path: Path, end: str, code: int
) -> None:
    wait = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: (print('told'), os._exit(3)))\ntime.sleep(60)"
    body = f"if rank == 1:\n    time.sleep(0.3)\n    {end}\n" + wait
    done = forked(script(tmp_path / "probe.py", body))
    assert done.returncode == code
    assert done.output.count("told") == 1


def test_what_is_not_waited_for_is_killed(fork_server: ForkServer, tmp_path: Path) -> None:
    job = fork_server.start(script(tmp_path / "probe.py", "time.sleep(600)"), ranks=2, cwd=ROOT)
    assert job.poll(0.2) is None
    assert all(map(psutil.pid_exists, job.pids))
    job.end()
    assert until(lambda: not any(map(psutil.pid_exists, job.pids)), 10)


def test_a_rank_of_a_job_can_be_killed(fork_server: ForkServer, tmp_path: Path) -> None:
    job = fork_server.start(script(tmp_path / "probe.py", "time.sleep(600)"), ranks=2, cwd=ROOT)
    job.rank(1).send_signal(signal.SIGKILL)
    assert job.poll(10) == -signal.SIGKILL
    job.end()
