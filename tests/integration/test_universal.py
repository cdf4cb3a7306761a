"""Universal checkpoints: ours are bit-exact and load in DeepSpeed, and DeepSpeed's own can be read."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.checkpoint.zero import FP32, MOMENTS, SavedState, ZeroCheckpoint, open_state
from codeparrot_ds.errors import CheckpointError, ConfigError
from codeparrot_ds.export.certificate import check
from codeparrot_ds.export.convert import convert
from codeparrot_ds.export.universal import to_universal
from codeparrot_ds.run.directory import Checkpoint
from tests.conftest import ROOT, RunRanks, Trained, save_recipe

pytestmark = pytest.mark.slow
GB = 1_000_000_000
PROBE = ROOT / "tests" / "integration" / "probe_universal.py"


@pytest.fixture(scope="module")
def universal(baseline: Trained, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Universal checkpoint of the newest checkpoint of `baseline`: ZeRO-3, two ranks."""
    return to_universal(source_checkpoint(baseline.run.path), tmp_path_factory.mktemp("universal") / "made", 8 * GB)


def assert_same(state: SavedState, expected: SavedState) -> None:
    assert (state.step, state.shapes, state.tied) == (expected.step, expected.shapes, expected.tied)
    for name in expected.shapes:
        for what in (FP32, *MOMENTS):
            assert torch.equal(state.read(name, what), expected.read(name, what)), (name, what)
    assert float(expected.read("transformer.wte.weight", "exp_avg_sq").max()) > 0


def test_it_is_complete_and_self_contained(baseline: Trained, universal: Checkpoint, tmp_path: Path) -> None:
    source = source_checkpoint(baseline.run.path)
    again = source_checkpoint(universal.path)
    assert again == universal
    again.verify()
    assert_same(open_state(again), ZeroCheckpoint(source))
    ours = convert([again], tmp_path / "ours", memory_cap_bytes=8 * GB)
    its = convert([source], tmp_path / "its", memory_cap_bytes=8 * GB)
    assert ours["tensors"] == its["tensors"]
    assert ours["engine"] == its["engine"]
    check(tmp_path / "ours")


@pytest.mark.parametrize(("ranks", "stage"), [(3, 1), (1, 2), (2, 3)])
def test_deepspeed_loads_every_bit(
    forked: RunRanks, universal: Checkpoint, tiny_recipe: dict[str, Any], tmp_path: Path, ranks: int, stage: int
) -> None:
    recipe = save_recipe(tiny_recipe, tmp_path / "recipe.yaml")
    config, out = ROOT / "ds_configs" / f"zero{stage}.json", tmp_path / "out"
    done = forked(PROBE, recipe, config, universal.path, out, ranks=ranks)
    assert done.returncode == 0, done.output
    assert_same(open_state(source_checkpoint(out)), open_state(universal))


def test_training_resumes_from_it(
    baseline: Trained, train_tiny: Callable[..., Trained], tiny_recipe: dict[str, Any]
) -> None:
    """At another stage and rank count, the remaining steps have the same losses."""
    place = Path(tiny_recipe["runs"]) / "moved" / "checkpoints" / "step-00000003"
    to_universal(Checkpoint.read(baseline.run.checkpoint(3)), place, 8 * GB)
    moved = train_tiny("moved", ranks=1, stage=1)
    assert moved.digests() == baseline.digests()[3:]
    for a, b in zip(moved.losses(), baseline.losses()[3:], strict=True):
        assert float.fromhex(a) == pytest.approx(float.fromhex(b), rel=1e-5)
    groups = open_state(source_checkpoint(moved.run.path)).hyperparameters()
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decayed", 0.1), ("plain", 0.0)]


@pytest.mark.parametrize("stage", [1, 3])
def test_the_output_of_deepspeeds_script_is_converted(
    train_tiny: Callable[..., Trained], copy_baseline: Callable[[str], Trained], tmp_path: Path, stage: int
) -> None:
    run = (copy_baseline("copied") if stage == 3 else train_tiny("stage1", stage=stage)).run
    source = source_checkpoint(run.path)
    made = run.checkpoints / f"{source.path.name}_universal"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    done = subprocess.run(
        [*command, "--input_folder", source.path, "--output_folder", made],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_same(open_state(source_checkpoint(made)), ZeroCheckpoint(source))
    certificate = convert([source_checkpoint(made)], tmp_path / "hf", memory_cap_bytes=8 * GB)
    assert certificate["tensors"] == convert([source], tmp_path / "its", memory_cap_bytes=8 * GB)["tensors"]
    assert certificate["source"][0]["step"] == source.step
    (made / "zero" / "transformer.ln_f.weight" / "fp32.pt").unlink()
    with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.weight/fp32\.pt.*incomplete"):
        convert([source_checkpoint(made)], tmp_path / "incomplete", memory_cap_bytes=8 * GB)


def test_what_is_wrong_is_named_and_nothing_is_left(
    baseline: Trained, universal: Checkpoint, copy_baseline: Callable[[str], Trained], tmp_path: Path
) -> None:
    source = source_checkpoint(baseline.run.path)
    with pytest.raises(ConfigError, match=r"--memory-cap 0\.05GB: this checkpoint needs \d\.\d\d GB"):
        to_universal(source, tmp_path / "out", 50_000_000)
    with pytest.raises(ConfigError, match="already exists"):
        to_universal(source, universal.path, 8 * GB)
    damaged = source_checkpoint(copy_baseline("damaged").run.path)
    file = sorted(damaged.path.glob("*_optim_states.pt"))[1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=file.name):
        to_universal(damaged, tmp_path / "out", 8 * GB)
    assert not (tmp_path / "out").exists()
