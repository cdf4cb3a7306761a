"""Watch a job to its end, end all of it when a part has died, and start it again from its newest checkpoint.

`deepspeed` leaves it to each host to notice that another has died, which takes minutes, and its exit code does not tell
what happened. Here every rank of an attempt holds a connection to this process (hosts/lifeline.py): the first
that breaks says which rank died and where; closing the others ends the rest.
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
_GRACE_SECONDS = 2.0  # for the other ranks to say what they know, and for deepspeed to end by itself
_END_SECONDS = 10.0  # for ranks that were told to end; then they are killed
_FIRST_SECONDS = 600.0  # until the first rank says who it is: imports from a cold disk
_OTHERS_SECONDS = 120.0  # from then until the last does
_AGAIN_SECONDS = 2.0  # a scheduler may send its signal to the script around this process as well, which passes it on
_MOST_SECONDS_BETWEEN = 300.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass
class _Rank:
    """What one rank has said of itself."""

    connection: socket.socket
    address: str
    lines: Lines = field(default_factory=Lines)
    number: int | None = None  # until it has said who it is
    host: str = ""
    pid: int = 0
    doing: str = ""
    error: str = ""
    code: int | None = None  # said before it ended


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        state: "finished"; "preempted": saved and stopped, as asked; "regrow": the same, as this process asked;
            "refused": by something that a user must mend, and a rank has said what; "failed": starting again may help.
        reason: one line.
        host: where it began, as the hostfile names it, or None.
        doing: what the ranks were doing.
        code: exit code for the caller.
    """

    state: str
    reason: str
    code: int
    host: str | None = None
    doing: str = ""


class Stop:
    """SIGINT, SIGTERM, SIGHUP or SIGUSR1 to this process: the first asks the ranks to save, the second ends them.

    What is ignored, as SIGHUP is under nohup, stays so.
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
        """The exit code for a job that was told to stop while none of its ranks lived."""
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
    """One start of a job, from its command to the end of its last rank.

    Args:
        address: of this machine, as the ranks' hosts reach it.
        slots: hosts and how many ranks run there, in the order in which deepspeed numbers them.
        kill: ends processes on a host by id, for ranks that no longer listen.
    """

    def __init__(self, address: str, slots: Mapping[str, int], kill: Callable[[str, list[int]], None]) -> None:
        self._hosts, self._slots, self._kill = list(slots), slots, kill
        self._listener = socket.create_server((address if address == "127.0.0.1" else "", 0))
        self._listener.setblocking(False)
        self.supervisor = Supervisor(address, self._listener.getsockname()[1], secrets.token_hex(8))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._ranks: list[_Rank] = []
        self._gone: list[_Rank] = []  # in the order of their ends
        self._told = ""
        self._first_heard: float | None = None
        self._silent = ""  # a host whose ranks never said who they are

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], stop: Stop, give_up: Callable[[], str]
    ) -> Outcome:
        """Start `command` and see it to its end.

        Args:
            stop: what this process has been told.
            give_up: asked now and then; a reason why the job is to save and stop, or nothing.
        """
        # A session of its own: Ctrl-C is for this process, which asks the ranks to save first.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent
        )
        try:
            self._watch(process, stop, give_up)
        finally:
            self._end(process)
        outcome = self._outcome(process.returncode, stop)
        # Not asked from outside: it is to go on elsewhere.
        ours = outcome.state == "preempted" and self._told and not stop.count
        return replace(outcome, state="regrow") if ours else outcome

    def _watch(self, process: "subprocess.Popen[bytes]", stop: Stop, give_up: Callable[[], str]) -> None:
        failed_at, began = None, time.monotonic()
        while process.poll() is None and stop.count < 2:
            self._listen(_POLL_SECONDS)
            if not self._told and (reason := stop.name or give_up()):
                self._told = reason
                for rank in self._ranks:
                    self._tell(rank)
                say(f"{reason}: the job saves a checkpoint and stops" + (" (again: at once)" if stop.name else ""))
            ended = [*self._gone, *(rank for rank in self._ranks if rank.code is not None)]
            if failed_at is None and any(rank.code not in (0, EXIT_PREEMPTED) for rank in ended):
                failed_at = time.monotonic()
            if self._find_silent(began):
                return
            if failed_at is not None and time.monotonic() > failed_at + _GRACE_SECONDS:
                return

    def _find_silent(self, began: float) -> bool:
        """Whether ranks of some host have not said who they are within the time for it."""
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
        """Take in what a rank says. Raises ValueError for what no rank of this job would say."""
        if rank.number is None:
            if message.get("job") != self.supervisor.job:
                raise ValueError("of another job")
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
        """Leave no process of the attempt alive anywhere."""
        alive = list(self._ranks)
        for rank in alive:  # half closed: they read the end and answer with theirs
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
            # Not SIGTERM, at which deepspeed would have every host `pkill -f` the launchers of all jobs.
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
            return Outcome("preempted", f"{stop.name}, twice: ended at once", 128 + signal.SIGINT, doing=doing)
        if self._silent:
            reason = f"not all ranks on {self._silent} have started: look at what that host has said"
            return Outcome("failed", reason, EXIT_CRASHED, self._silent, doing)
        # A rank says so only when all of them are through, whatever one of them may meet on its way out.
        if EXIT_PREEMPTED in codes:
            return Outcome("preempted", self._told or "asked to stop", EXIT_PREEMPTED, doing=doing)
        if 0 in codes:
            return Outcome("finished", "trained to its last step", 0, doing=doing)
        first = next(iter(ended), None)
        if first is not None:
            where = f"rank {first.number} on {first.host}"
            if first.code == EXIT_USER_ERROR:
                return Outcome("refused", f"{where}: {first.error}", EXIT_USER_ERROR, first.host, doing)
            # Its peers may have noticed before its own last words were heard.
            why = first.error or (
                "was killed, or its host was lost" if first.code is None else f"ended with {first.code}"
            )
            return Outcome("failed", f"{where} {why}", EXIT_CRASHED, first.host, doing)
        if stop.count:
            return Outcome("preempted", f"{stop.name} before any rank had started", stop.code)
        return Outcome("failed", f"deepspeed ended with {returncode} before any rank had started", EXIT_CRASHED)


@dataclass(frozen=True)
class Restarts:
    """When to start again: at once after progress, else later and later, and not for ever.

    Attributes:
        most: in a row without a new checkpoint.
        first_delay_seconds: before the second in a row; it doubles each time, up to 5 minutes.
    """

    most: int = 3
    first_delay_seconds: float = 5.0

    def delay_seconds(self, in_a_row: int) -> float:
        """Before restart number `in_a_row` (1, 2, …) without progress."""
        return min(_MOST_SECONDS_BETWEEN, self.first_delay_seconds * 2 ** (in_a_row - 2)) if in_a_row > 1 else 0.0


def sleep_unless(stop: Stop, seconds: float) -> None:
    """Wait, but not once this process has been told to stop."""
    deadline = time.monotonic() + seconds
    while not stop.count and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(_POLL_SECONDS, left))
