"""The ways to other hosts: ssh, with pdsh or alone, mpirun, and srun. Each starts DeepSpeed's launcher on all hosts."""

import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from codeparrot_ds.errors import ClusterError, ConfigError
from codeparrot_ds.hosts import fan_out
from codeparrot_ds.hosts.fan_out import launcher_command
from codeparrot_ds.hosts.ssh import find_unreachable, kill_on, ssh_options
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.system.files import write_atomically
from codeparrot_ds.system.gpus import visible_gpus

_SRUN_SECONDS = 15.0
# What ranks on other hosts need of this environment. Never a secret: the values stand on command lines there.
_FORWARDED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|TMPDIR|CUDA_HOME|(DS|GLOO|OMP|TORCH|HF|NCCL|FI|UCX|WANDB|TENSORBOARD|CODEPARROT)_\w+)"
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)

Command = tuple[list[str], dict[str, str]]  # the program up to what the ranks run, and what to add to its environment


class Reach(Protocol):
    """A way to the hosts of a job."""

    def unreachable(self, hosts: Iterable[str]) -> dict[str, str]:
        """Those that do not answer, and why."""

    def kill(self, host: str, pids: Iterable[int]) -> None:
        """SIGKILL processes there."""

    def address(self, host: str) -> str:
        """A host's address. Raises ClusterError."""

    def command(self, run: RunDirectory, active: Mapping[str, int], master: str, port: int) -> Command:
        """What starts ranks on the `active` hosts with their slots."""

    def quote(self, argument: str) -> str:
        """An argument of the ranks, written so that it arrives as it is."""


class Ssh:
    """By ssh; with pdsh it is `deepspeed` itself that does so."""

    def __init__(self, launcher: str | None) -> None:
        self._pdsh = launcher == "pdsh" or (launcher is None and shutil.which("pdsh") is not None)
        if self._pdsh and shutil.which("pdsh") is None:
            raise ConfigError(
                "pdsh is not installed here. Install it (Debian: apt-get install pdsh), or use ssh alone."
            )

    def unreachable(self, hosts: Iterable[str]) -> dict[str, str]:
        """Those on which not even `true` runs, and why."""
        return find_unreachable(hosts)

    def kill(self, host: str, pids: Iterable[int]) -> None:
        """SIGKILL processes there."""
        kill_on(host, pids)

    def address(self, host: str) -> str:
        """A host's address, by its name. Raises ClusterError."""
        return resolve_name(host)

    def command(self, run: RunDirectory, active: Mapping[str, int], master: str, port: int) -> Command:
        """What starts ranks on the `active` hosts with their slots."""
        hostfile, variables = run.path / "hostfile", run.path / "environment"
        write_atomically(hostfile, "".join(f"{host} slots={slots}\n" for host, slots in active.items()))
        quote = _escape if self._pdsh else shlex.quote  # DeepSpeed puts double quotes around them where it sees need
        lines = [f"{name}={quote(value)}\n" for name, value in forwarded(os.environ).items()]
        write_atomically(variables, "".join(lines))
        variables.chmod(0o600)
        rendezvous = ["--master_addr", master, "--master_port", str(port)]
        if self._pdsh:
            options = ["--hostfile", str(hostfile), "--force_multi", "--no_ssh_check", *rendezvous]
            return [*find_deepspeed(), "--quiet", *options], {"DS_ENV_FILE": str(variables.resolve())}
        options = ["--hostfile", str(hostfile), "--environment", str(variables), *rendezvous]
        return [sys.executable, "-m", fan_out.__name__, *options], {}

    def quote(self, argument: str) -> str:
        """For the shell that pdsh's ssh starts. DeepSpeed itself puts double quotes around what holds a space."""
        if not self._pdsh:
            return argument
        return _escape(argument, but='"') if " " in argument else shlex.quote(argument)


def _escape(text: str, but: str = "") -> str:
    """`text` for between double quotes of a shell, but for what is escaped later."""
    return re.sub(r'["$\\`]', lambda found: found[0] if found[0] in but else f"\\{found[0]}", text)


class Mpirun(Ssh):
    """Open MPI's mpirun, which reaches the hosts by ssh or by what a cluster has built into it: a process a host."""

    def __init__(self) -> None:
        if shutil.which("mpirun") is None:
            raise ConfigError("mpirun is not installed here. Install it (Debian: apt-get install openmpi-bin).")

    def command(self, run: RunDirectory, active: Mapping[str, int], master: str, port: int) -> Command:
        """What starts ranks on the `active` hosts with their slots."""
        hostfile = run.path / "hostfile"
        write_atomically(hostfile, "".join(f"{host}\n" for host in active))
        script = f'exec {shlex.join(launcher_command(active, master, port))} --node_rank="$OMPI_COMM_WORLD_RANK" "$@"'
        # "seq" keeps the order of the file: other mappings begin with the host of mpirun itself.
        options = ["-n", str(len(active)), "--hostfile", str(hostfile), "--map-by", "seq", "--bind-to", "none"]
        options += ["--mca", "plm_rsh_args", shlex.join(ssh_options())]
        options += [part for name, value in forwarded(os.environ).items() for part in ("-x", f"{name}={value}")]
        if os.geteuid() == 0:  # as in a container
            options.append("--allow-run-as-root")
        return ["mpirun", *options, "bash", "-c", script, "deepspeed"], {}

    def quote(self, argument: str) -> str:
        """No shell reads it."""
        return argument


