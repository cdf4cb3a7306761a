"""Run a command on all hosts of a hostfile, each on slices of the work. The others take the slices of a lost host."""

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codeparrot_ds.errors import EXIT_USER_ERROR, ClusterError
from codeparrot_ds.hosts.fan_out import copy_lines
from codeparrot_ds.hosts.hostfile import read_hostfile
from codeparrot_ds.hosts.launchers import forwarded
from codeparrot_ds.hosts.ssh import remote_script, ssh_command
from codeparrot_ds.system.jobs import say

_USAGE = 2
_LOST = 255  # exit code of ssh itself


def run_slices(hostfile: Path, arguments: Sequence[str]) -> list[str]:
    """Run `codeparrot-ds ARGUMENTS --slice I/N` for every I on the N hosts, which must share the inputs and outputs.

    Returns the standard output of each slice. Raises ClusterError: a slice failed with a user error, or no host is
    left to run it. Finished work is kept.
    """
    hosts = list(read_hostfile(hostfile))
    work = _Work(len(hosts), list(range(len(hosts))))
    threads = [threading.Thread(target=_serve, args=(host, work, arguments)) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if work.refused:
        raise ClusterError(
            f"{'; '.join(work.refused)}. Finished work is kept: fix the error and run the same command again."
        )
    if work.waiting:
        raise ClusterError(
            f"{len(work.waiting)} of {work.total} slices are unfinished, and no host is left to run them "
            f"({'; '.join(work.lost)}). Finished work is kept: run the same command again."
        )
    return [work.outputs[part] for part in range(work.total)]


@dataclass
class _Work:
    """Slices of the work, shared by the threads of all hosts."""

    total: int
    waiting: list[int]
    running: int = 0
    outputs: dict[int, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self) -> int | None:
        """Return the next slice, waiting while a running one might be requeued; None when there is no more work."""
        with self.changed:
            while not self.waiting and self.running and not self.refused:
                self.changed.wait()
            if not self.waiting or self.refused:
                return None
            self.running += 1
            return self.waiting.pop(0)

    def give_back(self, part: int, host: str, code: int, output: str) -> None:
        """Record the result of a slice, and requeue it if its host was lost."""
        with self.changed:
            self.running -= 1
            self.outputs[part] = output
            if code in (EXIT_USER_ERROR, _USAGE):
                self.refused.append(f"{host}: slice {part}/{self.total} failed with a user error, see above")
            elif code != 0:
                self.waiting.append(part)
                self.lost.append(f"{host}: exit code {code}")
            self.changed.notify_all()


def _serve(host: str, work: _Work, arguments: Sequence[str]) -> None:
    program = str(Path(sys.executable).with_name("codeparrot-ds"))
    variables = [f"{name}={shlex.quote(value)}" for name, value in forwarded(os.environ).items()]
    while (part := work.take()) is not None:
        script = remote_script(variables, [program, *arguments, "--slice", f"{part}/{work.total}"])
        code, output = _LOST, ""
        try:
            process = subprocess.Popen(
                [*ssh_command(host), script],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            assert process.stdout is not None and process.stderr is not None
            notes = threading.Thread(target=copy_lines, args=(host, process.stderr, sys.stderr))
            notes.start()
            output = process.stdout.read().decode(errors="replace")
            notes.join()
            code = process.wait()
        finally:
            work.give_back(part, host, code, output)
        if code != 0:
            say(f"{host}: slice {part}/{work.total} failed with exit code {code}")
            return
