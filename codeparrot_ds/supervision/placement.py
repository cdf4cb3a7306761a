"""Placement of a training attempt: this machine, or the responsive hosts of a hostfile or allocation."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codeparrot_ds.doctor.examine import examine
from codeparrot_ds.errors import ClusterError, ConfigError
from codeparrot_ds.hosts.hostfile import read_hostfile
from codeparrot_ds.hosts.launchers import (
    HostAccess,
    Mpirun,
    Srun,
    Ssh,
    find_deepspeed,
    forwarded,
    ranks_here,
    slurm_slots,
)
from codeparrot_ds.planning.machine import CPU_RANKS
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.run.sections import Batch
from codeparrot_ds.system.jobs import say

_DEEPSPEED_PORT = 29500  # its default `--master_port`


class UnreachableError(ClusterError):
    """Too few hosts answer. They may do so again: a restart waits for them."""


@dataclass(frozen=True)
class Hosts:
    """Where to train, and what to do when a host is lost.

    Attributes:
        hostfile: hosts and slots; None with `launcher` srun, which uses those of the allocation.
        min_hosts: fewest hosts to continue with; by default all that are not spare.
        spare_hosts: number of hosts at the end of the file that only replace others.
        regrow_seconds: interval of checks for recovered hosts; if one is back, the job saves and restarts with it.
        address: address at which the hosts reach this machine; detected by default.
        master_addr: address at which the other hosts reach the first; by default its name, resolved here.
        doctor: check all hosts first, over ssh; unfit hosts are skipped, or refused if too few remain.
        launcher: "pdsh", "ssh", "mpirun" or "srun"; by default pdsh if it is installed, else ssh.
        ranks: ranks per host, with srun.
        wait_seconds: how long a restart waits for hosts that do not answer.
    """

    hostfile: Path | None
    min_hosts: int | None = None
    spare_hosts: int = 0
    regrow_seconds: float = 300.0
    address: str | None = None
    master_addr: str | None = None
    doctor: bool = True
    launcher: str | None = None
    ranks: int | None = None
    wait_seconds: float = 600.0


@dataclass(frozen=True)
class Start:
    """Where an attempt runs.

    Attributes:
        program: command that starts the ranks, without the program that they run.
        extra: variables to add to its environment.
        address: address at which the ranks reach this machine.
        slots: hosts in rank order, with the number of ranks of each.
        restart_reason: returns a reason to stop and restart the job, or an empty string.
        kill: kills processes on a host.
        quote: quotes an argument of the ranks for the layers in between.
    """

    program: Sequence[str]
    extra: Mapping[str, str]
    address: str
    slots: Mapping[str, int]
    restart_reason: Callable[[], str]
    kill: Callable[[str, Iterable[int]], None]
    quote: Callable[[str], str] = str


class ThisMachine:
    """This machine only: one rank per GPU, or the requested number."""

    def __init__(self, ranks: int | None, batch: Batch) -> None:
        gpus = _count_gpus()
        self._extra = {} if gpus else {"DS_ACCELERATOR": "cpu"}
        self._ranks = ranks or (max_ranks(batch, gpus) if gpus else CPU_RANKS)

    def prepare(self, number: int) -> Start:
        """Return what attempt `number` needs to start."""
        program = [*find_deepspeed(), "--quiet", *_port_options(), *ranks_here(self._ranks, on_cpu=bool(self._extra))]
        slots = {socket.gethostname(): self._ranks}
        return Start(program, self._extra, "127.0.0.1", slots, lambda: "", _kill_here)

    def lost(self, host: str | None, in_a_row: int) -> None:
        """Do nothing: there is no other machine."""


def _kill_here(host: str, pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class ManyHosts:
    """Hosts of a hostfile or allocation: uses those that answer now, with spares replacing lost ones."""

    def __init__(self, hosts: Hosts, recipe: Recipe) -> None:
        self._hosts, self._recipe, self._batch = hosts, recipe, recipe.batch
        self._run = RunDirectory(recipe.run_directory)
        self._access: HostAccess
        if hosts.hostfile is None:
            self._access, self._slots = Srun(), slurm_slots(hosts.ranks)
            self._from = "this Slurm allocation"
        else:
            self._access = Mpirun() if hosts.launcher == "mpirun" else Ssh(hosts.launcher)
            self._slots, self._from = read_hostfile(hosts.hostfile), str(hosts.hostfile)
        self._wanted = len(self._slots) - hosts.spare_hosts
        self._fewest = self._wanted if hosts.min_hosts is None else hosts.min_hosts
        if not 1 <= self._fewest <= self._wanted:
            raise ConfigError(
                f"{self._from}: {len(self._slots)} hosts, {hosts.spare_hosts} of them spare, at least "
                f"{self._fewest} required. Set --min-hosts to at least 1, and --spare-hosts below the number of hosts."
            )
        self._suspect = ""
        self._answered: set[str] = set()  # at the last check
        self._unfit: dict[str, str] = {}  # rejected by the doctor, although they answer
        self._regrow: _Regrow | None = None

    def prepare(self, number: int) -> Start:
        """Return what attempt `number` needs to start.

        Raises ClusterError if too few hosts are fit, UnreachableError if some of the others do not answer.
        """
        if self._regrow is not None:
            self._regrow.stop()
        silent = self._access.unreachable(self._slots)
        answer = set(self._slots) - set(silent)
        if self._hosts.doctor and isinstance(self._access, Ssh) and answer - self._answered:
            self._unfit = self._examine()
        self._answered = answer
        try:
            active = self._choose({**self._unfit, **silent})
        except ClusterError as error:
            if silent:
                raise UnreachableError(str(error)) from None
            self._answered = set()  # examine them again: they may have been fixed in the meantime
            raise
        # Ranks of the previous attempt may still hold its port.
        port = _DEEPSPEED_PORT + number % 100
        program, extra = self._access.command(self._run, active, self._master_address(active), port)
        self._regrow = None
        if len(active) < self._wanted:
            without = ", ".join(host for host in self._slots if host not in active)
            say(f"training on {len(active)} of {self._wanted} hosts, without {without}")
            self._regrow = _Regrow(self._access, set(silent), self._hosts.regrow_seconds)
        return Start(
            program,
            extra,
            self._hosts.address or _address_towards(map(self._access.address, active)),
            active,
            lambda: self._regrow.found if self._regrow else "",
            self._access.kill,
            self._access.quote,
        )

    def lost(self, host: str | None, in_a_row: int) -> None:
        """Note a failed host: after two consecutive failures it is skipped if the others suffice."""
        self._suspect = host or "" if in_a_row > 1 else ""

    def _examine(self) -> dict[str, str]:
        """Return the hosts that answer but are unfit, with the reasons."""
        cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
        report = examine(
            self._slots, self._recipe, port=_DEEPSPEED_PORT + 1, cpu=cpu, environment=forwarded(os.environ)
        )
        say("\n".join(report.table()))
        return {each.host: "; ".join(each.red.values()) for each in report.hosts if each.red and "ssh" not in each.red}

    def _choose(self, unreachable: Mapping[str, str]) -> dict[str, int]:
        """Return hosts and slots of the next attempt. Raises ClusterError if too few are left."""
        good = [host for host in self._slots if host not in unreachable]
        if self._suspect in good and len(good) > self._fewest:
            good.remove(self._suspect)
        active = good[: self._wanted]
        while len(active) >= self._fewest:
            try:
                self._batch.micro_batch_and_accumulation(sum(self._slots[host] for host in active))
            except ConfigError:
                active.pop()  # the batch does not divide evenly over these ranks
                continue
            return {host: self._slots[host] for host in active}
        lost = (
            "; ".join(f"{host}: {reason}" for host, reason in unreachable.items())
            or "the batch cannot be divided among them"
        )
        raise ClusterError(
            f"{self._from}: {len(good)} of {len(self._slots)} hosts can train, but {self._fewest} are needed "
            f"({lost}). Fix them, or continue with fewer: --min-hosts."
        )

    def _master_address(self, active: Mapping[str, int]) -> str:
        if self._hosts.master_addr:
            return self._hosts.master_addr
        first, *others = active
        found = self._access.address(first)
        # A machine's own name often resolves to loopback, which is wrong on the other hosts.
        return _address_towards(map(self._access.address, others)) if found.startswith("127.") and others else found


class _Regrow(threading.Thread):
    """Polls lost hosts until one answers again; `found` then names it."""

    def __init__(self, access: HostAccess, lost: set[str], every_seconds: float) -> None:
        super().__init__(daemon=True)
        self.found = ""
        self._access, self._lost, self._seconds = access, lost, every_seconds
        self._stopped = threading.Event()
        self.start()

    def stop(self) -> None:
        """Stop polling."""
        self._stopped.set()

    def run(self) -> None:
        """Poll until a host is back."""
        while not self.found and self._lost and not self._stopped.wait(self._seconds):
            if back := self._lost - set(self._access.unreachable(self._lost)):
                self.found = f"{', '.join(sorted(back))} answers again"


def _address_towards(addresses: Iterable[str]) -> str:
    """Return this machine's address on the route to the first of `addresses` that is another machine's."""
    own = "127.0.0.1"
    for address in addresses:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # UDP connect sends nothing
            try:
                probe.connect((address, 9))
            except OSError as error:
                raise ClusterError(f"{address}: no route from this machine ({error}).") from None
            own = str(probe.getsockname()[0])
        if not own.startswith("127.") and own != address:
            return own
    return own


def max_ranks(batch: Batch, gpus: int) -> int:
    """Return the largest number of ranks, up to `gpus`, that the recipe's batch divides evenly over."""
    for ranks in range(gpus, 1, -1):
        try:
            batch.micro_batch_and_accumulation(ranks)
        except ConfigError:
            continue
        return ranks
    return 1


def _port_options() -> list[str]:
    """Return the option for a free port if DeepSpeed's default is taken, e.g. by another run on this machine."""
    for port in (_DEEPSPEED_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            found = probe.getsockname()[1]
            return [] if found == _DEEPSPEED_PORT else ["--master_port", str(found)]
    return []


def _count_gpus() -> int:
    """Count the GPUs that torch can use here, of any vendor (a plan asks nvidia-smi, which is faster); 0 on CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()
