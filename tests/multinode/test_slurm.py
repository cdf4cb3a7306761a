"""The Slurm scripts of launch/ on a real two-node Slurm: Debian's slurmctld and two slurmd on this machine."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.options import BuildOptions
from tests.conftest import ROOT, Trained, read_run, save_recipe
from tests.faults.jobs import until
from tests.multinode.conftest import TOOLS_PATH, unavailable

pytestmark = pytest.mark.slow

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun", "squeue")
START_SECONDS = 60
JOB_SECONDS = 240

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=20
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster."""

    directory: Path

    def environment(self) -> dict[str, str]:
        """Environment of its commands."""
        return {
            **os.environ,
            "SLURM_CONF": str(self.directory / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{TOOLS_PATH}",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *command: str | Path, cwd: Path = ROOT) -> str:
        """Run a command and return its output."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment(),
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def submit(self, log: Path, *command: str | Path, cwd: Path = ROOT) -> str:
        """Submit a job and return its id."""
        return self.call("sbatch", "--parsable", f"--output={log}", *command, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm reports about a job."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """Return the logs of its daemons."""
        return "\n".join(
            f"{path}:\n{path.read_text(errors='replace')[-3000:]}" for path in self.directory.glob("*.log")
        )


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Set up a controller and two nodes of one CPU each, and remove everything afterwards."""
    if os.geteuid() != 0:
        unavailable("only root can be two Slurm nodes")
    missing = [tool for tool in TOOLS if shutil.which(tool, path=TOOLS_PATH) is None]
    if missing:
        unavailable(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
    directory = tmp_path_factory.mktemp("slurm")
    directory.chmod(0o755)
    cluster = Slurm(directory)
    ports = []
    probes = [socket.create_server(("", 0)) for _ in range(3)]
    for probe in probes:
        ports.append(probe.getsockname()[1])
        probe.close()
    (directory / "state").mkdir()
    configuration = CONFIGURATION.format(host=socket.gethostname().partition(".")[0], directory=directory, ports=ports)
    (directory / "slurm.conf").write_text(configuration)
    key = directory / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={directory}/munge.socket"]
    munge += [f"--{name}-file={directory}/munge.{name}" for name in ("pid", "log", "seed")]
    daemons = [munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n0"], ["slurmd", "-D", "-N", "n1"]]
    running = []
    try:
        for daemon in daemons:
            with open(
                directory / f"{daemon[0]}-{daemon[-1]}.out".replace("/", "_")[-80:], "w", encoding="utf-8"
            ) as output:
                program = shutil.which(daemon[0], path=TOOLS_PATH) or daemon[0]
                running.append(
                    subprocess.Popen(
                        ["setpriv", "--pdeathsig", "KILL", program, *daemon[1:]],
                        env=cluster.environment(),
                        cwd=directory,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )
            time.sleep(1)

        def ready() -> bool:
            said = subprocess.run(
                ["sinfo", "--noheader", "--format=%T %D"],
                env=cluster.environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            return said.stdout.strip() == "idle 2"

        assert until(ready, START_SECONDS), cluster.logs()
        yield cluster
        for number in cluster.call("squeue", "--noheader", "--format=%A").split():
            cluster.call("scancel", "--full", "--signal=KILL", number)
            cluster.call("scancel", number)
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(slurm: Slurm, number: str, state: str, log: Path) -> dict[str, str]:
    """Wait until the job is in this state."""
    assert until(lambda: slurm.job(number)["JobState"] == state, JOB_SECONDS), (
        f"{slurm.job(number)}\n{log.read_text(encoding='utf-8') if log.exists() else ''}\n{slurm.logs()}"
    )
    return slurm.job(number)


def test_two_nodes_train_exactly_as_two_ranks_on_one(
    slurm: Slurm, baseline: Trained, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = save_recipe({**tiny_recipe, "name": "slurm"}, tmp_path / "tiny.yaml")
    log = tmp_path / "job.log"
    number = slurm.submit(log, "launch/slurm_train.sbatch", recipe, "--ranks", "1")
    job = wait_for(slurm, number, "COMPLETED", log)
    assert job["NumNodes"] == "2"
    trained = read_run(tmp_path / "runs" / "slurm")
    assert trained.losses() == baseline.losses()
    assert trained.digests() == baseline.digests()
    assert "srun --nodes=2" in log.read_text()


def test_nodes_train_where_the_job_was_submitted(slurm: Slurm, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    body = {**tiny_recipe, "name": "quoted", "runs": "runs", "schedule": {"steps": 2, "warmup_steps": 1}}
    cwd, log = tmp_path / "it's a $HOME clone; 100%n", tmp_path / "job.log"
    cwd.mkdir()
    recipe = save_recipe(body, tmp_path / "tiny.yaml")
    number = slurm.submit(log, ROOT / "launch" / "slurm_train.sbatch", recipe, "--ranks", "1", cwd=cwd)
    wait_for(slurm, number, "COMPLETED", log)
    assert len(read_run(cwd / "runs" / "quoted").losses()) == 2


def test_a_job_that_slurm_asks_to_end_saves_and_is_requeued(
    slurm: Slurm, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The signal that Slurm sends five minutes before the time limit."""
    body = {**tiny_recipe, "name": "asked", "schedule": {"steps": 100_000, "warmup_steps": 1}}
    body["checkpoints"] = {"every_steps": 50_000}
    run = RunDirectory(tmp_path / "runs" / "asked")
    log = tmp_path / "job.log"
    number = slurm.submit(log, "launch/slurm_train.sbatch", save_recipe(body, tmp_path / "tiny.yaml"), "--ranks", "1")
    trains = until(lambda: run.metrics.exists() and len(run.metrics.read_text().splitlines()) > 5, JOB_SECONDS)
    assert trains, f"{log.read_text()}\n{slurm.logs()}"
    slurm.call("scancel", "--batch", "--signal=USR1", number)
    assert until(lambda: slurm.job(number).get("Restarts") == "1", JOB_SECONDS), log.read_text()
    status = run.read_status()
    assert (status["state"], status["step"]) == ("preempted", run.newest_checkpoint().step)
    slurm.call("scancel", number)


def test_an_array_builds_the_shards_that_one_machine_builds(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    arguments = [data / "corpus", data / "tokenizer", tmp_path / "shards", "--valid-fraction", "0.1"]
    log = tmp_path / "array.log"
    options = ["--array=0-1", "--cpus-per-task=1", "--mem-per-cpu=500M"]
    number = slurm.submit(log, *options, "launch/slurm_preprocess.sbatch", *arguments)
    assert until(lambda: not slurm.call("squeue", "--noheader", f"--jobs={number}").strip(), JOB_SECONDS), (
        log.read_text()
    )
    whole = build(data / "corpus", data / "tokenizer", tmp_path / "whole", BuildOptions(valid_fraction=0.1, workers=1))
    assert (tmp_path / "shards" / "manifest.json").exists(), f"{log.read_text()}\n{slurm.logs()}"
    for path in sorted(whole.directory.glob("*.bin")) + sorted(whole.directory.glob("*.idx")):
        assert (tmp_path / "shards" / path.name).read_bytes() == path.read_bytes(), path.name
