"""Fixtures of tests that hurt training jobs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from codeparrot_ds.files import write_json
from codeparrot_ds.recipe import load_recipe
from tests.conftest import ROOT, DeepspeedCommand, Trained, read_run, recipe_on, save_recipe
from tests.faults.jobs import STEPS, NewRun, Run, Undisturbed, batches, side_by_side, state_of, without_token


@pytest.fixture
def new_run(deepspeed_command: DeepspeedCommand, data: Path, tmp_path: Path) -> Iterator[NewRun]:
    """Make a run of the tiny recipe: `new_run(name, stage, "key=value", ...)`."""
    made = []

    def make(name: str, stage: int, *settings: str, runs: Path = tmp_path) -> Run:
        body = {**recipe_on(data, runs), "name": name}
        # So that it is known which checkpoints there are when something happens.
        body["checkpoints"]["background"] = False
        body["engine"]["deepspeed"] = str(ROOT / "ds_configs" / f"zero{stage}.json")
        if stage == 0:  # none of the JSONs shipped
            write_json(tmp_path / "zero0.json", {"zero_optimization": {"stage": 0}})
            body["engine"]["deepspeed"] = str(tmp_path / "zero0.json")
        # Beside the logs and marks of its jobs, which are not on a disk that may be small.
        made.append(Run(deepspeed_command, save_recipe(body, tmp_path / f"{name}.yaml"), settings))
        return made[-1]

    yield make
    for run in made:
        run.end()
    for run in made:
        assert without_token(run.directory.path)


@pytest.fixture(scope="session")
def undisturbed(
    baseline: Trained, deepspeed_command: DeepspeedCommand, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Undisturbed]:
    """By ZeRO stage. Those of stages 1 and 2 have a checkpoint of each step."""
    directory = tmp_path_factory.mktemp("undisturbed")

    def train(stage: int) -> Trained:
        body = {**recipe_on(data, directory), "name": f"stage{stage}"}
        body["engine"]["deepspeed"] = str(ROOT / "ds_configs" / f"zero{stage}.json")
        settings = ["checkpoints.every_steps=1", f"checkpoints.keep_last={STEPS}"]
        run = Run(deepspeed_command, save_recipe(body, directory / f"stage{stage}.yaml"), settings)
        try:
            done = run.launch()
            assert done.returncode == 0, done.output
        finally:
            run.end()
        return read_run(run.directory.path)

    trained = {3: baseline, **dict(zip((1, 2), side_by_side(train, (1, 2)), strict=True))}
    for each in trained.values():
        assert each.digests() == batches(load_recipe(each.run.recipe))
    return {stage: Undisturbed(each, state_of(each.run)) for stage, each in trained.items()}
