"""Fixtures of tests that inject faults into training jobs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.system.files import write_json
from tests.conftest import ROOT, DeepspeedCommand, Trained, once, read_run, recipe_on, save_recipe
from tests.faults.jobs import STEPS, NewRun, Run, Starter, Undisturbed, batches, state_of, without_token
from tests.forked_ranks import ForkServer


@pytest.fixture(scope="session")
def starter(deepspeed_command: DeepspeedCommand, fork_server: ForkServer) -> Starter:
    return Starter(deepspeed_command, fork_server)


@pytest.fixture
def new_run(starter: Starter, data: Path, tmp_path: Path) -> Iterator[NewRun]:
    """Create a run of the tiny recipe: `new_run(name, stage, "key=value", ...)`."""
    made = []

    def make(name: str, stage: int, *settings: str, runs: Path = tmp_path) -> Run:
        body = {**recipe_on(data, runs), "name": name}
        # Synchronous saves, so that it is known which checkpoints exist at a fault.
        body["checkpoints"]["background"] = False
        body["engine"]["deepspeed"] = str(ROOT / "ds_configs" / f"zero{stage}.json")
        if stage == 0:  # no JSON is shipped for this stage
            write_json(tmp_path / "zero0.json", {"zero_optimization": {"stage": 0}})
            body["engine"]["deepspeed"] = str(tmp_path / "zero0.json")
        # Separate from the logs and marks of its jobs, because the run's disk may be small.
        made.append(Run(starter, save_recipe(body, tmp_path / f"{name}.yaml"), settings))
        return made[-1]

    yield make
    for run in made:
        run.end()
    for run in made:
        assert without_token(run.directory.path)


@pytest.fixture(scope="session")
def undisturbed(
    baseline: Trained, starter: Starter, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Undisturbed]:
    """Fault-free runs by ZeRO stage. Those of stages 1 and 2 have a checkpoint of each step."""

    def train(directory: Path) -> None:
        for stage in (1, 2):
            body = {**recipe_on(data, directory), "name": f"stage{stage}"}
            body["engine"]["deepspeed"] = str(ROOT / "ds_configs" / f"zero{stage}.json")
            settings = ["checkpoints.every_steps=1", f"checkpoints.keep_last={STEPS}"]
            done = Run(starter, save_recipe(body, directory / f"stage{stage}.yaml"), settings).train()
            assert done.returncode == 0, done.output

    directory = once(tmp_path_factory, "undisturbed", train)
    trained = {3: baseline, **{stage: read_run(directory / f"stage{stage}") for stage in (1, 2)}}
    for each in trained.values():
        assert each.digests() == batches(load_recipe(each.run.recipe))
    return {stage: Undisturbed(each, state_of(each.run)) for stage, each in trained.items()}
