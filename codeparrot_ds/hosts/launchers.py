"""Launchers for other hosts: ssh (with or without pdsh), mpirun and srun. Each starts DeepSpeed's launcher per host."""

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

from codeparrot_ds.errors import ClusterError, ConfigError, list_problems
from codeparrot_ds.hosts import fan_out
from codeparrot_ds.hosts.fan_out import launcher_command
from codeparrot_ds.hosts.ssh import find_unreachable, kill_on, ssh_options
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.system.files import read_user_text, write_atomically
from codeparrot_ds.system.gpus import visible_gpus
from codeparrot_ds.system.jobs import say
from codeparrot_ds.system.paths import text_of

_SRUN_SECONDS = 15.0
# Variables that ranks on other hosts need. Secrets are excluded: the values appear on command lines there.
_FORWARDED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|TMPDIR|CUDA_HOME|PYTHON\w+"
    r"|(DS|GLOO|OMP|TORCH|HF|NCCL|FI|UCX|MV2|WANDB|MLFLOW|TENSORBOARD|CODEPARROT)_\w+)"
)
_PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)  # no shell changes it, nor pdsh
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)

Command = tuple[
    list[str], dict[str, str]
]  # program, without the ranks' own command; variables to add to its environment


class HostAccess(Protocol):
    """Access to the hosts of a job."""

    def unreachable(self, hosts: Iterable[str]) -> dict[str, str]:
        """Return the hosts that do not answer, with the reasons."""

    def kill(self, host: str, pids: Iterable[int]) -> None:
        """Send SIGKILL to processes on a host."""

    def address(self, host: str) -> str:
        """Return the address of a host. Raises ClusterError."""

    def command(self, run: RunDirectory, active: Mapping[str, int], master: str, port: int) -> Command:
        """Return the command that starts ranks on the `active` hosts, as many as each has slots."""

    def quote(self, argument: str) -> str:
        """Quote an argument of the ranks so that it arrives unchanged."""


class Ssh:
    """Launch over ssh; with pdsh, through `deepspeed` itself."""

    def __init__(self, launcher: str | None) -> None:
        self._pdsh = launcher == "pdsh" or (launcher is None and shutil.which("pdsh") is not None)
        if self._pdsh and shutil.which("pdsh") is None:
            raise ConfigError(
                "pdsh is not installed here. Install it (Debian: apt-get install pdsh), or use --launcher ssh."
            )
        if self._pdsh and (problems := _unquoted_by_deepspeed()):
            if launcher == "pdsh":
                fix = "Rename them, or use --launcher ssh, which quotes them."
                raise ConfigError(list_problems("with pdsh, DeepSpeed passes names to a shell unquoted", problems, fix))
            say(f"using ssh instead of pdsh, for which DeepSpeed does not quote names: {'; '.join(problems)}")
            self._pdsh = False

    def unreachable(self, hosts: Iterable[str]) -> dict[str, str]:
        """Return the hosts on which `true` cannot be run, with the reasons."""
        return find_unreachable(hosts)

    def kill(self, host: str, pids: Iterable[int]) -> None:
        """Send SIGKILL to processes on a host."""
        kill_on(host, pids)

    def address(self, host: str) -> str:
        """Return the address that the host name resolves to. Raises ClusterError."""
        return resolve_name(host)

    def command(self, run: RunDirectory, active: Mapping[str, int], master: str, port: int) -> Command:
        """Return the command that starts ranks on the `active` hosts, as many as each has slots."""
        hostfile, variables = run.path / "hostfile", run.path / "environment"
        write_atomically(hostfile, "".join(f"{host} slots={slots}\n" for host, slots in active.items()))
        quote = _escape if self._pdsh else shlex.quote  # DeepSpeed adds double quotes itself where needed
        lines = [f"{name}={quote(text_of(value))}\n" for name, value in forwarded(os.environ).items()]
        write_atomically(variables, "".join(lines))
        variables.chmod(0o600)
        rendezvous = ["--master_addr", master, "--master_port", str(port)]
        if self._pdsh:
            options = ["--hostfile", str(hostfile), "--force_multi", "--no_ssh_check", *rendezvous]
            return [*find_deepspeed(), "--quiet", *options], {"DS_ENV_FILE": str(variables.resolve())}
        options = ["--hostfile", str(hostfile), "--environment", str(variables), *rendezvous]
        return [sys.executable, "-m", fan_out.__name__, *options], {}

    def quote(self, argument: str) -> str:
        """Quote for pdsh and the shell of its ssh. DeepSpeed itself double-quotes arguments that contain a space."""
        if not self._pdsh:
            return argument
        return _escape(argument, but='"') if " " in argument else shlex.quote(argument).replace("%", "%%")


def _escape(text: str, but: str = "") -> str:
    """Escape `text` for pdsh, and for double quotes in a shell, except the characters in `but`, escaped later."""
    escaped = re.sub(r'["$\\`]', lambda found: found[0] if found[0] in but else f"\\{found[0]}", text)
    return escaped.replace("%", "%%")  # pdsh replaces %h, %n and %u


def _unquoted_by_deepspeed() -> list[str]:
    """Return the names that DeepSpeed's pdsh runner would pass to a shell unquoted although they need quotes."""
    names = {"working directory": str(Path.cwd()), "Python interpreter": sys.executable}
    return [f"the {what} {name!r}" for what, name in names.items() if not _PLAIN.fullmatch(name)]


