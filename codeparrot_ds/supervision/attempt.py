"""Run one attempt of a job: watch its ranks, terminate all of them when one dies, and report the outcome.

With `deepspeed` alone each host must notice by itself that another has died, which takes minutes, and the exit code
does not show what happened. Here every rank holds a connection to this process (hosts/lifeline.py): the first
connection that breaks identifies the rank that died and its host, and closing the others terminates the rest.
"""

import contextlib
import os
import secrets
import selectors
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from codeparrot_ds.errors import EXIT_CRASHED, EXIT_PREEMPTED, EXIT_USER_ERROR
from codeparrot_ds.hosts.lifeline import Lines, Supervisor, keep_alive
from codeparrot_ds.system.jobs import die_with_parent, say

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 2.0  # for other ranks to report their errors, and for deepspeed to exit on its own
_END_SECONDS = 10.0  # for ranks that were told to exit; then they are killed
_FIRST_SECONDS = 600.0  # until the first rank connects: imports from a cold disk
_OTHERS_SECONDS = 120.0  # from then until the last rank connects
_AGAIN_SECONDS = 2.0  # a scheduler may also signal the enclosing script, which forwards the signal
_MAX_SECONDS_BETWEEN = 300.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass
class _Rank:
    """What one rank has reported about itself."""

    connection: socket.socket
    address: str
    lines: Lines = field(default_factory=Lines)
    number: int | None = None  # None until it has identified itself
    host: str = ""
    pid: int = 0
    doing: str = ""
    error: str = ""
    code: int | None = None  # reported before it exited


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        state: "finished"; "preempted": saved and stopped on request; "regrow": the same, requested by this process to
            restart on more hosts; "refused": a rank reported a user error; "failed": a restart may help.
        reason: one line.
        host: host where the failure began, as named in the hostfile, or None.
        doing: what the ranks were doing.
        code: exit code for the caller.
    """

    state: str
    reason: str
    code: int
    host: str | None = None
    doing: str = ""


class Stop:
    """Handler of SIGINT, SIGTERM, SIGHUP and SIGUSR1: the first asks the ranks to save, the second terminates them.

    Signals that are ignored, like SIGHUP under nohup, stay ignored.
    """

    def __init__(self) -> None:
        self.count, self.name = 0, ""
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in _SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    @property
    def code(self) -> int:
        """Exit code of a job that was told to stop while it had no running ranks."""
        return 128 + signal.SIGINT if self.name == "SIGINT" else EXIT_PREEMPTED

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.count or number == signal.SIGINT or now - self._first > _AGAIN_SECONDS:
            self._first = self._first or now
            self.count, self.name = self.count + 1, signal.Signals(number).name


class Attempt:
    """One start of a job, from its command to the exit of its last rank.

    Args:
        address: address at which the ranks' hosts reach this machine.
        slots: hosts and their number of ranks, in the order in which deepspeed numbers them.
        kill: kills processes on a host by pid, for ranks that no longer respond.
    """

    def __init__(self, address: str, slots: Mapping[str, int], kill: Callable[[str, list[int]], None]) -> None:
        self._hosts, self._slots, self._kill = list(slots), slots, kill
        self._listener = socket.create_server((address if address == "127.0.0.1" else "", 0))
        self._listener.setblocking(False)
        self.supervisor = Supervisor(address, self._listener.getsockname()[1], secrets.token_hex(8))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._ranks: list[_Rank] = []
        self._gone: list[_Rank] = []  # in the order in which they exited
        self._told = ""
        self._first_heard: float | None = None
        self._silent = ""  # a host whose ranks never connected

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], stop: Stop, restart_reason: Callable[[], str]
    ) -> Outcome:
        """Start `command` and wait for the attempt to end.

        Args:
            command: command that starts the ranks.
            environment: environment of the command.
            stop: stop requests that this process has received.
            restart_reason: polled; returns a reason to save and stop the job, or an empty string.
        """
        # Own session: only this process handles Ctrl-C, and asks the ranks to save first.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent
        )
        try:
            self._watch(process, stop, restart_reason)
        finally:
            self._end(process)
        outcome = self._outcome(process.returncode, stop)
        # Not an external request: the job continues on other hosts.
        ours = outcome.state == "preempted" and self._told and not stop.count
        return replace(outcome, state="regrow") if ours else outcome

    def _watch(self, process: "subprocess.Popen[bytes]", stop: Stop, restart_reason: Callable[[], str]) -> None:
        failed_at, began = None, time.monotonic()
        while process.poll() is None and stop.count < 2:
            self._listen(_POLL_SECONDS)
            if not self._told and (reason := stop.name or restart_reason()):
                self._told = reason
                for rank in self._ranks:
                    self._tell(rank)
                say(
                    f"{reason}: saving a checkpoint and stopping after the current step"
                    + (" (repeat to stop immediately)" if stop.name else "")
                )
            ended = [*self._gone, *(rank for rank in self._ranks if rank.code is not None)]
            if failed_at is None and any(rank.code not in (0, EXIT_PREEMPTED) for rank in ended):
                failed_at = time.monotonic()
            if self._find_silent(began):
                return
            if failed_at is not None and time.monotonic() > failed_at + _GRACE_SECONDS:
                return

    def _find_silent(self, began: float) -> bool:
        """Return whether the ranks of some host have failed to connect in time."""
        seen = Counter(rank.host for rank in (*self._ranks, *self._gone))
        if self._first_heard is None and seen:
            self._first_heard = time.monotonic()
        deadline = began + _FIRST_SECONDS if self._first_heard is None else self._first_heard + _OTHERS_SECONDS
        if time.monotonic() > deadline:
            self._silent = next((host for host in self._hosts if seen[host] < self._slots[host]), "")
        return bool(self._silent)

    def _tell(self, rank: _Rank) -> None:
        with contextlib.suppress(OSError):
            rank.connection.sendall(f'{{"stop": "{self._told}"}}\n'.encode())

    def _listen(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                with contextlib.suppress(OSError):
                    connection, (address, *_) = self._listener.accept()
                    keep_alive(connection)
                    connection.setblocking(False)
                    self._selector.register(connection, selectors.EVENT_READ, _Rank(connection, address))
                continue
            rank: _Rank = key.data
            try:
                data = rank.connection.recv(1 << 16)
                for message in rank.lines.feed(data):
                    self._hear(rank, message)
            except BlockingIOError:
                continue
            except (OSError, ValueError, LookupError, TypeError):
                data = b""
            if not data:
                self._selector.unregister(rank.connection)
                rank.connection.close()
                if rank in self._ranks:
                    self._ranks.remove(rank)
                    self._gone.append(rank)

    def _hear(self, rank: _Rank, message: dict[str, Any]) -> None:
        """Handle a message of a rank. Raises ValueError if it cannot be from a rank of this job."""
        if rank.number is None:
            if message.get("job") != self.supervisor.job:
                raise ValueError("message from another job")
            rank.number, rank.pid = int(message["rank"]), int(message["pid"])
            node = int(message["node"])
            rank.host = self._hosts[node] if 0 <= node < len(self._hosts) else str(message["host"])
            self._ranks.append(rank)
            if self._told:
                self._tell(rank)
        rank.doing = str(message.get("doing", rank.doing))
        rank.error = str(message.get("error", rank.error))
        if "end" in message:
            rank.code = int(message["end"])

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        """Terminate every process of the attempt on all hosts."""
        alive = list(self._ranks)
        for rank in alive:  # half-close: ranks read end-of-file and close their side
            with contextlib.suppress(OSError):
                rank.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _END_SECONDS
        while self._ranks and time.monotonic() < deadline:
            self._listen(_POLL_SECONDS)
        by_host: dict[str, list[int]] = {}
        for rank in self._ranks:
            by_host.setdefault(rank.host, []).append(rank.pid)
        for host, pids in by_host.items():
            self._kill(host, pids)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            # Not SIGTERM: deepspeed would then `pkill -f` the launchers of all jobs on every host.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for rank in self._ranks:
            rank.connection.close()
        self._selector.close()
        self._listener.close()

    def _outcome(self, returncode: int, stop: Stop) -> Outcome:
        ended = self._gone + self._ranks
        doing = next((rank.doing for rank in ended if rank.doing), "")
        codes = {rank.code for rank in ended}
        if stop.count > 1:
            return Outcome("preempted", f"{stop.name}, twice: terminated immediately", 128 + signal.SIGINT, doing=doing)
        if self._silent:
            reason = f"not all ranks on {self._silent} have started: check the output of that host"
            return Outcome("failed", reason, EXIT_CRASHED, self._silent, doing)
        # A rank reports these only once all ranks are done, even if one then fails while exiting.
        if EXIT_PREEMPTED in codes:
            return Outcome("preempted", self._told or "asked to stop", EXIT_PREEMPTED, doing=doing)
        if 0 in codes:
            return Outcome("finished", "trained to its last step", 0, doing=doing)
        first = next(iter(ended), None)
        if first is not None:
            where = f"rank {first.number} on {first.host}"
            if first.code == EXIT_USER_ERROR:
                return Outcome("refused", f"{where}: {first.error}", EXIT_USER_ERROR, first.host, doing)
            # Its peers may have noticed before its own last message arrived.
            why = first.error or (
                "was killed, or its host was lost" if first.code is None else f"exited with code {first.code}"
            )
            return Outcome("failed", f"{where} {why}", EXIT_CRASHED, first.host, doing)
        if stop.count:
            return Outcome("preempted", f"{stop.name} before any rank had started", stop.code)
        return Outcome("failed", f"deepspeed exited with code {returncode} before any rank had started", EXIT_CRASHED)


@dataclass(frozen=True)
class Restarts:
    """Restart policy: immediate after progress, else with exponential backoff and a limit.

    Attributes:
        most: maximum consecutive restarts without a new checkpoint.
        first_delay_seconds: delay before the second of them; it doubles each time, up to 5 minutes.
    """

    most: int = 3
    first_delay_seconds: float = 5.0

    def delay_seconds(self, in_a_row: int) -> float:
        """Return the delay before consecutive restart `in_a_row` (1, 2, …) without progress."""
        return min(_MAX_SECONDS_BETWEEN, self.first_delay_seconds * 2 ** (in_a_row - 2)) if in_a_row > 1 else 0.0


def sleep_unless(stop: Stop, seconds: float) -> None:
    """Sleep, but return as soon as this process is told to stop."""
    deadline = time.monotonic() + seconds
    while not stop.count and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(_POLL_SECONDS, left))