class Srun:
    """Inside a Slurm allocation: one task a host, which is DeepSpeed's launcher. The environment goes along."""

    def unreachable(self, hosts: Iterable[str]) -> dict[str, str]:
        """Those that Slurm says are not well."""
        found = {host: _scontrol_node(host) for host in hosts}
        bad = ("DOWN", "DRAIN", "FAIL", "NOT_RESPONDING", "POWER", "UNKNOWN")
        return {
            host: f"Slurm says {facts.get('State', 'nothing')}"
            for host, facts in found.items()
            if "State" not in facts or any(word in facts["State"] for word in bad)
        }

    def kill(self, host: str, pids: Iterable[int]) -> None:
        """SIGKILL processes there."""
        _call(["srun", "--overlap", f"--nodelist={host}", "--ntasks=1", "kill", "-KILL", *map(str, pids)])

    def address(self, host: str) -> str:
        """What Slurm itself calls it by. Raises ClusterError."""
        return resolve_name(_scontrol_node(host).get("NodeAddr", host))

    def command(self, run: RunDirectory, active: Mapping[str, int], master: str, port: int) -> Command:
        """What starts ranks on the `active` hosts with their slots."""
        launcher = launcher_command(active, master, port)
        script = f'exec {shlex.join(launcher)} --node_rank="$SLURM_NODEID" "$@"'
        count = str(len(active))
        nodes = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(active)}"]
        return ["srun", *nodes, "--kill-on-bad-exit=1", "bash", "-c", script, "deepspeed"], {}

    def quote(self, argument: str) -> str:
        """No shell reads it."""
        return argument


def slurm_slots(ranks: int | None) -> dict[str, int]:
    """Hosts of this Slurm allocation, and how many ranks each gets: its GPUs, or `ranks`. Raises ConfigError."""
    said = _call(["scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")])
    if not said:
        raise ConfigError("--launcher srun works inside a Slurm allocation: start it with sbatch or salloc.")
    slots = ranks or int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if not slots:
        raise ConfigError("Slurm gave this job no GPUs. Ask for some (--gpus-per-node), or give --ranks for each host.")
    return dict.fromkeys(said.split(), slots)


def _scontrol_node(host: str) -> dict[str, str]:
    words = _call(["scontrol", "--oneliner", "show", "node", host]).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def _call(command: list[str]) -> str:
    """What a short command prints; nothing when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SRUN_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def resolve_name(host: str) -> str:
    """A host's address, as this machine knows it. Raises ClusterError."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ClusterError(f"{host}: this name has no address here ({error}). Add it to DNS or /etc/hosts.") from None


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """What ranks on other hosts get of this environment, and of `.deepspeed_env`.

    DeepSpeed itself hands over next to nothing, and fails on a comment or an empty line in its file.
    """
    found = {
        name: value
        for name, value in environment.items()
        if _FORWARDED.fullmatch(name) and not _SECRET.search(name) and "\n" not in value
    }
    for directory in (Path.home(), Path.cwd()):
        file = directory / ".deepspeed_env"
        for line in file.read_text().splitlines() if file.is_file() else []:
            name, equals, value = line.strip().partition("=")
            if equals and not name.startswith("#") and not _SECRET.search(name):
                found[name.strip()] = value.strip()
    return found


def find_deepspeed() -> list[str]:
    """`deepspeed` if PATH has the one of this environment, else its path, or that of its module. Raises ConfigError."""
    beside = Path(sys.executable).with_name("deepspeed")
    on_path = shutil.which("deepspeed")
    if beside.exists():
        return ["deepspeed" if on_path and Path(on_path).samefile(beside) else str(beside)]
    if on_path is None and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("`deepspeed` is not installed. Install it: pip install deepspeed==0.19.8")
    # Installed beside another environment's packages, as by `pip install --target`.
    return [sys.executable, "-m", "deepspeed.launcher.runner"] if on_path is None else ["deepspeed"]


def ranks_here(count: int, on_cpu: bool) -> list[str]:
    """Options of `deepspeed` for so many ranks on this machine."""
    visible = visible_gpus()
    if visible and not on_cpu:  # with a count, deepspeed would take the first GPUs of the machine instead
        return ["--include", f"localhost:{','.join(visible[:count])}"]
    return ["--num_gpus", str(count)]
