"""Checkpoint directories: which are complete, and which are rejected."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.checkpoint.zero import ZeroCheckpoint
from codeparrot_ds.errors import CheckpointError
from codeparrot_ds.export.convert import _check_losses
from codeparrot_ds.run.directory import Checkpoint, RunDirectory
from codeparrot_ds.system.files import digest_file
from codeparrot_ds.training.checkpoint import check_identity
from codeparrot_ds.training.ranks import Ranks
from codeparrot_ds.training.resume import find_resume_point

IDENTITY = {"model": {"n_layer": 1}, "seed": 1}


def publish(run: RunDirectory, step: int, files: dict[str, Any] | None = None) -> Checkpoint:
    """A checkpoint of stage 3 from one rank with `files` (saved with torch)."""
    directory = run.checkpoint(step)
    directory.mkdir(parents=True)
    for name, value in (files or {"weights.pt": torch.ones(3)}).items():
        torch.save(value, directory / name)
    entries = {path.name: {"bytes": path.stat().st_size, "xxh3_128": digest_file(path)} for path in directory.iterdir()}
    checkpoint = Checkpoint(directory, step, step * 4, 3, 3, 1, "fp32", IDENTITY, entries, None)
    checkpoint.write(directory)
    return checkpoint


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def test_unfinished_directories_do_not_count(run: RunDirectory, alone: Ranks) -> None:
    publish(run, 10)
    publish(run, 9)
    (run.checkpoints / "step-00000011.tmp").mkdir()
    (run.checkpoints / "step-00000012").mkdir()  # no manifest
    assert [path.name for path in run.checkpoint_directories()] == ["step-00000009", "step-00000010"]
    assert run.newest_checkpoint().step == 10
    found = find_resume_point(run, alone)
    assert found is not None
    assert found.step == 10


def test_a_run_without_checkpoints_starts_at_step_0(run: RunDirectory, alone: Ranks) -> None:
    assert find_resume_point(run, alone) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run.newest_checkpoint()


def test_a_damaged_checkpoint_is_skipped_but_never_silently_all(run: RunDirectory, alone: Ranks) -> None:
    publish(run, 5)
    newest = publish(run, 10)
    file = newest.path / "weights.pt"
    file.write_bytes(file.read_bytes()[:-1])
    found = find_resume_point(run, alone)
    assert found is not None
    assert found.step == 5
    (run.checkpoint(5) / "weights.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no undamaged checkpoint is left \(1 damaged"):
        find_resume_point(run, alone)


@pytest.mark.parametrize("damage", ["file", "manifest"])
def test_retention_never_counts_a_damaged_checkpoint(run: RunDirectory, alone: Ranks, damage: str) -> None:
    publish(run, 5)
    broken = publish(run, 10).path / ("weights.pt" if damage == "file" else "manifest.json")
    broken.write_bytes(broken.read_bytes()[:-20])
    found = find_resume_point(run, alone)
    assert found is not None
    assert found.step == 5
    assert [path.name for path in run.checkpoint_directories()] == ["step-00000005"]
    assert (run.checkpoints / "step-00000010.damaged").is_dir()  # kept for inspection, but never resumed from


def test_another_model_or_seed_is_refused_with_all_differences(run: RunDirectory) -> None:
    checkpoint = publish(run, 10)
    with pytest.raises(CheckpointError) as caught:
        check_identity(checkpoint, {**IDENTITY, "seed": 2, "model": "another"})
    for expected in ("seed: saved with 1, now 2", "model: saved with"):
        assert expected in str(caught.value)


class Hostile:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_is_refused_before_it_runs(run: RunDirectory, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    publish(run, 1, {"zero_pp_rank_0_mp_rank_00_model_states.pt": {"param_shapes": Hostile(trap)}})
    with pytest.raises(CheckpointError, match="loading it could run code"):
        ZeroCheckpoint(source_checkpoint(run.path))
    assert not trap.exists()


def test_partitions_too_short_for_the_parameters_are_refused(run: RunDirectory) -> None:
    publish(
        run,
        1,
        {
            "zero_pp_rank_0_mp_rank_00_model_states.pt": {"param_shapes": [{"w": torch.Size([4])}]},
            "zero_pp_rank_0_mp_rank_00_optim_states.pt": {
                "optimizer_state_dict": {"fp32_flat_groups": [torch.ones(3)]}
            },
        },
    )
    with pytest.raises(CheckpointError, match="fewer weights than its parameters need"):
        list(ZeroCheckpoint(source_checkpoint(run.path)).tensors())


def test_a_missing_file_is_named(run: RunDirectory) -> None:
    publish(run, 1)
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_0_mp_rank_00_model_states\.pt: missing"):
        ZeroCheckpoint(source_checkpoint(run.path))


def test_a_conversion_whose_loss_differs_or_is_nan_fails(run: RunDirectory) -> None:
    def losses(master: float, written: float, logits: float = 0.0, transformers: float = 0.0) -> dict[str, Any]:
        forward = {
            "loss_master": master,
            "loss_written": written,
            "loss_transformers": written + transformers,
            "largest_logit_difference": logits,
            "largest_transformers_difference": abs(transformers),
            "largest_logit": 10.0,
        }
        return {"forward": forward, "engine": {"loss_valid": 5.0, "not_compared": None}}

    checkpoint = publish(run, 1)
    _check_losses(checkpoint, losses(5.0005, 5.0005), "float32")
    _check_losses(checkpoint, losses(5.0, 5.01), "bfloat16")
    for loss in (5.002, math.nan, math.inf):
        with pytest.raises(CheckpointError, match="Nothing was written"):
            _check_losses(checkpoint, losses(loss, loss), "float32")
    for loss in (5.0001, math.nan):
        with pytest.raises(CheckpointError, match=r"(?s)the checkpoint's weights give.*Nothing was written"):
            _check_losses(checkpoint, losses(5.0, loss), "float32")
    _check_losses(checkpoint, losses(5.0, 5.0, logits=9e-5), "float32")  # rounding, of logits up to 10
    for logits in (1.1e-4, math.nan):
        with pytest.raises(CheckpointError, match=r"logits differ from the checkpoint's by up to"):
            _check_losses(checkpoint, losses(5.0, 5.0, logits=logits), "float32")
    _check_losses(checkpoint, losses(5.0, 5.0, logits=0.1), "bfloat16")
    with pytest.raises(CheckpointError, match=r"(?s)2 problems.*transformers computes 5.0.*transformers' by up to"):
        _check_losses(checkpoint, losses(5.0, 5.0, transformers=2e-4), "bfloat16")
