"""Start `deepspeed` for a recipe, watch it, and start it again. Every rank checks the rest before it allocates."""

import contextlib
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from codeparrot_ds.errors import EXIT_CRASHED, ClusterError, ConfigError
from codeparrot_ds.run.directory import RunDirectory, step_of
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.supervision.attempt import Attempt, Outcome, Restarts, Stop, sleep_unless
from codeparrot_ds.supervision.placement import Hosts, ManyHosts, ThisMachine
from codeparrot_ds.system.files import exclusive_lock, make_directory
from codeparrot_ds.system.jobs import say

_LOCK_SECONDS = 30.0  # within which ranks of a supervisor that was killed have ended
_LEASE_SECONDS = 180.0  # within which a file server has given up the locks of a host that is lost


def launch(
    recipe: Path, hosts: Hosts | None, ranks: int | None, overrides: Sequence[str], restarts: Restarts | None = None
) -> int:
    """Train `recipe` with deepspeed, starting again from the newest checkpoint when a rank dies; return the exit code.

    Raises ConfigError or ClusterError for what is wrong before anything starts, as when another process trains it.
    """
    loaded = load_recipe(recipe, overrides)
    if hosts is not None and hosts.hostfile is not None and ranks is not None:
        raise ConfigError("--ranks counts processes on this machine; with --hostfile its slots decide.")
    run = RunDirectory(loaded.run_directory)
    place = ThisMachine(ranks, loaded.batch) if hosts is None else ManyHosts(hosts, loaded)
    make_directory(run.path)
    busy = f"{run.path}: another `codeparrot-ds launch` is already supervising this run. Stop it, or use --set name=…"
    with exclusive_lock(run.path / ".launch.lock", busy), Stop() as stop:
        return _Job(recipe, overrides, run, place, restarts or Restarts()).run(stop)


@dataclass
class _Job:
    """The attempts to train one run."""

    recipe: Path
    overrides: Sequence[str]
    directory: RunDirectory
    place: "ThisMachine | ManyHosts"
    restarts: Restarts
    in_a_row: int = 0  # attempts without a new checkpoint
    number: int = 0

    def run(self, stop: Stop) -> int:
        """Try until it is done, or not worth it; returns the exit code."""
        self.directory.stop_file.unlink(missing_ok=True)  # of an earlier run, which it has stopped
        while True:
            began, began_at = time.time(), _newest_step(self.directory)
            outcome, hosts = self._attempt(stop)
            reached = _newest_step(self.directory)
            self._note(outcome, hosts, began, began_at, reached)
            self.in_a_row = 1 if reached > began_at else self.in_a_row + 1
            if outcome.state == "regrow":
                continue
            delay = self._delay_seconds(outcome, reached)
            if delay is None:
                return outcome.code
            self.place.lost(outcome.host, self.in_a_row)
            sleep_unless(stop, delay)
            if stop.count or self.directory.stop_file.exists():
                return stop.code

    def _attempt(self, stop: Stop) -> tuple[Outcome, Sequence[str]]:
        self.number += 1
        try:
            _wait_for_old_ranks(self.directory, stop, _LOCK_SECONDS if self.number == 1 else _LEASE_SECONDS)
            start = self.place.prepare(self.number)
        except (ClusterError, ConfigError) as error:
            if self.number == 1 and not stop.count:
                raise
            return Outcome("failed", str(error), EXIT_CRASHED), []
        if stop.count:
            return Outcome("preempted", f"{stop.name} before anything was started", stop.code), []
        command = deepspeed_command(self.recipe, start.program, self.overrides, start.quote)
        shown = [f"{key}={value}" for key, value in start.extra.items()]
        say(f"$ {shlex.join([*shown, *command])}")
        attempt = Attempt(start.address, start.slots, start.kill)
        supervised = [*command, "--supervisor", str(attempt.supervisor)]
        return attempt.run(supervised, {**os.environ, **start.extra}, stop, start.give_up), list(start.slots)

    def _delay_seconds(self, outcome: Outcome, reached: int) -> float | None:
        """How long to wait before the next attempt, or None when there is to be none; says which, and why."""
        if outcome.state != "failed":
            return None
        where = f" ({outcome.doing})" if outcome.doing else ""
        kept = f"Checkpoints up to step {reached} are kept." if reached else "There is no checkpoint yet."
        if self.in_a_row > self.restarts.most:
            count = f"{self.restarts.most} restart{'' if self.restarts.most == 1 else 's'}"
            say(
                f"error: {outcome.reason}{where}. Giving up after {count} without a new checkpoint; see the end of "
                f"{self.directory.logs}/, fix the cause, and run the same command again. {kept}"
            )
            return None
        delay = self.restarts.delay_seconds(self.in_a_row)
        count = f"{self.in_a_row} of {self.restarts.most}"
        say(f"{outcome.reason}{where}. {kept} Starting again in {delay:.0f} s ({count}).")
        return delay

    def _note(self, outcome: Outcome, hosts: Sequence[str], began: float, began_at: int, reached: int) -> None:
        """Keep for `codeparrot-ds status` what became of an attempt."""
        facts = {"began": began, "seconds": time.time() - began, "from_step": began_at, "to_step": reached}
        # On a full disk, the ranks have told of it.
        with contextlib.suppress(OSError), open(self.directory.launches, "a") as file:
            file.write(json.dumps({**facts, "hosts": list(hosts), **vars(outcome)}) + "\n")


def _newest_step(run: RunDirectory) -> int:
    found = run.checkpoint_directories()
    return step_of(found[-1]) if found else 0


def _wait_for_old_ranks(run: RunDirectory, stop: Stop, seconds: float) -> None:
    """Wait until no rank of an earlier start trains here: those of a supervisor that was killed end by themselves.

    Raises ConfigError when one goes on, as one that was started without a supervisor does.
    """
    deadline = time.monotonic() + seconds
    while run.in_use() and not stop.count:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{run.path}: another process is training in this directory. Stop it, or use --set name=…"
            )
        time.sleep(0.5)


def deepspeed_command(
    recipe: Path, program: Sequence[str], overrides: Sequence[str], quote: Callable[[str], str] = str
) -> list[str]:
    """The command that a user could type. `quote`: for what lies between here and the ranks, such as pdsh's shell."""
    command = [*program, "--module", "codeparrot_ds.train", quote(str(recipe))]
    return command + [part for override in overrides for part in ("--set", quote(override))]
