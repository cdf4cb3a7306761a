"""Start `deepspeed` for a recipe, watch it and restart it. Ranks validate everything else before they allocate."""

import contextlib
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from codeparrot_ds.errors import EXIT_CRASHED, EXIT_USER_ERROR, ClusterError, ConfigError
from codeparrot_ds.hosts.working_directory import WorkingDirectory
from codeparrot_ds.run.directory import RunDirectory, step_of
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.supervision.attempt import Attempt, Outcome, Restarts, Stop, sleep_unless
from codeparrot_ds.supervision.placement import Hosts, ManyHosts, Start, ThisMachine, UnreachableError
from codeparrot_ds.system.files import exclusive_lock, make_directory
from codeparrot_ds.system.jobs import say

_LOCK_SECONDS = 30.0  # for ranks of a killed supervisor to exit
_BETWEEN_CHECKS_SECONDS = 5.0  # of hosts that do not answer
_LEASE_SECONDS = 180.0  # for a file server to release the locks of a lost host


def launch(
    recipe: Path, hosts: Hosts | None, ranks: int | None, overrides: Sequence[str], restarts: Restarts | None = None
) -> int:
    """Train `recipe` with deepspeed, restarting from the newest checkpoint when a rank dies. Returns the exit code.

    Raises ConfigError or ClusterError for errors before the start, e.g. if another process trains the same run.
    """
    loaded = load_recipe(recipe, overrides)
    if hosts is not None and hosts.hostfile is not None and ranks is not None:
        raise ConfigError("--ranks cannot be combined with --hostfile, whose slots set the ranks per host.")
    run = RunDirectory(loaded.run_directory)
    place = ThisMachine(ranks, loaded.batch) if hosts is None else ManyHosts(hosts, loaded)
    wait_seconds = 0.0 if hosts is None else hosts.wait_seconds
    make_directory(run.path)
    busy = f"{run.path}: another `codeparrot-ds launch` is already supervising this run. Stop it, or use --set name=…"
    with exclusive_lock(run.path / ".launch.lock", busy), Stop() as stop:
        return _Job(recipe, overrides, run, place, restarts or Restarts(), wait_seconds).run(stop)


@dataclass
class _Job:
    """All attempts to train one run."""

    recipe: Path
    overrides: Sequence[str]
    directory: RunDirectory
    place: "ThisMachine | ManyHosts"
    restarts: Restarts
    wait_seconds: float  # of a restart, for hosts that do not answer
    in_a_row: int = 0  # attempts without a new checkpoint
    number: int = 0

    def run(self, stop: Stop) -> int:
        """Run attempts until the run is finished or given up. Returns the exit code."""
        self.directory.stop_file.unlink(missing_ok=True)  # left by an earlier launch that it stopped
        while True:
            began, began_at = time.time(), _newest_step(self.directory)
            outcome, hosts = self._attempt(stop)
            reached = _newest_step(self.directory)
            self._record(outcome, hosts, began, began_at, reached)
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
            start = self._prepare(stop)
        except UnreachableError as error:
            if self.number == 1 and not stop.count:  # a name may be wrong
                raise
            return Outcome("unreachable", str(error), EXIT_USER_ERROR), []
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
        directory = WorkingDirectory.here().encode()
        supervised = [*command, "--supervisor", str(attempt.supervisor), "--directory", directory]
        return attempt.run(supervised, {**os.environ, **start.extra}, stop, start.restart_reason), list(start.slots)

    def _prepare(self, stop: Stop) -> Start:
        """Return what the attempt needs to start. A restart waits for hosts that do not answer."""
        deadline, told = time.monotonic() + self.wait_seconds, False
        while True:
            try:
                return self.place.prepare(self.number)
            except UnreachableError as error:
                if self.number == 1 or stop.count or time.monotonic() >= deadline:
                    raise
                if not told:
                    say(f"{error} Waiting up to {self.wait_seconds:,.0f} s for them (--wait-for-hosts).")
                    told = True
                sleep_unless(stop, _BETWEEN_CHECKS_SECONDS)

    def _delay_seconds(self, outcome: Outcome, reached: int) -> float | None:
        """Return the delay before the next attempt, or None for none, and print the reason."""
        if outcome.state == "unreachable":
            waited = f"Waited {self.wait_seconds:,.0f} s for them (--wait-for-hosts)."
            say(f"error: {outcome.reason} {waited} {_kept(reached)}")
        if outcome.state != "failed":
            return None
        where = f" ({outcome.doing})" if outcome.doing else ""
        kept = _kept(reached)
        if self.in_a_row > self.restarts.most:
            count = f"{self.restarts.most} restart{'' if self.restarts.most == 1 else 's'}"
            say(
                f"error: {outcome.reason}{where}. Giving up after {count} without a new checkpoint; see the end of the "
                f"logs in {self.directory.logs}/, fix the cause, and run the same command again. {kept}"
            )
            return None
        delay = self.restarts.delay_seconds(self.in_a_row)
        count = f"{self.in_a_row} of {self.restarts.most}"
        say(f"{outcome.reason}{where}. {kept} Restarting in {delay:.0f} s ({count}).")
        return delay

    def _record(self, outcome: Outcome, hosts: Sequence[str], began: float, began_at: int, reached: int) -> None:
        """Record the outcome of an attempt for `codeparrot-ds status`."""
        facts = {"began": began, "seconds": time.time() - began, "from_step": began_at, "to_step": reached}
        # A full disk has already been reported by the ranks.
        with contextlib.suppress(OSError), open(self.directory.launches, "a", encoding="utf-8") as file:
            file.write(json.dumps({**facts, "hosts": list(hosts), **vars(outcome)}) + "\n")


def _kept(reached: int) -> str:
    return f"Checkpoints up to step {reached} are kept." if reached else "There is no checkpoint yet."


def _newest_step(run: RunDirectory) -> int:
    found = run.checkpoint_directories()
    return step_of(found[-1]) if found else 0


def _wait_for_old_ranks(run: RunDirectory, stop: Stop, seconds: float) -> None:
    """Wait for ranks of an earlier start to exit: those of a killed supervisor exit on their own.

    Raises ConfigError if one keeps running, e.g. because it was started without a supervisor.
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
    """Return the command as a user could type it. `quote` escapes for layers in between, such as pdsh's shell."""
    command = [*program, "--module", "codeparrot_ds.train", quote(str(recipe))]
    return command + [part for override in overrides for part in ("--set", quote(override))]
