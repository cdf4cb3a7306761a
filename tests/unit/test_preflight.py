"""Checks before training: on the disks that will hold the files, whatever links lead there."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.training.preflight import check, check_space, scarce_data
from tests.conftest import save_recipe


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    """The tiny recipe, with exports."""
    tiny_recipe["export"] = {"every_steps": 3}
    return save_recipe(tiny_recipe, tmp_path / "r.yaml")


@pytest.mark.parametrize("name", ["checkpoints", "exports"])
def test_space_is_checked_where_a_link_leads(
    name: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, full = tmp_path / "runs" / "tiny", tmp_path / "full"
    for directory in (run, full):
        directory.mkdir(parents=True)
    (run / name).symlink_to(full)
    checked = check(recipe, (), 1)
    ranks: Any = SimpleNamespace(is_fs_leader=True, shares_disk=lambda rank: True, world_size=1, local_rank=0)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=0 if Path(path).resolve() == full else 10**15)
    )
    monkeypatch.setattr("codeparrot_ds.training.preflight.disk_of", lambda path: int(path.resolve() == full))
    with pytest.raises(ConfigError, match=f"{name}: .*needs about"):
        check_space(checked, ranks, 10**9, 0)


@pytest.mark.parametrize("name", ["checkpoints", "exports", "logs", ""])
def test_permission_is_checked_where_a_link_leads(name: str, recipe: Path, tmp_path: Path) -> None:
    link = tmp_path / "runs" / "tiny" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("/proc")
    with pytest.raises(ConfigError, match=f"{link}: cannot write here"):
        check(recipe, (), 1)
    link.unlink()
    link.symlink_to(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match=f"a link to {tmp_path}/unmounted, which does not exist"):
        check(recipe, (), 1)


def test_too_little_data_for_a_step_is_a_warning(recipe: Path) -> None:
    """The tiny recipe reads 4 sequences a step."""

    def warning(sequences: int) -> str:
        data: Any = SimpleNamespace(train=range(sequences))
        return scarce_data(data, load_recipe(recipe))

    assert warning(4) == ""
    assert warning(3).startswith("3 training sequences are fewer than the 4 of one step")
    assert warning(1).startswith("1 training sequence is fewer than the 4")
