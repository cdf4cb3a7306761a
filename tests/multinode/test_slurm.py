"""The Slurm scripts of launch/ on a real two-node Slurm: Debian's slurmctld and two slurmd on this machine."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.options import BuildOptions
from tests.conftest import ROOT, Trained, read_run, save_recipe
from tests.faults.jobs import until
from tests.multinode.conftest import unavailable
from tests.multinode.slurm_nodes import Slurm, missing_tools, two_nodes

pytestmark = pytest.mark.slow

JOB_SECONDS = 240


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Set up a controller and two nodes of one CPU each, and remove everything afterwards."""
    if os.geteuid() != 0:
        unavailable("only root can be two Slurm nodes")
    if missing := missing_tools():
        unavailable(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
    with two_nodes(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def wait_for(slurm: Slurm, number: str, state: str, log: Path) -> dict[str, str]:
    """Wait until the job is in this state."""
    assert until(lambda: slurm.job(number)["JobState"] == state, JOB_SECONDS), (
        f"{slurm.job(number)}\n{log.read_text(encoding='utf-8') if log.exists() else ''}\n{slurm.logs()}"
    )
    return slurm.job(number)


def test_two_nodes_train_exactly_as_two_ranks_on_one(
    slurm: Slurm, baseline: Trained, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = save_recipe({**tiny_recipe, "name": "slurm"}, tmp_path / "tiny.yaml")
    log = tmp_path / "job.log"
    number = slurm.submit(log, "launch/slurm_train.sbatch", recipe, "--ranks", "1")
    job = wait_for(slurm, number, "COMPLETED", log)
    assert job["NumNodes"] == "2"
    trained = read_run(tmp_path / "runs" / "slurm")
    assert trained.losses() == baseline.losses()
    assert trained.digests() == baseline.digests()
    assert "srun --nodes=2" in log.read_text()


def test_nodes_train_where_the_job_was_submitted(slurm: Slurm, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    body = {**tiny_recipe, "name": "quoted", "runs": "runs", "schedule": {"steps": 2, "warmup_steps": 1}}
    cwd, log = tmp_path / "it's a $HOME clone; 100%n", tmp_path / "job.log"
    cwd.mkdir()
    recipe = save_recipe(body, tmp_path / "tiny.yaml")
    number = slurm.submit(log, ROOT / "launch" / "slurm_train.sbatch", recipe, "--ranks", "1", cwd=cwd)
    wait_for(slurm, number, "COMPLETED", log)
    assert len(read_run(cwd / "runs" / "quoted").losses()) == 2


def test_a_job_that_slurm_asks_to_end_saves_and_is_requeued(
    slurm: Slurm, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The signal that Slurm sends five minutes before the time limit."""
    body = {**tiny_recipe, "name": "asked", "schedule": {"steps": 100_000, "warmup_steps": 1}}
    body["checkpoints"] = {"every_steps": 50_000}
    run = RunDirectory(tmp_path / "runs" / "asked")
    log = tmp_path / "job.log"
    number = slurm.submit(log, "launch/slurm_train.sbatch", save_recipe(body, tmp_path / "tiny.yaml"), "--ranks", "1")
    trains = until(lambda: run.metrics.exists() and len(run.metrics.read_text().splitlines()) > 5, JOB_SECONDS)
    assert trains, f"{log.read_text()}\n{slurm.logs()}"
    slurm.call("scancel", "--batch", "--signal=USR1", number)
    assert until(lambda: slurm.job(number).get("Restarts") == "1", JOB_SECONDS), log.read_text()
    status = run.read_status()
    assert (status["state"], status["step"]) == ("preempted", run.newest_checkpoint().step)
    slurm.call("scancel", number)


def test_an_array_builds_the_shards_that_one_machine_builds(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    arguments = [data / "corpus", data / "tokenizer", tmp_path / "shards", "--valid-fraction", "0.1"]
    log = tmp_path / "array.log"
    options = ["--array=0-1", "--cpus-per-task=1", "--mem-per-cpu=500M"]
    number = slurm.submit(log, *options, "launch/slurm_preprocess.sbatch", *arguments)
    assert until(lambda: not slurm.call("squeue", "--noheader", f"--jobs={number}").strip(), JOB_SECONDS), (
        log.read_text()
    )
    whole = build(data / "corpus", data / "tokenizer", tmp_path / "whole", BuildOptions(valid_fraction=0.1, workers=1))
    assert (tmp_path / "shards" / "manifest.json").exists(), f"{log.read_text()}\n{slurm.logs()}"
    for path in sorted(whole.directory.glob("*.bin")) + sorted(whole.directory.glob("*.idx")):
        assert (tmp_path / "shards" / path.name).read_bytes() == path.read_bytes(), path.name
