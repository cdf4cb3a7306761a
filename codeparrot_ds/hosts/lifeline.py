"""The connection between each rank and the supervisor of its job (`codeparrot-ds launch`): who still lives.

Every rank connects to the supervisor and says who it is, what it does, and in the end how it ends. Its connection
closes when it dies; when its host or the network between has died, the kernel's keep-alive closes it. The same holds
the other way round: a rank that loses its supervisor ends at once, so no rank of a job outlives the job anywhere.

Each message is a line of JSON. A rank says {"job", "rank", "node", "host", "pid"}, then {"doing"} as it changes, and
{"end": exit code, "error"}. The supervisor says {"stop": reason}: save a checkpoint and end; or it just closes.
"""

import contextlib
import json
import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from codeparrot_ds.errors import EXIT_CRASHED, ClusterError

SILENCE_SECONDS = 15  # after which a host that answers nothing counts as dead
_CONNECT_SECONDS = 30.0
_REPORT_SECONDS = 1.0
_LINE_BYTES = 1 << 16


class Supervisor(NamedTuple):
    """Where a rank finds the supervisor of its job, written HOST:PORT/JOB."""

    host: str
    port: int
    job: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}/{self.job}"

    @classmethod
    def parse(cls, text: str) -> "Supervisor":
        """Of HOST:PORT/JOB. Raises ValueError."""
        address, slash, job = text.partition("/")
        host, colon, port = address.rpartition(":")
        if not (slash and colon and host and job):
            raise ValueError(f"{text!r} is not HOST:PORT/JOB")
        return cls(host, int(port), job)


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel close `connection` when the other side has answered nothing for `SILENCE_SECONDS`.

    The kernel does so whatever this process is busy with.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    tries = 5
    for option, value in {
        "TCP_KEEPIDLE": SILENCE_SECONDS // 2,
        "TCP_KEEPINTVL": max(1, SILENCE_SECONDS // 2 // tries),
        "TCP_KEEPCNT": tries,
        "TCP_USER_TIMEOUT": SILENCE_SECONDS * 1000,  # of what was sent and not acknowledged
    }.items():
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class Lines:
    """JSON objects, one a line, that arrive in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The objects that `data` completes. Raises ValueError for what is none."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE_BYTES:
            raise ValueError("an endless line")
        for line in lines:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("not an object")  # noqa: TRY004 (as json.loads raises for what it cannot read)
            yield message


class Lifeline:
    """A rank's connection to its supervisor. Without a supervisor every call does nothing.

    Raises ClusterError when the supervisor cannot be reached.
    """

    def __init__(self, supervisor: Supervisor | None, rank: int) -> None:
        self.stop_reason: str | None = None
        self._doing: Callable[[], str] = lambda: "starting"
        self._said = ""
        self._connection: socket.socket | None = None
        self._sending, self._ended = threading.Lock(), threading.Event()
        if supervisor is None:
            return
        try:
            self._connection = socket.create_connection((supervisor.host, supervisor.port), _CONNECT_SECONDS)
        except OSError as error:
            raise ClusterError(
                f"{socket.gethostname()} cannot reach the supervisor at {supervisor.host}:{supervisor.port} ({error}). "
                "Open the port between the hosts, or name another address: `codeparrot-ds launch --address …`."
            ) from None
        self._connection.settimeout(None)
        keep_alive(self._connection)
        node = int(os.environ.get("CROSS_RANK", "0"))  # deepspeed's: the place of this host in the hostfile
        self._say({"job": supervisor.job, "rank": rank, "node": node, "host": socket.gethostname(), "pid": os.getpid()})
        threading.Thread(target=self._listen, daemon=True, name="lifeline").start()

    @property
    def connected(self) -> bool:
        """Whether there is a supervisor."""
        return self._connection is not None

    def report(self, doing: Callable[[], str]) -> None:
        """From now on, tell the supervisor about once a second what `doing` returns, when that has changed."""
        self._doing = doing

    def end(self, code: int, error: str = "") -> None:
        """Tell the supervisor that this rank ends by itself, with this exit code and for this `error`."""
        self._ended.set()
        self._say({"end": code, "error": error[: _LINE_BYTES // 8]})

    def _say(self, message: dict[str, Any]) -> None:
        if self._connection is not None:
            with self._sending, contextlib.suppress(OSError):  # `_listen` sees to a connection that is gone
                self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        assert self._connection is not None
        lines = Lines()
        while not self._ended.is_set():
            if (doing := self._doing()) != self._said:
                self._said = doing
                self._say({"doing": doing})
            readable, _, _ = select.select([self._connection], [], [], _REPORT_SECONDS)
            if not readable:
                continue
            try:
                data = self._connection.recv(_LINE_BYTES)
                for message in lines.feed(data):
                    self.stop_reason = str(message.get("stop") or "the supervisor")
            except (OSError, ValueError):
                data = b""
            if not data and not self._ended.is_set():
                # Not through Python's exit: the main thread may hang in a collective for ever.
                with contextlib.suppress(OSError, ValueError):  # a terminal that is closed
                    print("the supervisor of this job is gone, or has ended it", file=sys.stderr, flush=True)
                os._exit(EXIT_CRASHED)
