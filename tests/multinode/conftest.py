"""Three real hosts on one machine, each with its own network, host name, processes, `/etc/hosts` and sshd."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil
import pytest

from tests.conftest import LAUNCH_TIMEOUT, ROOT, Launched, set_options

TOOLS = ("ip", "tc", "nsenter", "pdsh", "setpriv", "ssh", "ssh-keygen", "sshd", "unshare")
TOOLS_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # sshd and ip may not be on PATH
ADDRESSES = ("192.0.2.1", "192.0.2.2", "192.0.2.3")  # RFC 5737: reserved for documentation, so no real machine has them
LINK_RATE = "200mbit"
SET_UP_TIMEOUT = 30  # seconds; it takes about one

# First process of a host, in its own namespaces: its mounts are invisible outside and end with the host. sshd needs an
# empty directory in /run, which the machine has only once its own sshd has started.
FIRST_PROCESS = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
mount --bind "$2" /etc/hosts
"$3" -D -e -f "$4" &
while :; do wait; sleep 1; done  # it goes on when its sshd is stopped
"""

SSHD_CONFIG = """
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/user_key.pub
# The files above are below the world-writable /tmp.
StrictModes no
PermitRootLogin prohibit-password
KbdInteractiveAuthentication no
PasswordAuthentication no
UsePAM no
UseDNS no
PidFile none
"""

SSH_CONFIG = """
BatchMode yes
ConnectTimeout 5
IdentitiesOnly yes
IdentityFile {directory}/user_key
UserKnownHostsFile {directory}/known_hosts
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking yes
LogLevel ERROR
"""


@dataclass(frozen=True)
class RealHosts:
    """Hosts that reach each other by name over `eth0`, as root with a temporary key. They share all files.

    Attributes:
        hosts: their names, which are also those of their network namespaces.
        addresses: of their `eth0`.
        ssh_config: for `ssh -F`; `run` hands it to pdsh.
        first_processes: process id of each host's first process, as this machine sees it.
    """

    hosts: tuple[str, ...]
    addresses: tuple[str, ...]
    ssh_config: Path
    first_processes: tuple[int, ...]

    def processes(self, host: int) -> list[psutil.Process]:
        """Return all processes on a host except its first process, its sshd, and zombies."""
        found = []
        if not psutil.pid_exists(self.first_processes[host]):  # all others have ended with it
            return []
        for process in psutil.Process(self.first_processes[host]).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() not in ("sshd", "sleep") and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self, host: int) -> list[psutil.Process]:
        """Return the ranks on a host."""
        found = []
        for process in self.processes(host):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(argument.startswith("--local_rank=") for argument in process.cmdline()):
                    found.append(process)
        return found

    def set_link(self, host: int, state: str) -> None:
        """`down`: cut the host off; `up`: connect it again."""
        _set_up(["ip", "-n", self.hosts[host], "link", "set", "eth0", state])

    @contextlib.contextmanager
    def without_sshd(self, host: int) -> Iterator[None]:
        """Stop a host from answering ssh inside the block."""
        sshd = [each for each in psutil.Process(self.first_processes[host]).children() if each.name() == "sshd"]
        assert len(sshd) == 1
        command = sshd[0].cmdline()
        sshd[0].kill()
        try:
            yield
        finally:
            # Its title is that of sshd now: "sshd: PATH -D -e -f CONFIG [listener] …"
            words = " ".join(command).split()
            again = [words[1], "-D", "-e", "-f", words[words.index("-f") + 1]]
            self.start(again, host=host)

    def start(
        self,
        command: Sequence[str | Path],
        *,
        host: int = 0,
        env: Mapping[str, str] | None = None,
        cwd: Path = Path("/"),
        output: IO[str] | int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a command on the first host (or `host`) with `env` added to this environment."""
        environment = {
            **os.environ,
            "PATH": TOOLS_PATH,
            "PDSH_RCMD_TYPE": "ssh",
            "PDSH_SSH_ARGS_APPEND": f"-F {self.ssh_config}",
            **(env or {}),
        }
        enter = ["nsenter", f"--target={self.first_processes[host]}", "--mount", "--uts", "--net", "--pid", "--"]
        full = [*enter, "env", f"--chdir={cwd}", *map(str, command)]
        return subprocess.Popen(
            full, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )

    def run(self, command: Sequence[str | Path], *, timeout: float, **how: Any) -> Launched:
        """`start` a command and wait for it to exit.

        When it takes more than `timeout` seconds, everything on the hosts but sshd is killed and the test fails.
        """
        # A file: a pipe would stay open as long as any grandchild that outlives the command.
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            process = self.start(command, output=output, **how)
            try:
                process.wait(timeout)
            except BaseException as error:  # Ctrl-C too: the command has no terminal to stop it
                self.end_commands(process)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                output.seek(0)
                text = f"not done after {timeout:g} s. Its output:\n{output.read()}"
                pytest.fail(f"{' '.join(map(str, command))}: {text}")
            output.seek(0)
            return Launched(process.returncode, output.read())

    def end_commands(self, entered: subprocess.Popen[bytes]) -> None:
        """Kill all processes on the hosts except their first processes and sshd, in any state a test has left.

        By SIGKILL: at SIGTERM `deepspeed` would have each host `pkill -f` the name of its launcher.
        """
        doomed = [process for host in range(len(self.hosts)) for process in self.processes(host)]
        with contextlib.suppress(psutil.NoSuchProcess):
            doomed += psutil.Process(entered.pid).children(recursive=True)
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        entered.kill()
        entered.wait()


def user_environment(home: Path) -> dict[str, str]:
    """Environment of a user of the first host, with this interpreter's programs on PATH."""
    return {
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{TOOLS_PATH}",
    }


@pytest.fixture(scope="module")
def real_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealHosts]:
    """Three hosts with an sshd each."""
    with make_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@contextlib.contextmanager
