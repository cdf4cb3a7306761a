"""Start `deepspeed` for a recipe, watch it, and start it again. Every rank checks the rest before it allocates."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from codeparrot_ds.cluster.hostfile import read_hostfile
from codeparrot_ds.cluster.supervise import Attempt, Outcome, Restarts, Stop, sleep_unless
from codeparrot_ds.errors import ConfigError
from codeparrot_ds.files import exclusive_lock, make_directory
from codeparrot_ds.jobs import say
from codeparrot_ds.recipe import Batch, load_recipe
from codeparrot_ds.run_directory import RunDirectory, step_of

_DEEPSPEED_PORT = 29500  # its default `--master_port`
_CPU_RANKS = 2  # without a GPU: as many as it takes to be a distributed run
_LOCK_SECONDS = 30.0  # within which ranks of a supervisor that was killed have ended


def launch(
    recipe: Path, hostfile: Path | None, ranks: int | None, overrides: Sequence[str], restarts: Restarts | None = None
) -> int:
    """Train `recipe` with deepspeed, starting again from the newest checkpoint when a rank dies; return the exit code.

    Raises ConfigError or ClusterError for what is wrong before anything starts, as when another process trains it.
    """
    loaded = load_recipe(recipe, overrides)
    environment = dict(os.environ)
    if hostfile is not None:
        read_hostfile(hostfile)
        if ranks is not None:
            raise ConfigError("--ranks counts processes on this machine; with --hostfile its slots decide.")
    elif (gpus := _count_gpus()) == 0:
        ranks = ranks or _CPU_RANKS
        environment["DS_ACCELERATOR"] = "cpu"
    else:
        ranks = ranks or _most_ranks(loaded.batch, gpus)
    run = RunDirectory(loaded.run_directory)
    make_directory(run.path)
    busy = f"{run.path}: another `codeparrot-ds launch` sees to this run. Stop it, or use --set name=…"
    with exclusive_lock(run.path / ".launch.lock", busy), Stop() as stop:
        command = deepspeed_command(recipe, hostfile, ranks, overrides)
        accelerator = "DS_ACCELERATOR=cpu " if environment.get("DS_ACCELERATOR") == "cpu" else ""
        say(f"$ {accelerator}{shlex.join(command)}")
        in_a_row = 0
        while True:
            _wait_for_old_ranks(run, stop)
            began, began_at = time.time(), _newest_step(run)
            attempt = Attempt("127.0.0.1", _kill_here)
            outcome = attempt.run([*command, "--supervisor", str(attempt.supervisor)], environment, stop, lambda: "")
            reached = _newest_step(run)
            _note(run, outcome, began, began_at, reached)
            in_a_row = 1 if reached > began_at else in_a_row + 1
            again = _restart(outcome, in_a_row, restarts or Restarts(), reached, run)
            if again is None:
                return outcome.code
            sleep_unless(stop, again)
            if stop.count:
                return 128 + signal.SIGINT


def _restart(outcome: Outcome, in_a_row: int, restarts: Restarts, reached: int, run: RunDirectory) -> float | None:
    """Seconds to wait before the next attempt, or None when there is to be none; says which, and why."""
    if outcome.state != "failed":
        return None
    where = f" ({outcome.doing})" if outcome.doing else ""
    kept = f"Checkpoints up to step {reached} are kept." if reached else "There is no checkpoint yet."
    if in_a_row > restarts.most:
        say(
            f"error: {outcome.reason}{where}. Started again {restarts.most} times without a new checkpoint, so this "
            f"will not mend itself. {kept} Look at the end of {run.logs}/, mend it, and run the same command again."
        )
        return None
    delay = restarts.delay_seconds(in_a_row)
    say(f"{outcome.reason}{where}. {kept} Starting again in {delay:.0f} s ({in_a_row} of {restarts.most}).")
    return delay


def _newest_step(run: RunDirectory) -> int:
    found = run.checkpoint_directories()
    return step_of(found[-1]) if found else 0


def _note(run: RunDirectory, outcome: Outcome, began: float, began_at: int, reached: int) -> None:
    """Keep for `codeparrot-ds status` what became of an attempt."""
    line = {"began": began, "seconds": time.time() - began, "from_step": began_at, "to_step": reached, **vars(outcome)}
    # On a full disk, the ranks have told of it.
    with contextlib.suppress(OSError), open(run.launches, "a") as file:
        file.write(json.dumps(line) + "\n")


def _wait_for_old_ranks(run: RunDirectory, stop: Stop) -> None:
    """Wait until no rank of an earlier start trains here: those of a supervisor that was killed end by themselves.

    Raises ConfigError when one goes on, as one that was started without a supervisor does.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while run.in_use() and not stop.count:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{run.path}: another process is training in this directory. Stop it, or use --set name=…"
            )
        time.sleep(0.5)


def _kill_here(host: str, pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _most_ranks(batch: Batch, gpus: int) -> int:
    """The largest number of GPUs to which the recipe's batch can be dealt."""
    for ranks in range(gpus, 1, -1):
        try:
            batch.micro_batch_and_accumulation(ranks)
        except ConfigError:
            continue
        return ranks
    return 1


def _port_options() -> list[str]:
    """Another port than DeepSpeed's where that one is taken, as by a second run on this machine."""
    for port in (_DEEPSPEED_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            found = probe.getsockname()[1]
            return [] if found == _DEEPSPEED_PORT else ["--master_port", str(found)]
    return []


def _count_gpus() -> int:
    """GPUs that torch can use here; 0 when the user asks for the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def deepspeed_command(recipe: Path, hostfile: Path | None, ranks: int | None, overrides: Sequence[str]) -> list[str]:
    """The command that a user could type."""
    command = [_find_deepspeed(), "--quiet"]
    if hostfile is None:
        command += _port_options()
    else:
        command += ["--hostfile", str(hostfile)]
    if ranks is not None:
        command += ["--num_gpus", str(ranks)]
    command += ["--module", "codeparrot_ds.train", str(recipe)]
    return command + [part for override in overrides for part in ("--set", override)]


def _find_deepspeed() -> str:
    """`deepspeed` if PATH has the one of this environment, else its path."""
    beside = Path(sys.executable).with_name("deepspeed")
    on_path = shutil.which("deepspeed")
    if beside.exists():
        return "deepspeed" if on_path and Path(on_path).samefile(beside) else str(beside)
    if on_path is None:
        raise ConfigError("`deepspeed` is not on PATH. Install it: pip install deepspeed==0.19.8")
    return "deepspeed"
