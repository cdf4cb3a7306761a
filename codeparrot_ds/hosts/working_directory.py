"""The working directory of a job: every rank must run where the job was started.

Launchers silently use another directory instead: DeepSpeed's runner for pdsh does not quote its `cd`, and when that
fails it goes on in $HOME; where the directory is missing, mpirun goes to $HOME and slurmd to /tmp. Relative paths, such
as `runs` in a recipe, would then lead elsewhere.
"""

import base64
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from codeparrot_ds.errors import ClusterError

LAUNCHER = "deepspeed.launcher.launch"  # DeepSpeed's launcher on each host
_FIX = (
    "Start the job in a directory that exists on all hosts; one with spaces or other special characters in its name "
    "only works with `codeparrot-ds launch`."
)


class WorkingDirectory(NamedTuple):
    """The names of a working directory, which may differ when a part of its path is a symbolic link.

    Attributes:
        physical: path without symbolic links.
        logical: path by which the shell entered it; the same if unknown.
    """

    physical: Path
    logical: Path

    @classmethod
    def here(cls) -> "WorkingDirectory":
        """The working directory of this process."""
        physical = Path.cwd()
        logical = Path(os.environ.get("PWD") or physical)
        return cls(physical, logical if logical.is_absolute() and _same(logical, physical) else physical)

    @classmethod
    def parse(cls, text: str) -> "WorkingDirectory":
        """Parse the result of `encode`. Raises ValueError."""
        physical, logical = base64.urlsafe_b64decode(text).split(b"\0")
        return cls(Path(os.fsdecode(physical)), Path(os.fsdecode(logical)))

    def encode(self) -> str:
        """Return a form that no shell and no launcher changes."""
        return base64.urlsafe_b64encode(b"\0".join(map(os.fsencode, self))).decode()

    def script(self) -> str:
        """Return a shell command that changes to it, on a host that may know it by either name only."""
        names = [shlex.quote(str(name)) for name in dict.fromkeys(self)]
        return " 2>/dev/null || ".join(f"cd {name}" for name in names)

    def check(self) -> None:
        """Raise ClusterError unless this process runs in the directory, by either name on this host."""
        if not any(_same(name, Path.cwd()) for name in self):
            raise ClusterError(_wrong(self.physical, "Mount or create it on every host."))


def check_directory_of_runner(
    environment: Mapping[str, str] | None = None, command_lines: Sequence[Sequence[str]] | None = None
) -> None:
    """Refuse to train if DeepSpeed's runner, on another host, was started in another directory than this process.

    The runner does not tell the ranks. If its pdsh runs on this host, that runs in the directory. Otherwise, the runner
    has put its directory first in their PYTHONPATH, unless `.deepspeed_env` sets another one. That is ruled out if the
    name needs quotes, or if the shell was left in $HOME by a `cd` that failed: one that succeeds sets OLDPWD.

    Args:
        environment: of this process.
        command_lines: of this process's ancestors, nearest first.

    Raises ClusterError.
    """
    environment = os.environ if environment is None else environment
    if command_lines is None:
        command_lines = ancestors()
    launchers = [arguments for arguments in command_lines if LAUNCHER in arguments]
    if not any(word.startswith("--node_rank") for arguments in launchers for word in arguments):
        return  # not started by a runner on another host
    if any(is_runner(arguments) for arguments in command_lines):
        return  # on this host, as a child of the runner
    here, python_path = Path.cwd(), environment.get("PYTHONPATH", "")
    if (started_in := _directory_of_pdsh(launchers)) is not None:
        if not _same(started_in, here):
            raise ClusterError(_wrong(started_in, _FIX))
        return
    if not python_path or f"{python_path}:".startswith(f"{here}:"):
        return
    there = Path(python_path.partition(":")[0])
    stayed = "OLDPWD" not in environment and _same(Path(environment.get("HOME", "/")), here)
    needs_quotes = shlex.quote(str(there)) != str(there)
    if _same(there, here) or not (stayed or needs_quotes):
        return
    raise ClusterError(_wrong(there, _FIX))


def _directory_of_pdsh(launchers: Sequence[Sequence[str]]) -> Path | None:
    """Return the working directory of the pdsh that started `launchers`, if it runs on this host."""
    hosts = {word for arguments in launchers for word in arguments if word.startswith("--world_info=")}
    for process in psutil.process_iter(["cmdline", "cwd"]):
        arguments, directory = process.info["cmdline"] or [], process.info["cwd"]
        is_pdsh = any(Path(argument).name == "pdsh" for argument in arguments[:2])
        if is_pdsh and directory and hosts.intersection(arguments):
            return Path(directory)
    return None


def ancestors() -> list[list[str]]:
    """Return the command lines of this process's ancestors, nearest first."""
    found = []
    for process in psutil.Process().parents():
        try:
            found.append(list(process.cmdline()))
        except psutil.Error:
            found.append([])
    return found


def is_runner(arguments: Sequence[str]) -> bool:
    """Whether a command line is that of the `deepspeed` command."""
    return any(Path(argument).name in ("deepspeed", "ds", "deepspeed.launcher.runner") for argument in arguments[:4])


def check_common_directory(found: Sequence[tuple[str, WorkingDirectory]]) -> None:
    """Raise ClusterError unless all ranks run in one directory.

    Args:
        found: host and working directory of each rank, in rank order.
    """
    first = found[0][1]
    others = {host: each.physical for host, each in found if not set(first) & set(each)}
    if others:
        listed = "; ".join(f"{host}: {path}" for host, path in others.items())
        raise ClusterError(
            f"{found[0][0]}: rank 0 runs in {first.physical}, but other ranks in other directories ({listed}). {_FIX}"
        )


def _wrong(expected: Path, fix: str) -> str:
    state = "" if expected.is_dir() else ", which does not exist on this host"
    return f"{Path.cwd()}: ranks run here, but the job was started in {expected}{state}. {fix}"


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
