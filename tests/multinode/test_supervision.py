"""`codeparrot-ds launch --hostfile` over three real hosts (see conftest.py) with faults injected during training."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from codeparrot_ds.errors import EXIT_CRASHED, EXIT_PREEMPTED, EXIT_USER_ERROR
from codeparrot_ds.hosts.working_directory import LAUNCHER
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.recipe import load_recipe
from tests.conftest import ROOT, RunRanks, Trained, read_run, save_recipe, set_options, train
from tests.faults.jobs import batches, until
from tests.multinode.conftest import TOOLS_PATH, RealHosts

pytestmark = pytest.mark.slow

AT_ONCE = "checkpoints.background=false"  # so that the existing checkpoints are known
PROBE_LAUNCH = ROOT / "tests" / "faults" / "probe_launch.py"
END_SECONDS = 240  # for a job to end on a busy machine


@dataclass
class Job:
    """A `codeparrot-ds launch --hostfile` running on the first host."""

    hosts: RealHosts
    process: "subprocess.Popen[bytes]"
    log: Path
    marks: Path
    directory: RunDirectory

    def supervisor(self) -> psutil.Process:
        """Return the process of `codeparrot-ds launch`."""
        below = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        (found,) = [each for each in below if str(PROBE_LAUNCH) in each.cmdline()[:2]]
        return found

    def output(self) -> str:
        """Return its output so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, name: str) -> None:
        """Wait until the probe has written this marker."""
        assert until(lambda: (self.marks / name).exists() or self.process.poll() is not None, END_SECONDS), (
            self.output()
        )
        assert self.process.poll() is None, self.output()

    def wait_to_say(self, text: str) -> None:
        """Wait until its output contains `text`."""
        assert until(lambda: text in self.output() or self.process.poll() is not None, END_SECONDS), self.output()
        assert text in self.output()

    def end(self) -> int:
        """Wait for it to exit and return its exit code; no process of it is left on any host."""
        assert until(lambda: self.process.poll() is not None, END_SECONDS), self.output()
        alone = until(lambda: not any(map(self.hosts.processes, range(len(self.hosts.hosts)))), 20)
        assert alone, [self.hosts.processes(host) for host in range(len(self.hosts.hosts))]
        return self.process.wait()

    def attempts(self) -> list[dict[str, Any]]:
        """Return its recorded attempts."""
        return [json.loads(line) for line in self.directory.launches.read_text().splitlines()]


Launch = Callable[..., Job]


