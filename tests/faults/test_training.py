"""Jobs of two ranks with faults, numbered as in docs/faults.md, after which the run must recover exactly.

After each fault the run is restarted by the same command, so one run suffers several faults in a row. At the end its
losses, batch digests, weights and both moments are compared with those of a fault-free run.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from codeparrot_ds.checkpoint.zero import FP32, MOMENTS, ZeroCheckpoint
from codeparrot_ds.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, CheckpointError
from codeparrot_ds.report.timeline import read_history
from codeparrot_ds.run.directory import MANIFEST
from codeparrot_ds.shards.inspect import describe_sequences
from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.system.files import digest_file, read_json, write_json
from tests.conftest import Launched, read_run
from tests.faults.jobs import (
    END_SECONDS,
    STEPS,
    TOKEN,
    NewRun,
    Run,
    Undisturbed,
    batches,
    expect_finished,
    name_of,
    state_of,
    until,
    without_token,
)

pytestmark = pytest.mark.slow

# While a checkpoint is saved

# By stage: the fault, the newest complete checkpoint after it, and the one named by `latest`.
KILLED_WHILE_SAVING = {
    1: [("torn:1:2", 1, 1), ("slow:1:3", 2, 2), ("manifest:0:4", 3, 3), ("pointed:0:5", 5, 4)],
    2: [("torn:1:2", 1, 1), ("slow:1:3", 2, 2), ("name:0:4", 3, 3), ("retention:0:5", 5, 5)],
    3: [("torn:1:2", 1, 1), ("slow:1:3", 2, 2), ("pointer:0:4", 4, 3)],
}


@pytest.mark.parametrize("stage", KILLED_WHILE_SAVING)
def test_killed_at_any_point_of_saving_a_complete_checkpoint_remains(
    new_run: NewRun, undisturbed: dict[int, Undisturbed], stage: int
) -> None:
    """Faults 2, 3 and 4."""
    background = f"checkpoints.background={stage > 1}"  # stage 1 waits for the disk
    run = new_run("saving", stage, "checkpoints.every_steps=1", background)
    for fault, newest, pointed_at in KILLED_WHILE_SAVING[stage]:
        job = run.start(fault)
        done = job.end()
        where = f"{fault}\n{done.output}"
        assert done.returncode not in (0, EXIT_PREEMPTED) and job.mark("killed"), where
        assert run.status()["state"] != "finished", where
        pointer, published = run.checkpoints()
        assert (pointer, published[-1]) == (name_of(pointed_at), name_of(newest)), where
        if fault.startswith("slow"):  # the other rank had finished its files
            assert json.loads(job.mark("seen")) == [name_of(2), [name_of(1), name_of(2), f"{name_of(3)}.tmp"]]
    expect_finished(run, undisturbed[stage])
    left = sorted(path.name for path in run.directory.checkpoints.iterdir())
    assert left == ["latest", name_of(STEPS - 1), name_of(STEPS)]


# Terminated from outside


def test_a_killed_rank_or_launcher_ends_the_job_and_no_rank_trains_on(
    new_run: NewRun, undisturbed: dict[int, Undisturbed]
) -> None:
    """Faults 1, 10 and 11."""
    run = new_run("killed", 1, "checkpoints.every_steps=2")
    job = run.start_deepspeed("kill:1:3")
    assert until(lambda: job.poll() is not None, END_SECONDS)
    ended = time.time()
    done = job.end()
    assert done.returncode not in (0, EXIT_PREEMPTED)
    assert ended - float(job.mark("killed")) < 10
    assert run.status()["state"] == "failed"
    assert run.newest() == 2

    job = run.start_deepspeed("pause:0:3")
    job.wait_for("paused")
    assert len(job.family()) == 4  # the runner, the launcher and two ranks, which `end` looks for
    job.launcher().kill()
    job.end()  # the runner returns 0, because DeepSpeed did not notice a failure
    assert run.status()["state"] == "running"
    assert run.newest() == 2

    job = run.start_deepspeed("pause:0:2")
    job.wait_for("paused")
    job.process.terminate()
    assert job.process.wait(10) == -signal.SIGTERM
    assert len(job.family()) == 3  # DeepSpeed forwards it neither to the launcher nor to the ranks
    job.unpause()
    assert until(lambda: not job.family(), 30)
    assert run.newest() == 3
    status = run.status()
    assert (status["state"], status["step"]) == ("preempted", 3)
    assert status["reason"] == "the end of the command that started the launcher"

    expect_finished(run, undisturbed[1])


def test_a_run_told_to_stop_saves_and_resumes_later(new_run: NewRun, undisturbed: dict[int, Undisturbed]) -> None:
    """Faults 12, 13 and 19."""
    run = new_run("asked", 2, "checkpoints.every_steps=6")

    def expect_preempted(done: Launched, step: int, reason: str, code: int = EXIT_PREEMPTED) -> None:
        assert done.returncode == code, done.output
        status = run.status()
        assert (status["state"], status["step"], run.newest()) == ("preempted", step, step)
        assert reason in status["reason"]

    job = run.start_deepspeed("pause:1:0")
    job.wait_for("paused")
    before = run.status()
    second = run.train()  # while the first trains
    assert second.returncode == EXIT_USER_ERROR
    assert second.output.count("another process is training in this directory") == 1
    assert "Traceback" not in second.output
    assert run.status() == before
    job.rank(1).send_signal(signal.SIGUSR1)
    job.wait_for("told")
    job.unpause()
    expect_preempted(job.end(), 1, "another rank")

    job = run.start("pause:0:1")
    job.wait_for("paused")
    run.directory.stop_file.touch()
    job.unpause()
    expect_preempted(job.end(), 2, str(run.directory.stop_file))

    job = run.start_deepspeed("pause:0:2")
    job.wait_for("paused")
    job.launcher().terminate()
    job.wait_for("told")
    job.unpause()
    expect_preempted(job.end(), 3, "SIGTERM", code=1)  # the launcher's own exit code, after the ranks'

    # A stop request that arrives while a checkpoint is renamed.
    run = new_run("asked", 2, "checkpoints.every_steps=4")
    done = run.train("term:0:4")
    expect_preempted(done, 5, "SIGTERM")
    assert run.checkpoints()[1][-2:] == [name_of(4), name_of(5)]

    expect_finished(run, undisturbed[2])
    assert not run.directory.stop_file.exists()


def test_a_rank_that_hangs_ends_the_job_with_all_stacks(new_run: NewRun, undisturbed: dict[int, Undisturbed]) -> None:
    """Fault 9."""
    run = new_run("hung", 3, "checkpoints.every_steps=2", "guards.hang_seconds=6")
    job = run.start("pause:1:3")
    job.wait_for("paused")
    job.rank(1).suspend()
    job.unpause()
    done = job.end()
    assert done.returncode not in (0, EXIT_PREEMPTED)
    status = run.status()
    assert status["state"] == "failed"
    assert status["error"] == "rank 0 hung during step 3: no progress within guards.hang_seconds"
    log = run.log(0)
    assert "hung during step 3" in log
    stacks = log.split("hung during step 3")[1]
    assert "in train_step" in stacks and "in _watch" in stacks  # the stacks of the main thread and of the watchdog
    assert run.newest() == 2
    expect_finished(run, undisturbed[3])


# Damage


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, enough for two checkpoints."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_reported_and_the_older_checkpoint_remains(
    small_disk: Path, new_run: NewRun, undisturbed: dict[int, Undisturbed], background: bool
) -> None:
    """Fault 5. Rank 1 finds the disk full; nothing is removed for a checkpoint that was not published."""
    settings = ("checkpoints.every_steps=2", "checkpoints.keep_last=1", f"checkpoints.background={background}")
    run = new_run("full", 3, *settings, runs=small_disk)
    done = run.train("full:1:4")
    assert done.returncode == EXIT_USER_ERROR, done.output
    assert "Older checkpoints are untouched" in done.output
    # The disk is also full for rank 0, which may get there later or earlier.
    assert re.search(r"rank [01] could not save .* with 0\.0 MB free on this disk", done.output)
    assert "Traceback" not in done.output
    assert run.checkpoints() == (name_of(2), [name_of(2)])
    assert run.status()["state"] != "finished"
    (run.directory.path / "ballast").unlink()
    expect_finished(run, undisturbed[3])
    assert run.checkpoints()[1] == [name_of(STEPS)]


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def copy_of(undisturbed: Undisturbed, run: Run) -> None:
    """Copy the results of the fault-free run into `run`."""
    shutil.copytree(undisturbed.trained.run.path, run.directory.path)


def test_damaged_checkpoints_are_named_and_skipped_but_never_all(
    new_run: NewRun, undisturbed: dict[int, Undisturbed]
) -> None:
    """Faults 6, 7 and 8."""
    run = new_run("damaged", 2, "checkpoints.every_steps=1", "checkpoints.keep_last=6")
    copy_of(undisturbed[2], run)
    checkpoints = run.directory.checkpoints
    of_rank_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    aside = shutil.copytree(checkpoints / name_of(2), checkpoints.with_name("aside"))
    (checkpoints / "latest").write_text("step-00")  # torn
    flip_byte(checkpoints / name_of(6) / of_rank_1)
    (checkpoints / name_of(5) / of_rank_1).unlink()
    os.truncate(checkpoints / name_of(4) / "mp_rank_00_model_states.pt", 1000)
    (checkpoints / name_of(3) / MANIFEST).unlink()
    for step in (1, 2):
        (checkpoints / name_of(step) / MANIFEST).write_text("{")
    expected = {
        6: f"{of_rank_1}: content differs from what was written",
        5: f"{of_rank_1} is missing",
        4: "mp_rank_00_model_states.pt: 1,000 bytes, the manifest says",
        3: "no readable manifest",
    }
    names = sorted(path.name for path in checkpoints.iterdir())
    rows = run.rows()
    done = run.train()
    assert done.returncode == EXIT_USER_ERROR, done.output
    assert "no undamaged checkpoint is left (6 damaged" in done.output
    assert "Traceback" not in done.output
    assert sorted(path.name for path in checkpoints.iterdir()) == names
    assert run.rows() == rows  # no step was taken

    shutil.rmtree(checkpoints / name_of(2))
    aside.rename(checkpoints / name_of(2))
    (checkpoints / "latest").unlink()
    (checkpoints / f"{name_of(6)}.damaged").mkdir()  # as it was already damaged earlier
    (checkpoints / f"{name_of(6)}.damaged" / "file").touch()
    said = expect_finished(run, undisturbed[2]).output.splitlines()
    for step, problem in expected.items():
        assert any(name_of(step) in line and problem in line for line in said), (step, said)
    assert any("resuming from" in line and name_of(2) in line for line in said)
    assert [row["step_seconds"] for row in run.rows()[:2]] == [row["step_seconds"] for row in rows[:2]]
    assert all(a["step_seconds"] != b["step_seconds"] for a, b in zip(run.rows()[2:], rows[2:], strict=True))


class Hostile:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize(
    ("stage", "name"), [(1, "mp_rank_00_model_states.pt"), (3, "zero_pp_rank_1_mp_rank_00_optim_states.pt")]
)
def test_a_checkpoint_that_would_run_code_is_refused(
    new_run: NewRun, undisturbed: dict[int, Undisturbed], tmp_path: Path, stage: int, name: str
) -> None:
    """Fault 17. Size and digest of the file match the manifest, so that its pickle is read."""
    run = new_run("hostile", stage)
    copy_of(undisturbed[stage], run)
    canary = tmp_path / "canary"
    shutil.rmtree(run.directory.newest_checkpoint().path)  # as if the run had not finished
    newest = run.directory.newest_checkpoint()
    file = newest.path / name
    state = torch.load(file, weights_only=False)
    torch.save({**state, "hostile": Hostile(canary)}, file)
    torch.load(file, weights_only=False)
    assert canary.exists()  # the pickle is effective
    canary.unlink()

    manifest = read_json(newest.path / MANIFEST, "manifest")
    manifest["files"][name] = {"bytes": file.stat().st_size, "xxh3_128": digest_file(file)}
    write_json(newest.path / MANIFEST, manifest)
    run.directory.newest_checkpoint().verify()
    done = run.train()
    assert done.returncode != 0
    assert not canary.exists()
    assert "Traceback" not in done.output
    assert done.output.count("error: ") == 1
    assert f"{file}: refused" in done.output and "weights_only" not in done.output
    with pytest.raises(CheckpointError, match=f"{name}: refused"):
        ZeroCheckpoint(newest)
    assert not canary.exists()


def test_a_token_in_the_environment_is_written_nowhere(new_run: NewRun) -> None:
    """Fault 21. The token is also searched for after every other job of these tests."""
    settings = ("logging.tensorboard=true", "logging.wandb=true", "evaluation.samples=1")
    run = new_run("token", 3, *settings)
    done = run.train(env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.output
    assert run.directory.tensorboard.exists()
    assert TOKEN not in done.output
    assert without_token(run.directory.path)


# Wrong numbers


LAYOUTS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_gradients_that_are_not_finite_are_skipped_and_too_many_stop_the_run(
    new_run: NewRun, stage: int, precision: str
) -> None:
    """Fault 15. NaN in step 1; then in each step from 3 on, of which two in a row are allowed."""
    run = new_run(
        "nan",
        stage,
        f"engine.precision={precision}",
        "checkpoints.every_steps=3",
        "guards.max_skipped_steps=2",
        "schedule.steps=9",
    )
    done = run.train("nan:1:1", "nans:1:3")
    assert done.returncode == EXIT_USER_ERROR, done.output
    assert done.output.count("error: ") == 1
    assert "step 5: 3 steps in a row were skipped" in done.output
    assert "Traceback" not in done.output
    status = run.status()
    assert status["state"] == "failed" and "3 steps in a row" in status["error"]
    assert "step 1: skipped, gradients are not finite (1 in a row, 1 in total)" in done.output

    rows, batch = run.rows(), run.recipe.batch.global_batch_size
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 2, 3, 4]
    for row in rows:
        step, taken = row["step"], row["step"] + 1 - row["skipped_steps"]
        assert row["loss"] is not None
        assert row["learning_rate"] == run.recipe.optimizer.learning_rate * run.recipe.schedule.ratio(step)
        assert (row["samples_seen"], row["tokens_seen"]) == ((step + 1) * batch, taken * batch * 32)

    assert run.checkpoints() == (name_of(3), [name_of(3)])
    held = ZeroCheckpoint(run.directory.newest_checkpoint())
    assert held.step == 2  # AdamW's step count, without the skipped step
    assert all(torch.isfinite(held.read(name, what)).all() for name in held.shapes for what in (FP32, *MOMENTS))
    expect_named(run, {1, 3, 4, 5}, "skipped: non-finite gradients")
    skips = [event.details for event in read_history(run.directory, False).events if event.what == "skipped steps"]
    assert [int(n) for details in skips for n in details.rpartition(" step ")[2].split(", ")] == [1, 3, 4, 5]


def expect_named(run: Run, steps: set[int], reason: str) -> None:
    """Check that the incidents are those of `steps`, and name the source of each of their samples."""
    recipe = run.recipe
    data = Dataset.open(recipe.data.sources, recipe.model.seq_len)
    incidents = run.incidents()
    assert set(incidents) == steps
    size = recipe.batch.global_batch_size
    for step, (why, samples) in incidents.items():
        assert reason in why
        numbers = data.order(recipe.seed).take(step * size, size).tolist()
        assert [sample["sequence"] for sample in samples] == numbers
        described = describe_sequences(data, numbers)
        assert [sample["documents"] for sample in samples] == [described[number] for number in numbers]
        assert all(
            repository and path.endswith(".py") for sample in samples for repository, path in sample["documents"]
        )


def test_a_replica_that_differs_by_one_bit_halts_the_run(new_run: NewRun, undisturbed: dict[int, Undisturbed]) -> None:
    """Fault 16. With two ranks it is unknown which is wrong; with three it is named, see test_guards."""
    run = new_run("flipped", 1, "checkpoints.every_steps=2", "guards.replica_check_steps=1")
    done = run.train("flip:1:3")
    assert done.returncode == EXIT_USER_ERROR, done.output
    assert done.output.count("error: ") == 1 and "Traceback" not in done.output
    assert "step 3: the weights on rank 0, 1 differ from one another" in done.output
    assert run.status()["state"] == "failed"
    assert run.checkpoints() == (name_of(2), [name_of(2)])
    expect_finished(run, undisturbed[1])


# Loss spikes: the samples of step 20 have ten times their loss, detected with the checkpoint after step 21.

SPIKE = "bad:0:20"
SPIKE_STEPS = 28
SUSPECTS = set(range(13, 21))


@pytest.fixture
def new_spiky_run(new_run: NewRun) -> NewRun:
    """Create a run long enough to detect a spike: `new_spiky_run(policy)`."""

    def make(policy: str, name: str = "") -> Run:
        return new_run(
            name or policy,
            1,
            f"guards.spike={policy}",
            f"schedule.steps={SPIKE_STEPS}",
            "checkpoints.every_steps=3",
            "checkpoints.keep_last=5",
            "evaluation.every_steps=14",
        )

    return make


def test_a_loss_spike_is_named(new_spiky_run: NewRun) -> None:
    run = new_spiky_run("warn")
    done = run.train(SPIKE)
    assert done.returncode == 0, done.output
    assert "step 20: loss" in done.output
    expect_named(run, SUSPECTS, "at step 20")
    assert read_run(run.directory.path).digests() == batches(run.recipe)
    assert run.status()["state"] == "finished"


def test_a_loss_spike_stops_a_run_that_asks_for_it(new_spiky_run: NewRun) -> None:
    run = new_spiky_run("stop")
    done = run.train(SPIKE)
    assert done.returncode == EXIT_USER_ERROR, done.output
    assert done.output.count("error: ") == 1 and "Traceback" not in done.output
    assert "Stopped without saving" in run.status()["error"]
    assert run.status()["state"] == "failed"
    expect_named(run, SUSPECTS, "at step 20")
    assert run.newest() == 18


def test_after_a_loss_spike_a_run_goes_back_and_skips_its_samples_even_if_killed(new_spiky_run: NewRun) -> None:
    def through() -> Run:
        run = new_spiky_run("go_back", "whole")
        done = run.train(SPIKE)
        assert done.returncode == 0, done.output
        assert "going back to step 12, skipping the samples of steps 13 to 20" in done.output
        expect_named(run, SUSPECTS, "at step 20")
        events = read_history(run.directory, running=False).events
        unusual = [(event.what, event.step, event.details[:13]) for event in events if event.what != "checkpoint"]
        assert unusual == [("loss spike", 20, "step 20: loss"), ("went back", 12, "step 20: loss")]
        return run

    def killed() -> Run:
        run = new_spiky_run("go_back", "killed")
        for fault in ("leap:0:0", "again:1:14"):
            done = run.train(SPIKE, fault)
            assert done.returncode not in (0, EXIT_PREEMPTED), f"{fault}\n{done.output}"
        done = run.train(SPIKE)
        assert done.returncode == 0, done.output
        return run

    runs = [through(), killed()]
    size = runs[0].recipe.batch.global_batch_size
    skipped_ranges = (min(SUSPECTS) * size, (max(SUSPECTS) + 1) * size)
    for run in runs:
        assert run.directory.skipped_ranges() == [skipped_ranges]
        found = read_run(run.directory.path)
        assert read_history(run.directory, running=False).attempts[-1].state == "finished"
        assert found.digests() == batches(run.recipe, [skipped_ranges])
        assert found.digests()[:13] == batches(run.recipe)[:13]
        status = run.status()
        assert (status["state"], status["step"], status["samples_seen"]) == (
            "finished",
            SPIKE_STEPS,
            SPIKE_STEPS * size,
        )
    whole, killed_run = (read_run(run.directory.path) for run in runs)
    assert killed_run.losses() == whole.losses()
    assert state_of(killed_run.run) == state_of(whole.run)
