"""Liveness connection between each rank and the supervisor of its job (`codeparrot-ds launch`).

Every rank connects to the supervisor and reports its identity, its current activity and, at the end, its exit code.
The connection closes when the rank dies; if its host or the network fails, TCP keep-alive closes it. Conversely, a
rank that loses its supervisor exits immediately, so no rank outlives its job on any host.

Each message is one line of JSON. A rank sends {"job", "rank", "node", "host", "pid"}, then {"doing"} when it changes,
and {"end": exit code, "error"}. The supervisor sends {"stop": reason} to request a checkpoint and exit, or just closes
the connection.
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

SILENCE_SECONDS = 15  # without a response, after which a host counts as dead
_CONNECT_SECONDS = 30.0
_REPORT_SECONDS = 1.0
_LINE_BYTES = 1 << 16


class Supervisor(NamedTuple):
    """Address of a job's supervisor, written HOST:PORT/JOB."""

    host: str
    port: int
    job: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}/{self.job}"

    @classmethod
    def parse(cls, text: str) -> "Supervisor":
        """Parse HOST:PORT/JOB. Raises ValueError."""
        address, slash, job = text.partition("/")
        host, colon, port = address.rpartition(":")
        if not (slash and colon and host and job):
            raise ValueError(f"{text!r} is not HOST:PORT/JOB")
        return cls(host, int(port), job)


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel close `connection` when the peer has not responded for `SILENCE_SECONDS`.

    The kernel does so even while this process is busy.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    tries = 5
    for option, value in {
        "TCP_KEEPIDLE": SILENCE_SECONDS // 2,
        "TCP_KEEPINTVL": max(1, SILENCE_SECONDS // 2 // tries),
        "TCP_KEEPCNT": tries,
        "TCP_USER_TIMEOUT": SILENCE_SECONDS * 1000,  # for data sent but not acknowledged
    }.items():
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class Lines:
    """Parser for JSON objects, one per line, that arrive in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Yield the objects that `data` completes. Raises ValueError for anything else."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE_BYTES:
            raise ValueError("line too long")
        for line in lines:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("not an object")  # noqa: TRY004 (json.loads also raises ValueError for invalid input)
            yield message


class Lifeline:
    """A rank's connection to its supervisor. Without a supervisor every call is a no-op.

    Raises ClusterError if the supervisor cannot be reached.
    """

    def __init__(self, supervisor: Supervisor | None, rank: int) -> None:
        self.stop_reason: str | None = None
        self._doing: Callable[[], str] = lambda: "starting"
        self._reported = ""
        self._connection: socket.socket | None = None
        self._sending, self._ended = threading.Lock(), threading.Event()
        if supervisor is None:
            return
        try:
            self._connection = socket.create_connection((supervisor.host, supervisor.port), _CONNECT_SECONDS)
        except OSError as error:
            raise ClusterError(
                f"{socket.gethostname()} cannot reach the supervisor at {supervisor.host}:{supervisor.port} ({error}). "
                "Open the port between the hosts, or set another address: `codeparrot-ds launch --address …`."
            ) from None
        self._connection.settimeout(None)
        keep_alive(self._connection)
        node = int(os.environ.get("CROSS_RANK", "0"))  # set by deepspeed: the host's index in the hostfile
        self._send(
            {"job": supervisor.job, "rank": rank, "node": node, "host": socket.gethostname(), "pid": os.getpid()}
        )
        threading.Thread(target=self._listen, daemon=True, name="lifeline").start()

    @property
    def connected(self) -> bool:
        """Whether there is a supervisor."""
        return self._connection is not None

    def report(self, doing: Callable[[], str]) -> None:
        """From now on, report the result of `doing` to the supervisor about once a second, when it changes."""
        self._doing = doing

    def end(self, code: int, error: str = "") -> None:
        """Report that this rank exits on its own, with exit code `code` and the message `error`."""
        self._ended.set()
        self._send({"end": code, "error": error[: _LINE_BYTES // 8]})

    def _send(self, message: dict[str, Any]) -> None:
        if self._connection is not None:
            with self._sending, contextlib.suppress(OSError):  # `_listen` handles a lost connection
                self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        assert self._connection is not None
        lines = Lines()
        while not self._ended.is_set():
            if (doing := self._doing()) != self._reported:
                self._reported = doing
                self._send({"doing": doing})
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
                # Not a normal exit: the main thread may hang in a collective.
                with contextlib.suppress(OSError, ValueError):  # the terminal may be closed
                    print("the supervisor of this job has died, or has terminated the job", file=sys.stderr, flush=True)
                os._exit(EXIT_CRASHED)
