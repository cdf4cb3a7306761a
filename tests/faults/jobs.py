"""Real jobs with fault injection, and the results of a fault-free run."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from codeparrot_ds.checkpoint.zero import FP32, MOMENTS, ZeroCheckpoint
from codeparrot_ds.hosts.working_directory import LAUNCHER
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.recipe import Recipe, load_recipe
from codeparrot_ds.shards.order import skip_ranges
from codeparrot_ds.shards.sequences import Dataset, batch_digest
from codeparrot_ds.system.files import digest_bytes
from tests.conftest import ROOT, DeepspeedCommand, Launched, Trained, read_run, set_options
from tests.forked_ranks import ForkedJob, ForkServer

PROBE = Path(__file__).with_name("probe_train.py")
PROBE_LAUNCH = Path(__file__).with_name("probe_launch.py")
MODULE = ("--module", "codeparrot_ds.train")
JOB = "CODEPARROT_TEST_JOB"  # environment variable set in all processes of a job
TOKEN = "hf_" + "uVwXyZaBcDeFgHiJkLmNoPqRsTuVwXyZaB"  # of no real account
END_SECONDS = 180  # time limit of a job on a busy machine
GONE_SECONDS = 5  # time limit for all processes of a finished job to exit
STEPS = 6


class Job:
    """Training ranks that can be signalled and killed."""

    def __init__(self, log: Path, marks: Path) -> None:
        self._log, self._marks = log, marks

    def poll(self) -> int | None:
        """The exit code, or None while running."""
        raise NotImplementedError

    def family(self) -> list[psutil.Process]:
        """Its running processes, including orphans."""
        raise NotImplementedError

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        raise NotImplementedError

    def mark(self, name: str) -> str:
        """Content of the probe's mark of this name."""
        return (self._marks / name).read_text()

    def wait_for(self, name: str) -> None:
        """Wait for a mark of the probe: `paused`, `told`."""
        assert until(lambda: (self._marks / name).exists() or self.poll() is not None, END_SECONDS)
        assert self.poll() is None, self.output()

    def unpause(self) -> None:
        """Let a paused rank continue."""
        (self._marks / "go").touch()

    def output(self) -> str:
        """Its output so far."""
        return self._log.read_text()

    def end(self) -> Launched:
        """Wait until it has ended, and check that none of its processes is left."""
        assert until(lambda: self.poll() is not None, END_SECONDS), f"{self.family()} hang\n{self.output()}"
        code = self.poll()
        assert code is not None
        assert until(lambda: not self.family(), GONE_SECONDS), f"{self.family()} live on\n{self.output()}"
        assert TOKEN not in self.output()
        return Launched(code, self.output())

    def kill(self) -> None:
        """Kill all remaining processes."""
        for process in self.family():
            process.kill()


class LaunchedJob(Job):
    """A running `deepspeed` or `codeparrot-ds launch` command, with its launcher and ranks.

    Attributes:
        process: the command's process.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, marks: Path) -> None:
        super().__init__(log, marks)
        self.process = process

    def poll(self) -> int | None:
        return self.process.poll()

    def family(self) -> list[psutil.Process]:
        """All processes that have inherited its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(JOB) == str(self._log):
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def _one(self, word: str) -> psutil.Process:
        found = [process for process in self.family() if word in process.cmdline()]
        assert len(found) == 1, self.output()
        return found[0]

    def rank(self, number: int) -> psutil.Process:
        return self._one(f"--local_rank={number}")

    def launcher(self) -> psutil.Process:
        """The process that `deepspeed` starts on each host, and that starts the ranks."""
        return self._one(LAUNCHER)

    def kill(self) -> None:
        super().kill()
        self.process.wait(10)


class ForkedRanks(Job):
    """Ranks without a launcher (see tests/forked_ranks.py)."""

    def __init__(self, job: ForkedJob, marks: Path) -> None:
        super().__init__(job.log, marks)
        self._job = job

    def poll(self) -> int | None:
        return self._job.poll()

    def family(self) -> list[psutil.Process]:
        return [psutil.Process(pid) for pid in self._job.pids if psutil.pid_exists(pid)]

    def rank(self, number: int) -> psutil.Process:
        return self._job.rank(number)

    def kill(self) -> None:
        self._job.end()


