"""Recipes and DeepSpeed JSON that come with the package are found by name, in any directory."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from codeparrot_ds.cli import app
from codeparrot_ds.errors import ConfigError
from codeparrot_ds.hosts.hostfile import read_hostfile
from codeparrot_ds.planning.plan import Choice
from codeparrot_ds.run.ds_config import load_ds_config
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.run.shipped import DS_CONFIGS, RECIPES, find_ds_config, find_recipe, name_of_ds_config
from tests.conftest import ROOT, save_recipe


def test_names_are_those_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for directory, mine in ((ROOT / "launch" / "recipes", find_recipe), (ROOT / "ds_configs", find_ds_config)):
        for file in directory.iterdir():
            assert mine(Path(file.stem)).read_bytes() == file.read_bytes()
    for file in RECIPES.glob("*.yaml"):  # whose DeepSpeed JSON is found, too
        assert load_ds_config(load_recipe(Path(file.stem)).engine.deepspeed)
    assert find_ds_config(Path("ds_configs/zero1.json")) == DS_CONFIGS / "zero1.json"
    for unknown in ("zero9", "ds_configs/zero9.json", "other/zero1.json", "zero1.json"):
        assert find_ds_config(Path(unknown)) == Path(unknown)


def test_a_file_of_the_user_comes_first(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_recipe(tiny_recipe, tmp_path / "quickstart")
    assert load_recipe(Path("quickstart")).name == "tiny"
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero1.json").write_text("{}", encoding="utf-8")
    assert find_ds_config(Path("ds_configs/zero1.json")) == Path("ds_configs/zero1.json")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="These come with the package: codeparrot-small, codeparrot-xl, quickstart"):
        load_recipe(Path("codeparrot-tiny"))
    with pytest.raises(ConfigError, match=r"These come with the package: .*zero1, .*zero3"):
        load_ds_config(Path("zero9"))


def test_init_writes_a_recipe_and_a_hostfile(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["init", str(tmp_path / "new")])
    assert done.exit_code == 0 and str(tmp_path / "new" / "recipe.yaml") in done.output
    assert load_recipe(tmp_path / "new" / "recipe.yaml") == load_recipe(Path("codeparrot-small"))
    assert "#" in (tmp_path / "new" / "recipe.yaml").read_text(encoding="utf-8")
    assert read_hostfile(tmp_path / "new" / "hostfile")
    (tmp_path / "new" / "recipe.yaml").write_text("mine", encoding="utf-8")
    other = CliRunner().invoke(app, ["init", str(tmp_path / "other"), "--recipe", "quickstart"])
    assert other.exit_code == 0
    assert load_recipe(tmp_path / "other" / "recipe.yaml") == load_recipe(Path("quickstart"))
    unknown = CliRunner().invoke(app, ["init", str(tmp_path / "third"), "--recipe", "../quickstart"])
    assert "choose codeparrot-small, codeparrot-xl, quickstart" in str(unknown.exception)
    assert not (tmp_path / "third").exists()
    refused = CliRunner().invoke(app, ["init", str(tmp_path / "new")])
    assert "already exists" in str(refused.exception)
    assert (tmp_path / "new" / "recipe.yaml").read_text(encoding="utf-8") == "mine"


def test_a_plan_names_a_deepspeed_json_as_a_user_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    choice = Choice(DS_CONFIGS / "zero3_offload.json", "full", 2)
    assert choice.overrides()[0] == "engine.deepspeed=zero3_offload"
    (tmp_path / "mine.json").write_text("{}", encoding="utf-8")
    assert name_of_ds_config(tmp_path / "mine.json") == tmp_path / "mine.json"
    (tmp_path / "zero3_offload").write_text("{}", encoding="utf-8")  # the name would find this one
    assert name_of_ds_config(DS_CONFIGS / "zero3_offload.json") == DS_CONFIGS / "zero3_offload.json"