class Mpirun(Ssh):
    """Open MPI's mpirun, one process per host. It reaches hosts over ssh or through the cluster's own integration."""

    def __init__(self) -> None:
        if shutil.which("mpirun") is None:
            raise ConfigError("mpirun is not installed here. Install it (Debian: apt-get install openmpi-bin).")

    def command(self, run: RunDirectory, active: Mapping[str, int], master: str, port: int) -> Command:
        """Return the command that starts ranks on the `active` hosts, as many as each has slots."""
        hostfile = run.path / "hostfile"
        write_atomically(hostfile, "".join(f"{host}\n" for host in active))
        script = f'exec {shlex.join(launcher_command(active, master, port))} --node_rank="$OMPI_COMM_WORLD_RANK" "$@"'
        # "seq" keeps the order of the hostfile; other mappings start with the host that runs mpirun.
        options = ["-n", str(len(active)), "--hostfile", str(hostfile), "--map-by", "seq", "--bind-to", "none"]
        options += ["--mca", "plm_rsh_args", shlex.join(ssh_options())]
        options += [part for name, value in forwarded(os.environ).items() for part in ("-x", f"{name}={value}")]
        if os.geteuid() == 0:  # e.g. in a container
            options.append("--allow-run-as-root")
        return ["mpirun", *options, "bash", "-c", script, "deepspeed"], {}

    def quote(self, argument: str) -> str:
        """Return the argument unchanged: no shell parses it."""
        return argument


class Srun:
    """Slurm's srun inside an allocation: one DeepSpeed launcher per host. srun forwards the environment."""

    def unreachable(self, hosts: Iterable[str]) -> dict[str, str]:
        """Return the hosts that Slurm reports as unhealthy, with the reasons."""
        found = {host: _scontrol_node(host) for host in hosts}
        bad = ("DOWN", "DRAIN", "FAIL", "NOT_RESPONDING", "POWER", "UNKNOWN")
        return {
            host: f"Slurm reports {facts.get('State', 'no state')}"
            for host, facts in found.items()
            if "State" not in facts or any(word in facts["State"] for word in bad)
        }

    def kill(self, host: str, pids: Iterable[int]) -> None:
        """Send SIGKILL to processes on a host."""
        _call(["srun", "--overlap", f"--nodelist={host}", "--ntasks=1", "kill", "-KILL", *map(str, pids)])

    def address(self, host: str) -> str:
        """Return the address that Slurm uses for a host. Raises ClusterError."""
        return resolve_name(_scontrol_node(host).get("NodeAddr", host))

    def command(self, run: RunDirectory, active: Mapping[str, int], master: str, port: int) -> Command:
        """Return the command that starts ranks on the `active` hosts, as many as each has slots."""
        launcher = launcher_command(active, master, port)
        script = f'exec {shlex.join(launcher)} --node_rank="$SLURM_NODEID" "$@"'
        count = str(len(active))
        nodes = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(active)}"]
        return ["srun", *nodes, "--kill-on-bad-exit=1", "bash", "-c", script, "deepspeed"], {}

    def quote(self, argument: str) -> str:
        """Return the argument unchanged: no shell parses it."""
        return argument


def slurm_slots(ranks: int | None) -> dict[str, int]:
    """Return the hosts of this Slurm allocation and the ranks per host: its GPUs, or `ranks`. Raises ConfigError."""
    hosts = _call(["scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")])
    if not hosts:
        raise ConfigError("--launcher srun must run inside a Slurm allocation: start it with sbatch or salloc.")
    slots = ranks or int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if not slots:
        raise ConfigError(
            "Slurm allocated no GPUs to this job. Request some (--gpus-per-node), or set --ranks per host."
        )
    return dict.fromkeys(hosts.split(), slots)


def _scontrol_node(host: str) -> dict[str, str]:
    words = _call(["scontrol", "--oneliner", "show", "node", host]).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def _call(command: list[str]) -> str:
    """Run a short command. Returns its output, empty if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_SRUN_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def resolve_name(host: str) -> str:
    """Resolve a host name to an IPv4 address on this machine. Raises ClusterError."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ClusterError(
            f"{host}: this host name cannot be resolved to an IPv4 address here ({error}). Add it to DNS or /etc/hosts."
        ) from None


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that ranks on other hosts get from this environment and from `.deepspeed_env`.

    DeepSpeed itself forwards almost nothing, and fails on a comment or an empty line in that file.
    """
    found = {
        name: value
        for name, value in environment.items()
        if _FORWARDED.fullmatch(name) and not _SECRET.search(name) and "\n" not in value
    }
    for directory in (Path.home(), Path.cwd()):
        file = directory / ".deepspeed_env"
        for line in read_user_text(file).splitlines() if file.is_file() else []:
            name, equals, value = line.strip().partition("=")
            if equals and not name.startswith("#") and not _SECRET.search(name):
                found[name.strip()] = value.strip()
    return found


def find_deepspeed() -> list[str]:
    """Return `deepspeed` if PATH finds this environment's, else its path, or its module. Raises ConfigError."""
    own = Path(sys.executable).with_name("deepspeed")
    on_path = shutil.which("deepspeed")
    if own.exists():
        return ["deepspeed" if on_path and Path(on_path).samefile(own) else str(own)]
    if on_path is None and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("`deepspeed` is not installed. Install it: pip install deepspeed==0.19.8")
    # Installed outside this environment, e.g. with `pip install --target`.
    return [sys.executable, "-m", "deepspeed.launcher.runner"] if on_path is None else ["deepspeed"]


def ranks_here(count: int, on_cpu: bool) -> list[str]:
    """Return the options of `deepspeed` for `count` ranks on this machine."""
    visible = visible_gpus()
    if visible and not on_cpu:  # with a count, deepspeed would use the machine's first GPUs instead
        return ["--include", f"localhost:{','.join(visible[:count])}"]
    return ["--num_gpus", str(count)]
