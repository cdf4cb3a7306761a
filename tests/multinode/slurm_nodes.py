"""A two-node Slurm on this machine: Debian's munged, slurmctld and two slurmd, each node with one CPU.

Usage: python -m tests.multinode.slurm_nodes COMMAND [ARGUMENT ...]    runs the command with the cluster's environment
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT
from tests.faults.jobs import until
from tests.multinode.conftest import TOOLS_PATH

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun", "squeue")
START_SECONDS = 60

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


def missing_tools() -> list[str]:
    """Programs that it needs and that are not installed (Debian: slurm-wlm, munge)."""
    return [tool for tool in TOOLS if shutil.which(tool, path=TOOLS_PATH) is None]


@contextmanager
def two_nodes(directory: Path) -> Iterator[Slurm]:
    """Run a controller and two nodes with their files in `directory`, and end all jobs and daemons afterwards."""
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


def main() -> int:
    """Run a command with the environment of a cluster of its own, and return its exit code."""
    if missing := missing_tools():
        print(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="slurm-") as directory, two_nodes(Path(directory)) as cluster:
        return subprocess.run(sys.argv[1:], env=cluster.environment(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
