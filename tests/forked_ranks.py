"""Ranks forked from one process that has already imported torch, DeepSpeed and transformers.

A `deepspeed` launch spends 15 to 20 CPU seconds on imports, in the runner, the launcher and every rank; a tiny run
trains for one. A fork shares the imported modules. The ranks are real processes like those of a launch: gloo between
them, their own environment, arguments and output, and exit codes handled as by DeepSpeed's launcher. Only the runner
and the launcher are missing, so tests of those, of signals to them and of hostfiles use `deepspeed`.

`python -m tests.forked_ranks SOCKET` is the server: it forks a process per job, which forks the ranks. It exits when
its standard input closes.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from codeparrot_ds.system.jobs import die_with_parent

START_SECONDS = 120  # for the server to start; imports take some seconds
TERMINATE_SECONDS = 10  # between SIGTERM and SIGKILL for the other ranks after one has failed; DeepSpeed: 30
_OF_RANKS = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")


# The tests' side


class ForkedJob:
    """A running job.

    Attributes:
        pids: process id of each rank.
        log: stdout and stderr of all ranks.
    """

    def __init__(self, connection: socket.socket, log: Path) -> None:
        self.log = log
        self._connection = connection
        self._returncode: int | None = None
        self.pids: list[int] = _receive(connection)["pids"]

    def rank(self, number: int) -> psutil.Process:
        """Process id of a rank."""
        return psutil.Process(self.pids[number])

    def poll(self, seconds: float = 0.0) -> int | None:
        """Exit code as from DeepSpeed's launcher: that of the first rank to fail, or 0; None if still running.

        Waits for the end of the job for at most `seconds`.
        """
        if self._returncode is None and select.select([self._connection], [], [], seconds)[0]:
            self._returncode = int(_receive(self._connection)["returncode"])
        return self._returncode

    def end(self) -> None:
        """Kill all remaining processes of the job."""
        self._connection.close()


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Read the next message, a line of JSON. Nothing is read ahead, so `select` reports the message after it."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := connection.recv(1)):
            raise RuntimeError("the fork server has ended; see server.log in its directory")
        line += byte
    return dict(json.loads(line))


class ForkServer:
    """Context manager of the server process that forks ranks."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        """Prepare the server.

        Args:
            directory: for its socket and the logs of its jobs.
            environment: environment of all ranks.
        """
        self._directory, self._environment, self._jobs = directory, dict(environment), 0
        self._socket = directory / "socket"

    def __enter__(self) -> "ForkServer":
        self._log = self._directory / "server.log"
        with open(self._log, "wb") as log:
            command = [sys.executable, "-m", "tests.forked_ranks", str(self._socket)]
            self._process = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the fork server did not start:\n{self._log.read_text()}")
            time.sleep(0.05)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=30)

    def start(
        self,
        *arguments: str | Path,
        ranks: int,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> ForkedJob:
        """Start `--module NAME ARGUMENT …` or `SCRIPT ARGUMENT …` on `ranks` ranks, with `env` in their environment."""
        self._jobs += 1
        log = log or self._directory / f"job-{self._jobs}.log"
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._socket))
        request = {
            "arguments": [str(argument) for argument in arguments],
            "ranks": ranks,
            "cwd": str(cwd),
            "environment": {**self._environment, **(env or {})},
            "log": str(log),
        }
        connection.sendall(json.dumps(request).encode() + b"\n")
        return ForkedJob(connection, log)


# The server


@dataclass(frozen=True)
class _Request:
    arguments: list[str]
    ranks: int
    cwd: str
    environment: dict[str, str]
    log: str


def main(address: Path) -> None:
    """Import what ranks import, then fork a process for each connection."""
    _preload()
    listener = socket.socket(socket.AF_UNIX)
    unheard = address.with_suffix(".new")
    listener.bind(str(unheard))
    listener.listen()
    unheard.rename(address)  # once it is visible, clients can connect
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:  # nothing is ever written to it: it was closed
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            with contextlib.suppress(BrokenPipeError):  # the test did not wait for the end
                _run_job(connection)
            os._exit(0)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _preload() -> None:
    import deepspeed
    import torch.utils.tensorboard
    import transformers.models.gpt2.modeling_gpt2

    import codeparrot_ds.export.background
    import codeparrot_ds.training.loop
    import codeparrot_ds.training.reshard  # noqa: F401

    assert deepspeed.__version__ and torch.get_num_threads() and transformers.__version__
    gc.collect()
    gc.freeze()  # otherwise the first collection in each fork copies all pages


def _run_job(connection: socket.socket) -> None:
    """Fork the ranks, send their process ids, wait for them, and send the exit code."""
    die_with_parent()
    request = _Request(**_receive(connection))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = [_fork_rank(request, rank, port) for rank in range(request.ranks)]
    connection.sendall(json.dumps({"pids": pids}).encode() + b"\n")
    code = _wait(pids, connection)
    connection.sendall(json.dumps({"returncode": code}).encode() + b"\n")


def _fork_rank(request: _Request, rank: int, port: int) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        die_with_parent()
        output = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(output, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.closerange(3, 256)  # sockets of the server and of other jobs
        os.chdir(request.cwd)
        os.environ.clear()
        os.environ.update(request.environment)
        values = ("127.0.0.1", port, request.ranks, rank, rank, request.ranks)
        os.environ.update(zip(_OF_RANKS, map(str, values), strict=True))
        _run_program([*request.arguments, f"--local_rank={rank}"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_program(arguments: Sequence[str]) -> None:
    """Run like `python -u -m NAME …` or `python -u SCRIPT …`."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    if arguments[0] == "--module":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def _wait(pids: Sequence[int], connection: socket.socket) -> int:
    """Wait for all ranks as DeepSpeed's launcher does: after a failure the others get SIGTERM, later SIGKILL."""
    alive: dict[Any, int] = {os.pidfd_open(pid): pid for pid in pids}
    code, deadline = 0, None
    while alive:
        readable, _, _ = select.select([*alive, connection], [], [], 0.5)
        for pidfd in set(readable) & set(alive):
            ended = os.waitstatus_to_exitcode(os.waitpid(alive.pop(pidfd), 0)[1])
            os.close(pidfd)
            if ended and not code:
                code, deadline = ended, time.monotonic() + TERMINATE_SECONDS
                _send(signal.SIGTERM, alive.values())
        given_up = connection in readable  # closed by the client, which sends nothing after its request
        if given_up or (deadline is not None and time.monotonic() > deadline):
            _send(signal.SIGKILL, alive.values())
        if given_up:
            os._exit(0)
    return code


def _send(number: signal.Signals, pids: Any) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
