"""One run on changing numbers of ranks and ZeRO stages: the same data, the same losses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.checkpoint.zero import MOMENTS, ZeroCheckpoint
from codeparrot_ds.errors import EXIT_PREEMPTED
from codeparrot_ds.run.directory import Checkpoint, RunDirectory
from tests.conftest import ROOT, RunRanks, Trained, read_run, recipe_on, save_recipe, train

pytestmark = pytest.mark.slow
STEPS = 80
PROBE = ROOT / "tests" / "integration" / "probe_stop.py"


def body(data: Path, runs: Path, name: str) -> dict[str, Any]:
    """A recipe whose global batch can be divided among one, two and three ranks."""
    recipe = recipe_on(data, runs)
    return {
        **recipe,
        "name": name,
        "batch": {"global_batch_size": 6},
        "schedule": {"steps": STEPS, "warmup_steps": 4},
        "evaluation": {"every_steps": STEPS, "sequences": 7},
        "checkpoints": {"every_steps": STEPS, "keep_last": 9},
        "logging": {"every_steps": STEPS, "tensorboard": False},
    }


@pytest.fixture(scope="module")
def uninterrupted(forked: RunRanks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished run on two ranks at stage 1."""
    return train(forked, body(data, tmp_path_factory.mktemp("whole"), "whole"), ranks=2, stage=1)


@pytest.fixture
def stop_at(forked: RunRanks, data: Path, tmp_path: Path) -> Callable[..., None]:
    """Resume the run "moved" with given ranks and stage, and stop after a step or train to the end."""

    def run(step: int | None, ranks: int, stage: int) -> None:
        recipe = body(data, tmp_path, "moved")
        recipe["engine"]["deepspeed"] = str(ds_config(stage, tmp_path))
        path = save_recipe(recipe, tmp_path / "moved.yaml")
        if step is None:
            done = forked("--module", "codeparrot_ds.train", path, ranks=ranks)
            assert done.returncode == 0, done.output
        else:
            done = forked(PROBE, path, str(step), ranks=ranks)
            assert done.returncode == EXIT_PREEMPTED, done.output
            status = RunDirectory(tmp_path / "moved").read_status()
            assert (status["state"], status["step"]) == ("preempted", step)

    return run


def ds_config(stage: int, directory: Path) -> Path:
    """The shipped configuration of a stage; for stage 0, which is not shipped, one written here."""
    if stage > 0:
        return ROOT / "ds_configs" / f"zero{stage}.json"
    path = directory / "zero0.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    return path


def optimizer_groups(checkpoint: Checkpoint) -> list[tuple[str, float, set[int]]]:
    """Name, weight decay and step count of each parameter group, as stored in every rank's file."""
    found = []
    for path in sorted(checkpoint.path.glob("*optim_states.pt")):
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        base = state["optimizer_state_dict" if checkpoint.zero_stage == 3 else "base_optimizer_state"]
        for group in base["param_groups"]:
            steps = {int(base["state"][number]["step"]) for number in group["params"]}
            found.append((group["name"], group["weight_decay"], steps))
    return found


def assert_same_run(moved: Trained, whole: Trained) -> None:
    assert moved.digests() == whole.digests()
    assert [row["step"] for row in moved.rows if row["kind"] == "train"] == list(range(STEPS))
    for a, b in zip(moved.losses(), whole.losses(), strict=True):
        assert math.isclose(float.fromhex(a), float.fromhex(b), rel_tol=1e-3)
    assert moved.valid_losses()[STEPS] == pytest.approx(whole.valid_losses()[STEPS], rel=1e-3)


def assert_groups_intact(moved: Trained) -> None:
    groups = optimizer_groups(source_checkpoint(moved.run.path))
    assert {(name, decay) for name, decay, _ in groups} == {("decayed", 0.1), ("plain", 0.0)}
    assert all(steps == {STEPS} for _, _, steps in groups)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_then_one_then_three_then_two(
    stop_at: Callable[..., None], uninterrupted: Trained, tmp_path: Path, stage: int
) -> None:
    for step, ranks in ((10, 2), (20, 1), (30, 3), (None, 2)):
        stop_at(step, ranks, stage)
    moved = read_run(tmp_path / "moved")
    assert_same_run(moved, uninterrupted)
    assert_groups_intact(moved)


def test_every_stage_resumes_from_every_other(
    stop_at: Callable[..., None], uninterrupted: Trained, tmp_path: Path
) -> None:
    for step, ranks, stage in ((8, 2, 3), (16, 3, 1), (24, 1, 0), (32, 1, 2), (40, 2, 0), (None, 2, 3)):
        stop_at(step, ranks, stage)
    moved = read_run(tmp_path / "moved")
    assert_same_run(moved, uninterrupted)
    assert_groups_intact(moved)


def test_moving_a_checkpoint_changes_no_bit_of_it(
    stop_at: Callable[..., None], forked: RunRanks, tmp_path: Path
) -> None:
    stop_at(3, 2, 3)
    old = ZeroCheckpoint(source_checkpoint(tmp_path / "moved"))
    for ranks, stage in ((3, 1), (1, 2), (3, 3), (1, 0)):
        out = tmp_path / f"{ranks}-{stage}"
        done = forked(
            ROOT / "tests" / "integration" / "probe_reshard.py",
            *(tmp_path / "moved.yaml", ds_config(stage, tmp_path), out),
            ranks=ranks,
        )
        assert done.returncode == 0, done.output
        again = ZeroCheckpoint(source_checkpoint(out))
        assert again.step == old.step == 3
        for name in old.shapes:
            for what in ("fp32", *MOMENTS):
                assert torch.equal(again.read(name, what), old.read(name, what)), (name, what, ranks, stage)
        assert float(old.read("transformer.wte.weight", "exp_avg_sq").max()) > 0
