"""Hostfiles. DeepSpeed only warns about a missing one and trains on this machine alone; here it is an error."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from codeparrot_ds.errors import ClusterError, list_problems
from codeparrot_ds.hosts.working_directory import ancestors, is_runner
from codeparrot_ds.system.files import read_user_text

_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")


def read_hostfile(path: Path) -> dict[str, int]:
    """Read hosts and their slots (GPUs, or CPU ranks), in order.

    Raises ClusterError: the file is missing or empty, lists a host twice, or has a line that is not `host slots=N`.
    """
    if not path.is_file():
        raise ClusterError(
            f"{path}: no such hostfile. Nothing was started: DeepSpeed would have trained on this machine alone. "
            "Write one like hostfile.example, or omit --hostfile to train here."
        )
    hosts: dict[str, int] = {}
    problems = []
    for number, line in enumerate(read_user_text(path).splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match[2]) == 0:
            problems.append(f"line {number}: {text!r} is not `host slots=N` (no spaces around =, N at least 1)")
        elif "@" in match[1]:
            user, _, host = match[1].rpartition("@")
            fix = f"list {host}, and put `Host {host}` and `User {user}` into ~/.ssh/config"
            problems.append(f"line {number}: {match[1]}: a user cannot be given here; {fix}")
        elif ":" in match[1] or match[1].startswith("["):
            fix = "list a name (from /etc/hosts on all hosts) or an IPv4 address, and put a port into ~/.ssh/config"
            problems.append(f"line {number}: {match[1]}: an IPv6 address or a port cannot be given here; {fix}")
        elif match[1] in hosts:
            problems.append(f"line {number}: host {match[1]} is listed twice; give the sum of its slots once")
        else:
            hosts[match[1]] = int(match[2])
    if not hosts and not problems:
        problems.append("lists no host")
    if problems:
        raise ClusterError(list_problems(str(path), problems))
    return hosts


def check_launch_command(command_lines: Sequence[Sequence[str]] | None = None) -> None:
    """Refuse to train if the `deepspeed` command that started this process was given an invalid hostfile.

    DeepSpeed does not tell the ranks, so this reads the command lines of the process's ancestors, or `command_lines`
    (nearest first). Raises ClusterError.
    """
    if command_lines is None:
        command_lines = ancestors()
    for arguments in command_lines:
        if is_runner(arguments):
            hostfile = _hostfile_option(arguments)
            if hostfile is not None:
                read_hostfile(Path(hostfile))
            return


def _hostfile_option(arguments: Sequence[str]) -> str | None:
    """Return the hostfile given on a `deepspeed` command line, in any form that argparse accepts."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("-H", "--hostfile")
    try:
        return parser.parse_known_args(list(arguments))[0].hostfile
    except argparse.ArgumentError:  # deepspeed has rejected it itself
        return None
