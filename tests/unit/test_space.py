"""Space for checkpoints: the doctor requires the same as training."""

from fractions import Fraction
from pathlib import Path

import pytest

from codeparrot_ds.doctor.examine import disk_needs
from codeparrot_ds.run.ds_config import load_ds_config
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.run.space import checkpoint_room_bytes, checkpoints_to_come
from tests.conftest import ROOT

XL = ROOT / "launch" / "recipes" / "codeparrot-xl.yaml"
# fp32 weights and two moments of 1,529.6 M parameters; 8 % more.
CHECKPOINT_BYTES = 1.08 * 12 * 1_529.6e6


def test_there_is_room_for_one_checkpoint_more_than_are_kept() -> None:
    recipe = load_recipe(XL)  # keeps three of 50
    assert [checkpoints_to_come(recipe, 1000 * done, min(done, 3)) for done in (0, 1, 2, 3, 40)] == [4, 3, 2, 1, 1]
    assert checkpoints_to_come(load_recipe(XL, ["schedule.steps=2000"]), 0, 0) == 2
    assert checkpoints_to_come(load_recipe(XL, ["schedule.steps=2000", "checkpoints.every_minutes=9"]), 0, 0) == 4


def test_a_disk_has_what_its_ranks_write() -> None:
    recipe = load_recipe(XL)
    parameters = recipe.model.parameters
    whole = checkpoint_room_bytes(recipe, 3, parameters, 4)
    assert whole == pytest.approx(4 * CHECKPOINT_BYTES, rel=1e-3)
    assert checkpoint_room_bytes(recipe, 3, parameters, 4, Fraction(1, 4), False) == pytest.approx(whole / 4)
    # Below ZeRO-3 the bf16 weights are in a file of rank 0.
    first = checkpoint_room_bytes(recipe, 1, parameters, 1, Fraction(1, 2))
    other = checkpoint_room_bytes(recipe, 1, parameters, 1, Fraction(1, 2), False)
    assert first - other == pytest.approx(1.08 * 2 * parameters, rel=1e-6)


def test_the_doctor_asks_for_as_much(tmp_path: Path) -> None:
    slots = {"a": 8, "b": 8}
    for shared, hosts in ((True, 1), (False, 2)):
        recipe = load_recipe(XL, [f"runs={tmp_path}", f"checkpoints.shared_disk={shared}"])
        needs = disk_needs(recipe, load_ds_config(recipe.engine.deepspeed), slots)
        assert needs == {"runs": pytest.approx(4 * CHECKPOINT_BYTES / hosts, rel=1e-3), "swap": 0}
