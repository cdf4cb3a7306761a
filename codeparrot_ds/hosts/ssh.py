"""Run commands on other hosts over ssh without prompts. Like pdsh, this honours PDSH_SSH_ARGS_APPEND."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from codeparrot_ds.hosts.working_directory import WorkingDirectory

CONNECT_SECONDS = 5
_MAX_AT_ONCE = 64


@dataclass(frozen=True)
class Answer:
    """Result of a command on a host.

    Attributes:
        code: exit code; 255 if ssh itself failed, None after a timeout.
        errors: standard error of the command, or of ssh.
    """

    code: int | None
    errors: str

    @property
    def reason(self) -> str:
        """Reason of the failure, in one line."""
        if self.code is None:
            return "timed out"
        lines = [line for line in self.errors.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit code {self.code}"


def ssh_options() -> list[str]:
    """Return the user's ssh options, and ours so that ssh never prompts and fails fast."""
    given = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    for option in ("BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}", "ServerAliveInterval=5"):
        given += ["-o", option]  # ssh uses the first value of an option, so the user's wins
    return given


def ssh_command(host: str) -> list[str]:
    """Return the `ssh HOST` command, to which the remote command is appended."""
    return ["ssh", *ssh_options(), "--", host]


def remote_script(variables: Iterable[str], command: Sequence[str]) -> str:
    """Return a shell script that runs `command` in this directory with `variables` (NAME=VALUE, shell-quoted)."""
    return f"{WorkingDirectory.here().script()} && exec env {' '.join(variables)} {shlex.join(command)}"


def run_on(host: str, command: Sequence[str], timeout: float) -> Answer:
    """Run a command on one host, for at most `timeout` seconds."""
    try:
        done = subprocess.run(
            [*ssh_command(host), shlex.join(command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
            start_new_session=True,  # only the caller handles Ctrl-C
        )
    except subprocess.TimeoutExpired as error:
        errors = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
        return Answer(None, errors)
    except FileNotFoundError:
        return Answer(255, "ssh is not installed on this machine")
    return Answer(done.returncode, done.stderr)


def run_on_all(commands: Mapping[str, Sequence[str]], timeout: float) -> dict[str, Answer]:
    """Run a command on each host in parallel. Returns the results by host."""
    with ThreadPoolExecutor(min(_MAX_AT_ONCE, max(1, len(commands)))) as pool:
        futures = {host: pool.submit(run_on, host, command, timeout) for host, command in commands.items()}
    return {host: future.result() for host, future in futures.items()}


def find_unreachable(hosts: Iterable[str]) -> dict[str, str]:
    """Return the hosts that do not answer, or lack this directory or this Python interpreter, with the reasons."""
    python = shlex.quote(sys.executable)
    script = f"{{ {WorkingDirectory.here().script()}; }} && {{ test -x {python} || ! echo {python}: not found; }} >&2"
    answers = run_on_all({host: ["sh", "-c", script] for host in hosts}, 2 * CONNECT_SECONDS)
    return {host: answer.reason for host, answer in answers.items() if answer.code != 0}


def kill_on(host: str, pids: Iterable[int]) -> None:
    """Send SIGKILL to processes on a host, if it can be reached."""
    run_on(host, ["kill", "-KILL", *map(str, pids)], 2 * CONNECT_SECONDS)