def until(condition: Callable[[], Any], seconds: float) -> bool:
    """Wait for a condition; returns whether it was met."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


Started = TypeVar("Started", bound=Job)


@dataclass
class Starter:
    """Ways to start ranks."""

    command: DeepspeedCommand
    server: ForkServer


class Run:
    """A run and the jobs that train it."""

    def __init__(self, starter: Starter, recipe: Path, settings: Sequence[str]) -> None:
        self._starter, self._recipe = starter, recipe
        self._settings = set_options(settings)
        self._jobs: list[Job] = []
        self.recipe = load_recipe(recipe, settings)
        self.directory = RunDirectory(self.recipe.run_directory)

    def start(self, *faults: str, env: Mapping[str, str] | None = None) -> Job:
        """Fork ranks with `faults`, named as in tests/faults/probe_train.py."""
        log, marks = self._new_log()
        program, injected = self._program(faults, marks)
        arguments = [*program, self._recipe, *self._settings, *injected]
        environment = {"HF_TOKEN": TOKEN, **(env or {})}
        job = self._starter.server.start(*arguments, ranks=2, cwd=ROOT, env=environment, log=log)
        return self._keep(ForkedRanks(job, marks))

    def start_deepspeed(self, *faults: str) -> LaunchedJob:
        """Start the same with a `deepspeed` command."""
        log, marks = self._new_log()
        program, injected = self._program(faults, marks)
        command, environment = self._starter.command(*program, self._recipe, *self._settings, *injected)
        return self._keep(_popen(command, environment, log, marks))

    def start_supervised(
        self, *faults: str, options: Sequence[str] = (), supervised: Sequence[str] = ()
    ) -> LaunchedJob:
        """Start the same with `codeparrot-ds launch` and `supervised` options."""
        log, marks = self._new_log()
        _, environment = self._starter.command()
        injected = [part for fault in faults for part in ("--fault", fault)] + ["--marks", str(marks)]
        command = [sys.executable, str(PROBE_LAUNCH), *injected, "launch", str(self._recipe)]
        command += [*self._settings, *options, "--ranks", "2", *supervised]
        return self._keep(_popen(command, environment, log, marks))

    def _new_log(self) -> tuple[Path, Path]:
        """Log file of a job, and the directory for its marks."""
        earlier = list(self._recipe.parent.glob(f"{self._recipe.stem}-*.log"))  # shared with runs of other settings
        log = self._recipe.with_name(f"{self._recipe.stem}-{len(earlier)}.log")
        log.touch()
        marks = log.with_suffix(".marks")
        marks.mkdir()
        return log, marks

    def _program(self, faults: Sequence[str], marks: Path) -> tuple[list[str | Path], list[str]]:
        """The program of the ranks, and its arguments after the recipe."""
        if not faults:
            return [*MODULE], []
        return [PROBE], [part for fault in faults for part in ("--fault", fault)] + ["--marks", str(marks)]

    def _keep(self, job: Started) -> Started:
        self._jobs.append(job)
        return job

    def train(self, *faults: str, **how: Any) -> Launched:
        """Start forked ranks and wait until they have ended."""
        return self.start(*faults, **how).end()

    def checkpoints(self) -> tuple[str | None, list[str]]:
        """Content of `latest` and names of complete checkpoints; checks the newest and the one `latest` names."""
        published = self.directory.checkpoint_directories()
        latest = self.directory.checkpoints / "latest"
        pointer = latest.read_text() if latest.exists() else None
        if published:
            self.directory.newest_checkpoint().verify()
        if pointer is not None:
            assert self.directory.checkpoints / pointer in published
        return pointer, [path.name for path in published]

    def newest(self) -> int:
        """Step of the newest complete checkpoint, which is verified; 0 if there is none."""
        _, published = self.checkpoints()
        return int(published[-1].removeprefix("step-")) if published else 0

    def status(self) -> dict[str, Any]:
        """Read the status file."""
        return self.directory.read_status()

    def log(self, rank: int) -> str:
        """Read a rank's log file."""
        return self.directory.log(rank).read_text()

    def rows(self) -> list[dict[str, Any]]:
        """Metrics rows of the training steps."""
        return [row for row in read_run(self.directory.path).rows if row["kind"] == "train"]

    def incidents(self) -> dict[int, tuple[str, list[dict[str, Any]]]]:
        """Reason and samples of the listed incidents, by step."""
        lines = map(json.loads, self.directory.incidents.read_text().splitlines())
        return {line["step"]: (line["reason"], line["samples"]) for line in lines}

    def end(self) -> None:
        """Kill all remaining processes."""
        for job in self._jobs:
            job.kill()


def _popen(command: Sequence[str], environment: dict[str, str], log: Path, marks: Path) -> LaunchedJob:
    with open(log, "wb") as file:
        environment = {**environment, "HF_TOKEN": TOKEN, JOB: str(log)}
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file)
    return LaunchedJob(process, log, marks)


NewRun = Callable[..., Run]


def without_token(path: Path) -> bool:
    """Whether no file below `path` contains the token."""
    return not any(TOKEN.encode() in file.read_bytes() for file in path.rglob("*") if file.is_file())


def state_of(run: RunDirectory) -> dict[str, str]:
    """Digests of the newest checkpoint's weights and of both moments, by parameter."""
    held = ZeroCheckpoint(run.newest_checkpoint())
    return {
        f"{what} of {name}": digest_bytes(held.read(name, what).contiguous().numpy().data)
        for name in held.shapes
        for what in (FP32, *MOMENTS)
    }


@dataclass
class Undisturbed:
    """A fault-free run."""

    trained: Trained
    state: dict[str, str]


def batches(recipe: Recipe, skipped_ranges: Sequence[tuple[int, int]] = ()) -> list[str]:
    """Digests of the batches that a run should be fed, each sample once."""
    data = Dataset.open(recipe.data.sources, recipe.model.seq_len)
    places = skip_ranges(np.arange(recipe.schedule.last_step * recipe.batch.global_batch_size), skipped_ranges)
    numbers = data.order(recipe.seed).at(places).reshape(recipe.schedule.last_step, -1)
    assert len(np.unique(numbers)) == numbers.size
    return [f"{batch_digest(data.train.batch(of_step)):016x}" for of_step in numbers]


def expect_as_undisturbed(run: Run, undisturbed: Undisturbed) -> None:
    """I0: every step was taken once, with the same samples, and gave the same losses, weights and moments."""
    found, expected = read_run(run.directory.path), undisturbed.trained
    assert [row["step"] for row in run.rows()] == list(range(STEPS))
    assert found.digests() == expected.digests()
    assert found.losses() == expected.losses()
    assert found.valid_losses() == expected.valid_losses()
    status = run.status()
    assert (status["state"], status["step"]) == ("finished", STEPS)
    assert run.newest() == STEPS
    state = state_of(run.directory)
    assert [name for name in state if state[name] != undisturbed.state[name]] == []


def expect_finished(run: Run, undisturbed: Undisturbed) -> Launched:
    """Run the same command again without faults, and check for exact recovery."""
    done = run.train()
    assert done.returncode == 0, done.output
    expect_as_undisturbed(run, undisturbed)
    return done


def name_of(step: int) -> str:
    return f"step-{step:08d}"
