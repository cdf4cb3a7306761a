"""`codeparrot-ds launch` supervises a job: crashes are restarted, user errors are not."""

import itertools
import json
import signal
from typing import Any

import psutil
import pytest

from codeparrot_ds.errors import EXIT_CRASHED, EXIT_PREEMPTED, EXIT_USER_ERROR
from codeparrot_ds.report.status import run_status
from tests.faults.jobs import (
    END_SECONDS,
    STEPS,
    NewRun,
    Run,
    Undisturbed,
    expect_as_undisturbed,
    expect_finished,
    name_of,
    until,
)

pytestmark = pytest.mark.slow

QUICK = ("--restart-delay", "0.2")


def attempts(run: Run) -> list[dict[str, Any]]:
    """Return the attempts that `codeparrot-ds launch` recorded."""
    return [json.loads(line) for line in run.directory.launches.read_text().splitlines()]


def test_after_a_rank_or_a_launcher_was_killed_the_job_restarts_by_itself(
    new_run: NewRun, undisturbed: dict[int, Undisturbed]
) -> None:
    run = new_run("mended", 1, "checkpoints.every_steps=1")
    job = run.start_supervised("once:1:2", "pause:0:4", supervised=QUICK)
    job.wait_for("paused")
    job.launcher().kill()  # deepspeed then exits with 0, as after a success
    job.unpause()
    done = job.end()
    assert done.returncode == 0, done.output
    expect_as_undisturbed(run, undisturbed[1])
    first, second, third = attempts(run)
    assert (first["state"], first["from_step"], first["to_step"]) == ("failed", 0, 2)
    assert "rank 1 on" in first["reason"] and "was killed" in first["reason"]
    assert (second["state"], second["from_step"], second["to_step"]) == ("failed", 2, 4)
    assert (third["state"], third["from_step"], third["to_step"]) == ("finished", 4, STEPS)
    status = run_status(run.directory)
    assert status.state == "finished"
    assert [row[1].rpartition(": ")[2] for row in status.rows() if row[0] == "attempt 3"] == [
        "finished, trained to its last step"
    ]


@pytest.mark.parametrize("fault", ["crash", pytest.param("kill", marks=pytest.mark.nightly)])
def test_a_crash_loop_is_stopped_and_nothing_is_lost(
    new_run: NewRun, undisturbed: dict[int, Undisturbed], fault: str
) -> None:
    """Fault 18."""
    run = new_run(f"loop-{fault}", 2, "checkpoints.every_steps=2")
    job = run.start_supervised(f"{fault}:0:3", supervised=("--max-restarts", "2", "--restart-delay", "2"))
    done = job.end()
    assert done.returncode == EXIT_CRASHED, done.output
    found = attempts(run)
    assert [(each["from_step"], each["to_step"]) for each in found] == [(0, 2), (2, 2), (2, 2)]
    assert {each["state"] for each in found} == {"failed"}
    if fault == "crash":
        assert "ZeroDivisionError: made by the test" in found[-1]["reason"]
    pauses = [after["began"] - before["began"] - before["seconds"] for before, after in itertools.pairwise(found)]
    assert pauses[0] < 1 < 2 <= pauses[1] < 4
    assert "Giving up after 2 restarts without a new checkpoint" in done.output
    assert run.checkpoints() == (name_of(2), [name_of(2)])
    expect_finished(run, undisturbed[2])


def test_when_the_supervisor_is_killed_all_ranks_exit_and_the_next_launch_resumes(
    new_run: NewRun, undisturbed: dict[int, Undisturbed]
) -> None:
    run = new_run("headless", 3, "checkpoints.every_steps=1")
    job = run.start_supervised("pause:0:2", supervised=QUICK)
    job.wait_for("paused")
    second = run.start_supervised(supervised=QUICK).end()
    assert second.returncode == EXIT_USER_ERROR, second.output
    assert "another `codeparrot-ds launch` is already supervising this run" in second.output
    assert len(job.family()) >= 4
    job.process.kill()
    third = run.start_supervised(supervised=QUICK)  # immediately, while the old ranks may still be alive
    assert until(lambda: not job.family(), 30), job.family()
    done = third.end()
    assert done.returncode == 0, done.output
    expect_as_undisturbed(run, undisturbed[3])


def test_a_supervisor_told_to_stop_saves_first(new_run: NewRun, undisturbed: dict[int, Undisturbed]) -> None:
    run = new_run("told", 2, "checkpoints.every_steps=6")
    for step, number in enumerate((signal.SIGTERM, signal.SIGHUP), start=1):
        job = run.start_supervised(f"pause:0:{step - 1}", supervised=QUICK)
        job.wait_for("paused")
        job.process.send_signal(number)
        job.wait_for("told")
        job.unpause()
        done = job.end()
        assert done.returncode == EXIT_PREEMPTED, done.output
        assert (run.newest(), run.status()["state"]) == (step, "preempted")
        assert run.status()["reason"] == number.name
    job = run.start_supervised("pause:0:3", supervised=QUICK)  # and now twice
    job.wait_for("paused")
    for _ in range(2):
        job.process.send_signal(signal.SIGINT)
        assert until(lambda: "saving a checkpoint" in job.output(), 10)
    done = job.end()
    assert done.returncode == 128 + signal.SIGINT, done.output
    assert run.newest() == 2
    assert [each["state"] for each in attempts(run)] == ["preempted"] * 3
    expect_finished(run, undisturbed[2])


def test_a_rank_that_is_stopped_is_killed_and_the_job_restarts(
    new_run: NewRun, undisturbed: dict[int, Undisturbed]
) -> None:
    """Fault 9. Only SIGKILL stops it, and deepspeed waits 30 s."""
    run = new_run("stopped", 1, "checkpoints.every_steps=1", "guards.hang_seconds=6")
    job = run.start_supervised("pause:1:2", supervised=QUICK)
    job.wait_for("paused")
    stopped = job.rank(1)
    stopped.suspend()
    job.unpause()
    assert until(lambda: not psutil.pid_exists(stopped.pid), END_SECONDS), job.output()
    done = job.end()
    assert done.returncode == 0, done.output
    expect_as_undisturbed(run, undisturbed[1])
    assert attempts(run)[0]["state"] == "failed" and "hung" in attempts(run)[0]["reason"]


def test_a_user_error_is_not_retried(new_run: NewRun) -> None:
    run = new_run("refused", 2)
    done = run.start_supervised(supervised=QUICK, options=("--set", "engine.precision=fp16")).end()
    assert done.returncode == EXIT_USER_ERROR, done.output
    assert done.output.count("engine.precision: fp16 is not supported") == 1
    (only,) = attempts(run)
    assert only["state"] == "refused" and "fp16 is not supported" in only["reason"]
