"""Recipes: a run as one validated YAML file plus dotted overrides (`--set optimizer.learning_rate=1e-4`).

A recipe defines the run; the DeepSpeed JSON that it names configures the engine. Unknown keys are rejected, and all
problems are reported together.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import to_jsonable_python

from codeparrot_ds.errors import ConfigError, list_problems
from codeparrot_ds.run.changes import FIXED, ON_RESUME, flatten
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.sections import (
    Batch,
    Checkpoints,
    Data,
    Engine,
    Evaluation,
    Export,
    Guards,
    Logging,
    Model,
    Optimizer,
    Schedule,
)
from codeparrot_ds.run.shipped import RECIPES, find_ds_config, find_recipe, names
from codeparrot_ds.system.paths import expand_user, path_of, text_of
from codeparrot_ds.system.typed_yaml import Section, Text, UserPath, explain, parse_override, parse_yaml

PATHS = ("runs", "model.init_from", "data.shards", "engine.deepspeed", "engine.nvme")  # keys that hold paths
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of a run


class Recipe(Section):
    """The complete definition of a run.

    Attributes:
        name: of the run; its directory is `runs`/`name`. Letters, digits, `.`, `_` and `-`.
        seed: of weight initialization, data order and dropout.
        runs: directory that contains all runs.
    """

    name: str = Field(pattern=NAME)
    seed: int = Field(1, ge=0)
    runs: UserPath = Path("runs")
    model: Model
    data: Data
    batch: Batch
    optimizer: Optimizer
    schedule: Schedule
    engine: Engine
    evaluation: Evaluation = Evaluation.model_validate({})
    checkpoints: Checkpoints = Checkpoints.model_validate({})
    export: Export = Export.model_validate({})
    guards: Guards = Guards.model_validate({})
    logging: Logging = Logging.model_validate({})

    @model_validator(mode="wrap")
    @classmethod
    def _with_schedule_in_steps(cls, body: Any, validate: ModelWrapValidatorHandler["Recipe"]) -> "Recipe":
        recipe = validate(body)
        tokens_per_step = recipe.batch.global_batch_size * recipe.model.seq_len
        return recipe.model_copy(update={"schedule": recipe.schedule.in_steps(tokens_per_step)})

    @model_validator(mode="after")
    def _exports_are_checkpoints(self) -> "Recipe":
        every, saved = self.export.every_steps, self.checkpoints.every_steps
        if every is not None and every % saved:
            raise ValueError(f"export.every_steps {every} is not a multiple of checkpoints.every_steps {saved}")
        if every is not None and not self.checkpoints.shared_disk:
            raise ValueError(
                "export.every_steps needs all files of a checkpoint on one disk, but checkpoints.shared_disk is false: "
                "run `codeparrot-ds convert --hostfile` after training instead"
            )
        if every is None and self.evaluation.humaneval:
            raise ValueError("evaluation.humaneval scores exports, but export.every_steps is null: set it")
        return self

    @property
    def run_directory(self) -> Path:
        """Directory of all files of this run."""
        return self.runs / self.name

    @property
    def swap_directory(self) -> Path | None:
        """Directory on each host for data offloaded to NVMe; None if the recipe does not set `engine.nvme`."""
        return None if self.engine.nvme is None else self.engine.nvme.absolute() / f"{self.name}.swap"

    def identity(self, shards_digest: str) -> dict[str, Any]:
        """Settings that must not change when a run resumes from a checkpoint, by their user-facing names."""
        flat = flatten(self._with_absolute_paths().model_dump(mode="json"))
        fixed = {key: flat[key] for key, rule in ON_RESUME.items() if rule == FIXED and key != "data.shards"}
        return {**fixed, "digest of data.shards": shards_digest}

    def to_yaml(self) -> str:
        """The recipe as YAML, including all defaults."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def resolved(self, ds_config: Path) -> "Recipe":
        """This recipe with absolute paths and the resolved DeepSpeed JSON `ds_config`, valid in any directory."""
        recipe = self._with_absolute_paths()
        return recipe.model_copy(
            update={"engine": recipe.engine.model_copy(update={"deepspeed": ds_config.resolve()})},
        )

    def _with_absolute_paths(self) -> "Recipe":
        init_from = self.model.init_from
        return self.model_copy(
            update={
                "runs": self.runs.resolve(),
                "model": self.model.model_copy(
                    update={"init_from": None if init_from is None else init_from.absolute()}
                ),
                "data": Data(
                    shards={path.resolve(): weight for path, weight in self.data.shards.items()}
                    if isinstance(self.data.shards, dict)
                    else self.data.shards.resolve()
                ),
                "engine": self.engine.model_copy(
                    update={"nvme": None if self.engine.nvme is None else self.engine.nvme.absolute()}
                ),
            }
        )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: YAML file, or the name of a recipe that comes with the package.
        overrides: items of the form "dotted.key=value" with a YAML value; they take precedence over the file.

    Raises:
        ConfigError: lists every unknown key and every invalid value.
    """
    body = read_recipe(path, overrides)
    try:
        return Recipe.model_validate(body)
    except ValidationError as error:
        raise ConfigError(list_problems(str(path), explain(error, body))) from None


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe and apply overrides, without validation: each value is a `Text`, a list or a mapping.

    A recipe that is stored in a run directory is that of this directory, wherever it was when it was written.

    Raises ConfigError: not a mapping, a key appears twice, or an override is not one.
    """
    path = find_recipe(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe. These come with the package: {names(RECIPES)}.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    body = parse_yaml(data, str(path))
    if not isinstance(body, dict):
        raise ConfigError(f"{path}: a recipe must be a mapping of sections (model, data, batch, …).")
    _bind_to_directory(body, path)
    given: dict[str, str] = {}
    for override in map(text_of, overrides):
        key = override.partition("=")[0]
        if key in given:
            raise ConfigError(f"--set {override}: {key} is set twice, also by {given[key]}. Remove one.")
        given[key] = override
        _override(body, override)
    return body


def _bind_to_directory(body: dict[str, Any], path: Path) -> None:
    """Make the paths of a stored recipe those of the directory that it is in, which may have been moved or copied."""
    run, engine = RunDirectory(path.absolute().parent), body.get("engine")
    if path.name != run.recipe.name or not run.ds_config.is_file() or not isinstance(engine, dict):
        return
    if Path(str(engine.get("deepspeed"))).name != run.ds_config.name:
        return
    engine["deepspeed"] = Text(str(run.ds_config))
    if run.status_file.is_file():  # not a universal checkpoint, which holds the recipe of its run
        body["runs"] = Text(str(run.path.parent))
        if re.fullmatch(NAME, run.path.name):
            body["name"] = Text(run.path.name)


def make_paths_absolute(body: dict[str, Any]) -> None:
    """Make the paths in the result of `read_recipe` absolute, for a recipe that is to be written."""

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {absolute(key): each for key, each in value.items()}
        if not isinstance(value, Text) or value.is_null:
            return value
        return Text(str(expand_user(Path(value)).absolute()))

    for key in PATHS:
        *sections, last = key.split(".")
        target: Any = body
        for section in sections:
            target = target.get(section) if isinstance(target, dict) else None
        if isinstance(target, dict) and last in target:
            if key == "engine.deepspeed":
                target[last] = Text(str(find_ds_config(path_of(target[last]))))
            target[last] = absolute(target[last])


def _override(body: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: must have the form section.key=value, e.g. schedule.steps=100.")
    *sections, last = key.split(".")
    target = body
    for section in sections:
        inner = target.get(section)
        if inner is None or (isinstance(inner, Text) and inner.is_null):
            inner = target[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section.")
        target = inner
    try:
        target[last] = parse_override(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: {value!r} is not a valid YAML value.") from None


def default_settings() -> dict[str, Any]:
    """The default of each key that has one, by dotted key, as in a stored recipe."""
    found: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, Section)):
            found |= {} if field.is_required() else {name: field.get_default()}
            continue
        for key, inner in section.model_fields.items():
            if not inner.is_required():
                found[f"{name}.{key}"] = inner.get_default(call_default_factory=True)
    return {key: to_jsonable_python(value) for key, value in found.items()}