@pytest.fixture
def launch(real_hosts: RealHosts, tiny_recipe: dict[str, Any], tmp_path: Path) -> Iterator[Launch]:
    """Launch the tiny recipe on the first N hosts: `launch(name, hosts, "--option", ..., faults=[...])`."""
    jobs: list[Job] = []

    def start(name: str, hosts: int, *options: str, faults: Sequence[str] = (), settings: Sequence[str] = ()) -> Job:
        recipe = save_recipe({**tiny_recipe, "name": name}, tmp_path / f"{name}.yaml")
        hostfile = tmp_path / f"{name}.hosts"
        hostfile.write_text("".join(f"{host} slots=1\n" for host in real_hosts.hosts[:hosts]))
        marks, log = tmp_path / f"{name}.marks", tmp_path / f"{name}-{len(jobs)}.log"
        marks.mkdir(exist_ok=True)
        environment = {
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{TOOLS_PATH}",
        }
        command: list[str | Path] = [sys.executable, PROBE_LAUNCH, "--marks", marks]
        command += [part for fault in faults for part in ("--fault", fault)]
        command += ["launch", recipe, "--hostfile", hostfile, "--restart-delay", "1", *options]
        command += set_options(settings)
        with open(log, "w", encoding="utf-8") as output:
            process = real_hosts.start(command, env=environment, cwd=ROOT, output=output)
        jobs.append(Job(real_hosts, process, log, marks, RunDirectory(Path(tiny_recipe["runs"]) / name)))
        return jobs[-1]

    yield start
    for host in range(len(real_hosts.hosts)):
        real_hosts.set_link(host, "up")
    for job in jobs:
        real_hosts.end_commands(job.process)


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ((), "deepspeed --quiet --hostfile "),
        pytest.param(("--launcher", "mpirun"), "$ mpirun -n 2 ", marks=pytest.mark.nightly),
    ],
)
def test_after_the_ranks_of_a_host_were_killed_all_hosts_restart(
    launch: Launch, real_hosts: RealHosts, baseline: Trained, options: tuple[str, ...], command: str
) -> None:
    """Fault 23. Losses are those of two ranks on one host, bit for bit."""
    job = launch("killed", 2, *options, faults=["hold:0:4"], settings=[AT_ONCE])
    job.wait_for("held-4")
    (victim,) = real_hosts.ranks(1)
    victim.kill()
    job.wait_to_say("was killed, or its host was lost")
    (job.marks / "go-4").touch()
    assert job.end() == 0, job.output()
    assert job.output().count(command) == 2, job.output()
    first, second = job.attempts()
    assert (first["state"], first["host"], first["to_step"]) == ("failed", real_hosts.hosts[1], 3)
    assert first["hosts"] == second["hosts"] == list(real_hosts.hosts[:2])
    assert second["state"] == "finished"
    trained = read_run(job.directory.path)
    assert trained.losses() == baseline.losses()
    assert trained.valid_losses() == baseline.valid_losses()
    assert trained.digests() == baseline.digests()


def test_without_pdsh_plain_ssh_is_used(launch: Launch, baseline: Trained) -> None:
    job = launch("plain", 2, "--launcher", "ssh", "--no-doctor")
    assert job.end() == 0, job.output()
    assert "codeparrot_ds.hosts.fan_out" in job.output()
    assert read_run(job.directory.path).losses() == baseline.losses()


def test_a_host_that_is_cut_off_is_dropped_and_readmitted(
    launch: Launch, real_hosts: RealHosts, forked: RunRanks, tiny_recipe: dict[str, Any]
) -> None:
    """Fault 23: three hosts, then two, then three, and every sample exactly once."""
    settings = ["batch.global_batch_size=6", "schedule.steps=12", "checkpoints.every_steps=1", AT_ONCE]
    whole = train(forked, {**tiny_recipe, "name": "whole"}, ranks=2, options=settings)
    faults = ["hold:0:3", "hold:0:7"]
    job = launch("cut", 3, "--min-hosts", "2", "--regrow-seconds", "2", faults=faults, settings=settings)
    job.wait_for("held-3")
    lost = real_hosts.hosts[2]
    real_hosts.set_link(2, "down")
    job.wait_to_say(f"rank 2 on {lost} was killed, or its host was lost")
    assert until(lambda: not real_hosts.processes(2), 30), real_hosts.processes(2)  # it has noticed on its own
    (job.marks / "go-3").touch()
    job.wait_to_say(f"training on 2 of 3 hosts, without {lost}")
    job.wait_for("held-7")
    real_hosts.set_link(2, "up")
    job.wait_to_say(f"{lost} answers again")
    (job.marks / "go-7").touch()
    assert job.end() == 0, job.output()
    assert [(each["state"], len(each["hosts"]), each["from_step"], each["to_step"]) for each in job.attempts()] == [
        ("failed", 3, 0, 3),
        ("regrow", 2, 3, 8),
        ("finished", 3, 8, 12),
    ]
    trained = read_run(job.directory.path)
    assert trained.digests() == whole.digests() == batches(load_recipe(job.directory.recipe))
    losses, expected = ([float.fromhex(loss) for loss in run.losses()] for run in (trained, whole))
    assert losses == pytest.approx(expected, rel=1e-3)


