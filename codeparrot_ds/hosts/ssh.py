"""Commands on other hosts, over ssh without a prompt, as pdsh runs them: its PDSH_SSH_ARGS_APPEND counts here too."""

import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CONNECT_SECONDS = 5
_MOST_AT_ONCE = 64


@dataclass(frozen=True)
class Answer:
    """What a command on a host gave.

    Attributes:
        code: its exit code; 255 when ssh itself failed; None when it was not done in time.
        errors: its standard error, or ssh's.
    """

    code: int | None
    errors: str

    @property
    def reason(self) -> str:
        """Why it failed, in a line."""
        if self.code is None:
            return "no answer in time"
        lines = [line for line in self.errors.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit code {self.code}"


def ssh_options() -> list[str]:
    """The user's own, and others so that ssh never asks and gives up soon."""
    given = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    for option in ("BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}", "ServerAliveInterval=5"):
        given += ["-o", option]  # the first of a kind counts: the user's
    return given


def ssh_command(host: str) -> list[str]:
    """`ssh HOST`; what is to run there follows."""
    return ["ssh", *ssh_options(), "--", host]


def remote_script(variables: Iterable[str], command: Sequence[str]) -> str:
    """For the shell of another host: the command, in this directory and with `variables`, NAME=VALUE quoted for it."""
    return f"cd {shlex.quote(str(Path.cwd()))} && exec env {' '.join(variables)} {shlex.join(command)}"


def run_on(host: str, command: Sequence[str], timeout: float) -> Answer:
    """Run a command on one host."""
    try:
        done = subprocess.run(
            [*ssh_command(host), shlex.join(command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            start_new_session=True,  # Ctrl-C is for the caller
        )
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
        return Answer(None, said)
    except FileNotFoundError:
        return Answer(255, "ssh is not installed here")
    return Answer(done.returncode, done.stderr)


def run_on_all(commands: Mapping[str, Sequence[str]], timeout: float) -> dict[str, Answer]:
    """Run a command on each host, at once. What they answered, by host."""
    with ThreadPoolExecutor(min(_MOST_AT_ONCE, max(1, len(commands)))) as pool:
        futures = {host: pool.submit(run_on, host, command, timeout) for host, command in commands.items()}
    return {host: future.result() for host, future in futures.items()}


def find_unreachable(hosts: Iterable[str]) -> dict[str, str]:
    """Hosts on which not even `true` runs, and why."""
    answers = run_on_all({host: ["true"] for host in hosts}, 2 * CONNECT_SECONDS)
    return {host: answer.reason for host, answer in answers.items() if answer.code != 0}


def kill_on(host: str, pids: Iterable[int]) -> None:
    """SIGKILL processes of a host, if it answers."""
    run_on(host, ["kill", "-KILL", *map(str, pids)], 2 * CONNECT_SECONDS)
