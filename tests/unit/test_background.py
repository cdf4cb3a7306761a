"""Exports during training: what is called, in which order, and what is made up for after an interruption."""

from pathlib import Path
from typing import Any

import pytest

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.export.background import BackgroundExport
from codeparrot_ds.export.certificate import CERTIFICATE
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.system.files import write_json

SCORES = {"problems": {"HumanEval/0": {"passed": 2}}, "pass_at_k": {"pass@1": {"value": 0.5}}}


class Recorded(BackgroundExport):
    """Records the commands, and makes what they would."""

    def __init__(self, run: RunDirectory, recipe: Recipe, fails: str = "") -> None:
        super().__init__(run, recipe)
        self.run, self.fails, self.commands = run, fails, list[list[str]]()

    def _call(self, step: int, done: str, arguments: list[str]) -> bool:
        self.commands.append(arguments)
        if arguments[0] == self.fails:
            return False
        if arguments[0] == "convert":
            Path(arguments[2]).mkdir(parents=True)
            (Path(arguments[2]) / CERTIFICATE).touch()
        if arguments[0] == "evaluate":
            self.run.humaneval(step).mkdir(parents=True)
            write_json(self.run.humaneval(step) / "results.json", {"temperatures": {"0.2": {"scores": SCORES}}})
        return True

    def after(self, step: int) -> list[list[str]]:
        """The commands for the checkpoint of a step."""
        self.commands = []
        self.start(step)
        self.finish(wait=True)
        return self.commands


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any]) -> Recipe:
    tiny_recipe["export"] = {"every_steps": 3}
    tiny_recipe["evaluation"]["humaneval"] = 4
    tiny_recipe["logging"]["tensorboard"] = True
    return Recipe.model_validate(tiny_recipe)


def test_an_export_is_scored_once_and_after_an_interruption(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path)
    export = Recorded(run, recipe, fails="evaluate")
    assert [command[0] for command in export.after(3)] == ["convert", "evaluate"]
    assert export.after(4) == []
    export.fails = ""
    with caplog.at_level("INFO", "codeparrot_ds"):
        (command,) = export.after(3)
    assert command[:3] == ["evaluate", "humaneval", str(run.export(3))]
    assert command[3:] == [
        *("-n", "4", "--temperature", "0.2", "-o", str(run.humaneval(3))),
        *("--tensorboard", str(run.tensorboard / "humaneval"), "--step", "3"),
    ]
    assert "step 3: HumanEval pass@1 50.00 %, 1 of 164 problems passed" in caplog.text
    assert export.after(3) == []
    export.fails = "convert"
    assert [command[0] for command in export.after(6)] == ["convert"]


def test_scores_need_exports(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["evaluation"]["humaneval"] = 1
    with pytest.raises(ValueError, match=r"evaluation.humaneval scores exports, but export.every_steps is null"):
        Recipe.model_validate(tiny_recipe)


def test_what_scoring_needs_is_checked_before_training(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from codeparrot_ds.evaluation.sandbox.bubble import bubblewrap_version
    from codeparrot_ds.train import _check_humaneval

    bubblewrap_version.cache_clear()  # filled by other tests
    monkeypatch.setenv("PATH", "/nowhere")
    checked: Any = SimpleNamespace(recipe=recipe)
    with pytest.raises(ConfigError, match="needs bubblewrap"):
        _check_humaneval(checked, SimpleNamespace(rank=0))  # type: ignore[arg-type]
    _check_humaneval(checked, SimpleNamespace(rank=1))  # type: ignore[arg-type]