def test_when_the_supervisor_is_killed_no_rank_survives_anywhere(
    launch: Launch, real_hosts: RealHosts, baseline: Trained
) -> None:
    job = launch("headless", 2, faults=["hold:0:4"])
    job.wait_for("held-4")
    assert real_hosts.ranks(0) and real_hosts.ranks(1)
    job.supervisor().kill()
    assert until(lambda: not real_hosts.processes(0) and not real_hosts.processes(1), 30), job.output()
    again = launch("headless", 2)
    assert again.end() == 0, again.output()
    assert read_run(again.directory.path).losses() == baseline.losses()


@pytest.mark.parametrize("victim", ["launcher of the second host", "deepspeed", "terminal"])
def test_no_rank_survives_the_loss_of_anything_between_it_and_the_user(
    launch: Launch, real_hosts: RealHosts, victim: str
) -> None:
    job = launch("orphans", 2, "--no-doctor", "--max-restarts", "0", faults=["hold:0:4"])
    job.wait_for("held-4")
    ranks = [rank for host in (0, 1) for rank in real_hosts.ranks(host)]
    assert len(ranks) == 2
    if victim == "terminal":
        job.supervisor().send_signal(signal.SIGHUP)
        job.wait_to_say("SIGHUP: saving a checkpoint and stopping")
        (job.marks / "go-4").touch()
    elif victim == "deepspeed":
        (runner,) = job.supervisor().children()
        assert "--hostfile" in runner.cmdline()
        runner.kill()
    else:
        (launcher,) = [each for each in real_hosts.processes(1) if LAUNCHER in each.cmdline()]
        launcher.kill()
    assert until(lambda: not any(rank.is_running() for rank in ranks), 30), job.output()
    assert job.end() == (EXIT_PREEMPTED if victim == "terminal" else EXIT_CRASHED), job.output()
    assert not job.directory.in_use()


@pytest.mark.nightly
def test_a_supervisor_told_to_stop_has_both_hosts_save(launch: Launch, real_hosts: RealHosts) -> None:
    job = launch("told", 2, faults=["hold:0:1"])
    job.wait_for("held-1")
    job.supervisor().send_signal(signal.SIGTERM)
    job.wait_to_say("SIGTERM: saving a checkpoint and stopping")
    (job.marks / "go-1").touch()
    assert job.end() == 75, job.output()
    assert job.directory.newest_checkpoint().step == 2


def test_hosts_that_do_not_answer_are_named_before_anything_starts(launch: Launch, real_hosts: RealHosts) -> None:
    """Fault 20."""
    with real_hosts.without_sshd(1):
        job = launch("silent", 2)
        assert job.end() == EXIT_USER_ERROR, job.output()
    assert f"1 of 2 hosts can train, but 2 are needed ({real_hosts.hosts[1]}: " in job.output()
    assert "Connection refused" in job.output() and "Traceback" not in job.output()
    assert not any(job.directory.checkpoints.glob("*"))
    back = ["ssh", "-F", real_hosts.ssh_config, real_hosts.hosts[1], "true"]
    assert until(lambda: real_hosts.run(back, timeout=20).returncode == 0, 20), "the test's own sshd is not back"


@pytest.mark.nightly
def test_a_link_that_is_down_for_a_minute_is_waited_for(
    launch: Launch, real_hosts: RealHosts, baseline: Trained
) -> None:
    """It is no restart: none is allowed beyond the one for the ranks that were lost."""
    job = launch("waits", 2, "--max-restarts", "1", faults=["hold:0:4"], settings=[AT_ONCE])
    job.wait_for("held-4")
    real_hosts.set_link(1, "down")
    job.wait_to_say("was killed, or its host was lost")
    (job.marks / "go-4").touch()
    job.wait_to_say("Waiting up to 600 s for them (--wait-for-hosts)")
    time.sleep(60)
    assert job.process.poll() is None, job.output()
    real_hosts.set_link(1, "up")
    assert job.end() == 0, job.output()
    assert [each["state"] for each in job.attempts()] == ["failed", "finished"]
    assert read_run(job.directory.path).losses() == baseline.losses()