def make_hosts(directory: Path) -> Iterator[RealHosts]:
    """Set up three hosts with an sshd each, and remove everything afterwards, even if the set-up fails."""
    if os.geteuid() != 0:
        unavailable("only root can make network namespaces")
    missing = [tool for tool in TOOLS if shutil.which(tool, path=TOOLS_PATH) is None]
    if missing:
        unavailable(f"{', '.join(missing)} not found: apt-get install iproute2 openssh-server pdsh util-linux")
    with contextlib.ExitStack() as undo:
        yield _start_hosts(directory, undo)


def unavailable(reason: str) -> NoReturn:
    """Skip the test, or fail it in CI, where a skip would go unnoticed."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"hosts cannot be made here: {reason}")
    pytest.skip(f"hosts cannot be made here: {reason}")


def run_deepspeed(
    real_hosts: RealHosts,
    recipe: Path,
    directory: Path,
    *settings: str,
    hosts: Sequence[int] = (0, 1),
    slots: int = 1,
    cwd: Path = ROOT,
) -> Launched:
    """Run `deepspeed` in `cwd` on the first of `hosts` for `slots` ranks on each, hostfile and home in `directory`."""
    hostfile = directory / "hostfile"
    hostfile.write_text("".join(f"{real_hosts.hosts[host]} slots={slots}\n" for host in hosts))
    environment = {
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{TOOLS_PATH}",
    }
    # sshd gives the ranks a bare environment; DeepSpeed adds the variables in this file.
    home = directory / "home"
    home.mkdir(exist_ok=True)
    (home / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in environment.items()))
    deepspeed = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed"
    command: list[str | Path] = [
        deepspeed,
        "--hostfile",
        hostfile,
        "--launcher",
        "pdsh",
        "--master_addr",
        real_hosts.addresses[hosts[0]],
    ]
    command += ["--no_ssh_check", "--module", "codeparrot_ds.train", recipe]
    command += set_options(settings)
    return real_hosts.run(
        command, timeout=LAUNCH_TIMEOUT, env={**environment, "HOME": str(home)}, cwd=cwd, host=hosts[0]
    )


def _start_hosts(directory: Path, undo: contextlib.ExitStack) -> RealHosts:
    """Create the hosts and wait until each answers by name; `undo` collects the clean-up."""
    identity = secrets.token_hex(3)
    names = tuple(f"ds-{identity}-{letter}" for letter in "abc")
    _write_ssh_files(directory, names)
    _make_network(names, undo)
    started = [_start_sshd(directory, name, undo) for name in names]
    hosts = RealHosts(names, ADDRESSES, directory / "ssh_config", tuple(started))
    # Each must answer under its own name from where the test calls it, which proves that ssh reaches it.
    for name in names:
        _wait_for_answer(hosts, name, directory)
    return hosts


def _write_ssh_files(directory: Path, names: tuple[str, ...]) -> None:
    for key in ("host_key", "user_key"):
        _set_up(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "real-hosts-test", "-f", str(directory / key)])
    host_key = (directory / "host_key.pub").read_text()
    (directory / "known_hosts").write_text(f"{','.join(names)} {host_key}")
    (directory / "sshd_config").write_text(SSHD_CONFIG.format(directory=directory))
    (directory / "ssh_config").write_text(SSH_CONFIG.format(directory=directory))
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in zip(ADDRESSES, names, strict=True))]
    (directory / "hosts").write_text("\n".join(lines) + "\n")


def _make_network(names: tuple[str, ...], undo: contextlib.ExitStack) -> None:
    """Each host's `eth0` is a cable to a switch."""
    switch = f"{names[0]}-switch"
    for name in (switch, *names):
        done = _call(["ip", "netns", "add", name])
        if done.returncode != 0:  # e.g. in a container without CAP_SYS_ADMIN
            unavailable(f"ip netns add: {done.stdout.strip()}")
        undo.callback(_call, ["ip", "netns", "delete", name])
    _set_up(["ip", "-n", switch, "link", "add", "bridge", "type", "bridge"])
    _set_up(["ip", "-n", switch, "link", "set", "bridge", "up"])
    # Both ends are created in their namespaces: the machine never has a second eth0, and they vanish with them.
    for number, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
        port = f"port{number}"
        _set_up(["ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch])
        _set_up(["ip", "-n", switch, "link", "set", port, "master", "bridge", "up"])
        _set_up(["ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0"])
        _set_up(["ip", "-n", name, "link", "set", "lo", "up"])
        _set_up(["ip", "-n", name, "link", "set", "eth0", "up"])
        # Slow enough that tests on the same cores do not make one link slower than the others.
        shaper = ["root", "tbf", "rate", LINK_RATE, "burst", "256kb", "latency", "50ms"]
        _set_up(["tc", "-n", name, "qdisc", "add", "dev", "eth0", *shaper])


def _start_sshd(directory: Path, name: str, undo: contextlib.ExitStack) -> int:
    """Start a host's sshd in its own process, mount and UTS namespaces and return its process id.

    It is the first process of its process namespace, so the kernel ends all others there with it. setpriv ends it
    with pytest, should pytest be killed before it can clean up.
    """
    sshd = shutil.which("sshd", path=TOOLS_PATH) or "sshd"  # sshd requires an absolute path
    command = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", name]
    command += ["unshare", "--uts", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]
    command += ["sh", "-c", FIRST_PROCESS, "host", name, str(directory / "hosts"), sshd, str(directory / "sshd_config")]
    with open(directory / f"{name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, env=_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    undo.callback(_end_host, process)
    deadline = time.monotonic() + SET_UP_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        if children := psutil.Process(process.pid).children():
            return children[0].pid
        time.sleep(0.05)
    pytest.fail(f"{name} did not start:\n{(directory / f'{name}.log').read_text()}")


def _end_host(process: subprocess.Popen[bytes]) -> None:
    """Stop a host and wait for all its processes: `unshare` exits only after its child, which exits last."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            child.kill()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


def _wait_for_answer(hosts: RealHosts, name: str, directory: Path) -> None:
    deadline = time.monotonic() + SET_UP_TIMEOUT
    while True:
        answer = hosts.run(["ssh", "-F", hosts.ssh_config, name, "uname -n"], timeout=SET_UP_TIMEOUT)
        if answer.returncode == 0:
            break
        if time.monotonic() > deadline:
            log = (directory / f"{name}.log").read_text()
            pytest.fail(f"no ssh from {hosts.hosts[0]} to {name}:\n{answer.output}\nThe log of its sshd:\n{log}")
        time.sleep(0.2)
    if answer.output.strip() != name:
        pytest.fail(f"ssh to {name} arrived at {answer.output.strip()}")


def _set_up(command: Sequence[str]) -> None:
    done = _call(command)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")


def _call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SET_UP_TIMEOUT,
        check=False,
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": TOOLS_PATH}
