"""Optimizer and parameters on the CPU or on NVMe: saved state, and a resumed run equals an uninterrupted one."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.checkpoint.zero import MOMENTS, ZeroCheckpoint
from codeparrot_ds.errors import CheckpointError
from codeparrot_ds.export.convert import convert
from tests.conftest import LAUNCH_TIMEOUT, OPERATORS_TIMEOUT, ROOT, VOCAB_SIZE, RunRanks, Trained, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("operators"),
    pytest.mark.timeout(OPERATORS_TIMEOUT + LAUNCH_TIMEOUT),
]
Train = Callable[..., Trained]


def ds_config(kind: str, directory: Path) -> Path:
    """The shipped JSON, with groups small enough that a tiny model has several; "all_nvme": parameters as well."""
    shipped = kind.replace("all_nvme", "zero3_nvme")
    config = json.loads((ROOT / "ds_configs" / f"{shipped}.json").read_text())
    config["zero_optimization"]["sub_group_size"] = 300_000
    if kind == "all_nvme":
        places = {"device": "nvme", "nvme_path": "auto", "max_in_cpu": 0, "buffer_count": 8, "buffer_size": 300_000}
        config["zero_optimization"] |= {"offload_param": places, "stage3_param_persistence_threshold": 10_000}
    path = directory / f"{kind}.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def train_offloaded(forked: RunRanks, tiny_recipe: dict[str, Any], tmp_path: Path) -> Train:
    """Train a model large enough to be swapped: at least 262,144 parameters per group and rank."""

    def run(kind: str, name: str = "offloaded", *, ranks: int, options: tuple[str, ...] = ()) -> Trained:
        body = {**tiny_recipe, "name": name, "model": {**tiny_recipe["model"], "n_layer": 1, "n_embd": 256}}
        engine = (f"engine.deepspeed={ds_config(kind, tmp_path)}", f"engine.nvme={tmp_path / 'nvme'}")
        return train(forked, body, ranks=ranks, options=(*engine, *options))

    return run


@pytest.mark.parametrize(
    ("kind", "ranks", "options"),
    [
        ("zero3_offload", 1, ()),
        ("zero3_offload", 2, ("engine.precision=bf16",)),
        ("all_nvme", 1, ()),
        ("zero3_nvme", 2, ("engine.precision=bf16", "batch.micro_batch_size=1")),
    ],
)
def test_a_resumed_offloaded_run_equals_an_uninterrupted_one(
    train_offloaded: Train, tmp_path: Path, kind: str, ranks: int, options: tuple[str, ...]
) -> None:
    whole = train_offloaded(kind, ranks=ranks, options=options)
    assert abs(whole.valid_losses()[0] - math.log(VOCAB_SIZE)) < 0.3
    assert whole.valid_losses()[6] < whole.valid_losses()[0] - 0.3
    shutil.rmtree(whole.run.checkpoint(6))  # as if killed after its checkpoint at step 3
    resumed = train_offloaded(kind, ranks=ranks, options=options)
    assert "resuming from" in resumed.run.log(0).read_text()
    assert resumed.losses() == whole.losses()
    assert resumed.valid_losses() == whole.valid_losses()
    assert not list(tmp_path.glob("nvme/*.swap"))


def test_a_checkpoint_includes_and_verifies_state_on_nvme(train_offloaded: Train, tmp_path: Path) -> None:
    trained = train_offloaded("zero3_nvme", ranks=2)
    checkpoint = source_checkpoint(trained.run.path)
    swapped = {Path(name).parent.name for name in checkpoint.files if name.startswith("offloaded_tensors/")}
    assert swapped == {"rank00", "rank01"}
    assert {path.relative_to(checkpoint.path).as_posix() for path in checkpoint.path.rglob("*.*")} == {
        *checkpoint.files,
        "manifest.json",
    }

    certificate = convert([checkpoint], tmp_path / "hf", memory_cap_bytes=8_000_000_000)
    assert certificate["engine"]["not_compared"] is None
    assert abs(certificate["forward"]["loss_written"] - trained.valid_losses()[6]) < 1e-3

    file = next(iter((checkpoint.path / "offloaded_tensors" / "rank01").glob("exp_avg-*.swp")))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=file.name):
        checkpoint.verify()
    again = train_offloaded("zero3_nvme", ranks=2)
    assert "step-00000003" in again.run.log(0).read_text()
    assert again.losses() == trained.losses()


@pytest.mark.nightly
def test_offload_may_change_on_resume(train_offloaded: Train, tmp_path: Path) -> None:
    """From NVMe to the CPU, to the device and back, on other ranks: weights and moments stay bit-identical."""
    whole = train_offloaded("zero3_nvme", "whole", ranks=1, options=("schedule.name=constant", "schedule.steps=12"))
    moves = [("zero3_nvme", 1), ("zero3_offload", 2), ("zero3", 2), ("zero3_nvme", 2)]
    for number, (kind, ranks) in enumerate(moves, start=1):
        options = ("schedule.name=constant", f"schedule.steps={3 * number}", "checkpoints.keep_last=9")
        moved = train_offloaded(kind, "moved", ranks=ranks, options=options)
    assert moved.digests() == whole.digests()
    for a, b in zip(moved.losses(), whole.losses(), strict=True):
        assert math.isclose(float.fromhex(a), float.fromhex(b), rel_tol=1e-3)


def test_loading_into_nvme_and_saving_again_changes_no_bit(
    forked: RunRanks, train_offloaded: Train, tmp_path: Path
) -> None:
    trained = train_offloaded("zero3_offload", ranks=2, options=("schedule.steps=3",))
    before = ZeroCheckpoint(source_checkpoint(trained.run.path))
    probe, out = ROOT / "tests" / "integration" / "probe_reshard.py", tmp_path / "again"
    done = forked(probe, trained.run.recipe, ds_config("zero3_nvme", tmp_path), out, ranks=1)
    assert done.returncode == 0, done.output
    again = source_checkpoint(out)
    assert any(name.startswith("offloaded_tensors/rank00/exp_avg-") for name in again.files)
    after = ZeroCheckpoint(again)
    assert after.step == before.step == 3
    for name in before.shapes:
        for what in ("fp32", *MOMENTS):
            assert torch.equal(before.read(name, what), after.read(name, what)), (name, what)
