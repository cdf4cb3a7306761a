"""What happens to each recipe key on resume: every key has a rule, and docs/recipe.md is the table.

Write the table by `python -m tests.unit.test_recipe_rules > docs/recipe.md`.
"""

import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from codeparrot_ds.errors import CheckpointError
from codeparrot_ds.run.directory import Checkpoint
from codeparrot_ds.run.recipe import Recipe, load_recipe
from codeparrot_ds.system.typed_yaml import UserPath
from tests.conftest import ROOT, save_recipe

# Another valid value for each key. None: the only value there is.
OTHER: dict[str, Any] = {
    "name": "other",
    "seed": 2,
    "runs": "/elsewhere",
    "model.vocab_size": 513,
    "model.seq_len": 64,
    "model.n_layer": 3,
    "model.n_head": 4,
    "model.n_embd": 64,
    "model.dropout": 0.1,
    "model.scale_attn_by_inverse_layer_idx": False,
    "model.init_std": 0.05,
    "model.activation_checkpointing": "none",
    "model.init_from": "/a/model",
    "data.shards": "/elsewhere/shards",
    "batch.global_batch_size": 8,
    "batch.micro_batch_size": 1,
    "optimizer.name": None,
    "optimizer.learning_rate": 0.02,
    "optimizer.betas": [0.9, 0.95],
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.0,
    "optimizer.gradient_clipping": 0.5,
    "schedule.name": "linear",
    "schedule.steps": 7,
    "schedule.tokens": None,  # converted to steps
    "schedule.warmup_steps": 2,
    "schedule.warmup_tokens": None,
    "schedule.decay_steps": None,  # with name: wsd only
    "schedule.decay_tokens": None,
    "schedule.min_ratio": 0.1,
    "engine.deepspeed": None,  # its content is compared
    "engine.precision": "bf16",
    "engine.float32_matmul_precision": "medium",
    "engine.nvme": "/nvme",
    "engine.loss_chunk_tokens": 50,
    "engine.compile": True,
    "engine.allow_untested": ["comms_logger"],
    "evaluation.every_steps": 1,
    "evaluation.sequences": 3,
    "evaluation.samples": 1,
    "evaluation.sample_tokens": 2,
    "evaluation.humaneval": 1,
    "checkpoints.every_steps": 1,
    "checkpoints.every_minutes": 5.0,
    "checkpoints.keep_last": 1,
    "checkpoints.keep_every_steps": 4,
    "checkpoints.background": False,
    "checkpoints.shared_disk": False,
    "export.every_steps": 3,
    "export.dtype": "float32",
    "export.sequences": 0,
    "export.keep_last": 1,
    "export.hub": "a/b",
    "export.private": False,
    "guards.hang_seconds": None,
    "guards.max_skipped_steps": 3,
    "guards.spike": "stop",
    "guards.spike_threshold": 9.0,
    "guards.replica_check_steps": 1,
    "logging.every_steps": 1,
    "logging.tensorboard": True,
    "logging.wandb": True,
    "logging.peak_tflops": 0.001,
}
_WIDTH = 120  # of a line in docs/
_VALUES = (
    "A value is read by the type of its key, in a file as in `--set KEY=VALUE`: `name: 2026-11-24` is text, `0100` is "
    "100, `26e9` a whole number, and `on`, `yes` and `true` are the same where a key is true or false. A key given "
    "twice is an error. Relative paths are relative to the working directory, and `~` is the home directory. "
    "`recipe.yaml` in a run directory is always the recipe of that directory: a copied or moved run trains where it is."
)
_ON_RESUME = (
    "On resume a changed key either applies from the next step on, with any number of ranks, or is refused by name: a "
    "run with another value needs another `name`. Changes are logged, and recorded in `recipe_changes.jsonl` in the "
    "run directory. `recipe.yaml` there states the settings of the steps that ran last. A directory named by "
    "`data.shards` may move; its content and its weight may not change."
)
_DEEPSPEED = (
    "A DeepSpeed JSON may hold these keys, each of which is tested with this package. Any other is refused with the "
    "reason. `engine.allow_untested: [KEY, ...]` in the recipe accepts one (or a section without tested keys) at your "
    "own risk: it is logged at the start and stored with the recipe. Keys that other recipe keys set, or that would "
    "make checkpoints or gradients wrong, are refused in any case. On resume a changed key applies."
)
_SAME = {"optimizer.name", "engine.deepspeed", *(f"schedule.{name}" for name in ("tokens", "warmup_tokens"))}
_SAME |= {"schedule.decay_steps", "schedule.decay_tokens"}


def keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Each recipe key with the values it may have, its default and its description."""
    described, hints = descriptions(section), typing.get_type_hints(section, include_extras=True)
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else f"`{json.dumps(default, default=str)}`"
        yield f"{prefix}{name}", values(hints[name], tuple(field.metadata)), shown, described[name]


def values(hint: Any, bounds: tuple[Any, ...] = ()) -> str:
    """The values of a type, e.g. "integer > 0"."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if hint is UserPath:
        return "path"
    if origin is Annotated:
        return values(members[0], (*_bounds(members[1:]), *bounds))
    if origin is Literal:
        return ", ".join(f"`{member}`" for member in members)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("`null`" if member is type(None) else values(member, bounds) for member in members)
    if origin is dict:
        return f"{{{values(members[0])}: {values(members[1])}, ...}}"
    if origin is tuple:
        return "list of texts" if members[-1] is ... else f"[{', '.join(map(values, members))}]"
    name = {int: "integer", float: "number", bool: "`true`, `false`", str: "text", Path: "path"}[hint]
    return name + ",".join(dict.fromkeys(_bound(each) for each in bounds if _bound(each)))


def _bounds(metadata: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(itertools.chain.from_iterable(getattr(each, "metadata", (each,)) for each in metadata))


def _bound(constraint: Any) -> str:
    for name, sign in {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}.items():
        if (limit := getattr(constraint, name, None)) is not None:
            return f" {sign} {limit:g}"
    return ""


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """Description of each key of a section, from its docstring."""
    found: dict[str, str] = {}
    text = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")[2]
    for entry in re.split(r"\n(?=    \S)", text):
        names, _, description = entry.strip().partition(": ")
        found |= dict.fromkeys(names.split(", "), " ".join(description.split()))
    return found


def table() -> str:
    """docs/recipe.md."""
    from codeparrot_ds.run.changes import APPLIES, ON_RESUME
    from codeparrot_ds.run.ds_keys import REFUSED, TESTED, UNTESTED

    rules = {key: "applies" if rule == APPLIES else "**refused**" for key, rule in ON_RESUME.items()}
    lines = [
        "# Recipe keys",
        "",
        "Generated from the code by `python -m tests.unit.test_recipe_rules > docs/recipe.md`; a test compares them.",
        "",
        textwrap.fill(_ON_RESUME, _WIDTH),
        "",
        textwrap.fill(_VALUES, _WIDTH),
    ]
    for section, rows in itertools.groupby(keys(), lambda row: row[0].rpartition(".")[0]):
        kind = Recipe.model_fields[section].annotation if section else None
        about = inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes:")[0] if kind else "The run as a whole."
        lines += ["", f"## {section or 'name, seed, runs'}", "", *textwrap.wrap(about.replace("\n\n", " "), _WIDTH), ""]
        lines += ["| key | values | default | on resume | |", "|---|---|---|---|---|"]
        lines += [f"| `{key}` | {kinds} | {default} | {rules[key]} | {text} |" for key, kinds, default, text in rows]
    lines += [
        "",
        "## DeepSpeed JSON",
        "",
        textwrap.fill(_DEEPSPEED, _WIDTH),
        "",
        "| key | values |",
        "|---|---|",
        *(f"| `{key}` | {each.text.replace(chr(39), '`')} |" for key, each in TESTED.items()),
        "",
        "### Refused",
        "",
        *by_reason(REFUSED),
        "",
        "### Not tested",
        "",
        *by_reason(UNTESTED),
    ]
    return "\n".join(lines) + "\n"


def by_reason(reasons: dict[str, str]) -> Iterator[str]:
    """A table of the keys that share a reason."""
    yield from ("| keys | why |", "|---|---|")
    for reason in dict.fromkeys(reasons.values()):
        yield f"| {', '.join(f'`{key}`' for key, why in reasons.items() if why == reason)} | {reason} |"


def with_other(body: dict[str, Any], key: str) -> dict[str, Any]:
    """The recipe with another value for one key."""
    body = json.loads(json.dumps(body))
    *sections, last = key.split(".")
    target = body
    for section in sections:
        target = target.setdefault(section, {})
    target[last] = OTHER[key]
    return body


def test_every_key_has_a_rule_and_the_table_is_current() -> None:
    from codeparrot_ds.run.changes import ON_RESUME

    assert [key for key, *_ in keys()] == list(ON_RESUME) == list(OTHER)
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == table()


@pytest.mark.parametrize("key", OTHER)
def test_a_changed_key_is_refused_or_recorded(tiny_recipe: dict[str, Any], tmp_path: Path, key: str) -> None:
    from codeparrot_ds.run.changes import FIXED, ON_RESUME, changes, settings
    from codeparrot_ds.training.checkpoint import check_identity

    def load(body: dict[str, Any]) -> Recipe:
        return load_recipe(save_recipe(body, tmp_path / "r.yaml")).resolved(tmp_path / "ds.json")

    if key == "evaluation.humaneval":
        tiny_recipe["export"] = {"every_steps": 3}  # what it scores
    old, new = load(tiny_recipe), load(tiny_recipe if key in _SAME else with_other(tiny_recipe, key))
    before, after = (settings(recipe.model_dump(mode="json"), {}) for recipe in (old, new))
    changed = changes(before, after)
    assert set(changed) == (set() if key in _SAME else {key})
    of_digest = {"digest of data.shards"} if key == "data.shards" else set[str]()
    refused = {key} if ON_RESUME[key] == FIXED and key not in _SAME and not of_digest else of_digest
    checkpoint = SimpleNamespace(path=tmp_path, identity=json.loads(json.dumps(old.identity("a"))))
    try:
        check_identity(checkpoint, new.identity("b" if of_digest else "a"), before)  # type: ignore[arg-type]
        assert not refused
    except CheckpointError as error:
        assert refused and f"{refused.pop()}: saved with " in str(error)


def test_a_manifest_of_an_older_version_is_compared_by_what_it_has(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    from codeparrot_ds.training.checkpoint import check_identity

    model = {key: value for key, value in tiny_recipe["model"].items() if key != "activation_checkpointing"}
    model |= {"dropout": 0.0, "scale_attn_by_inverse_layer_idx": True}
    identity = {"model": model, "seed": 1, "batch.global_batch_size": 4, "digest of data.shards": "a"}
    old: Any = SimpleNamespace(path=tmp_path, identity=identity)
    check_identity(old, Recipe.model_validate(tiny_recipe).identity("a"), {})
    check_identity(old, Recipe.model_validate(with_other(tiny_recipe, "model.init_from")).identity("a"), {})
    with pytest.raises(CheckpointError, match=r"model\.init_from: saved with None, now /a/model"):
        wanted = Recipe.model_validate(with_other(tiny_recipe, "model.init_from")).identity("a")
        check_identity(old, wanted, {"model.init_from": None})
    for key in ("model.n_layer", "seed", "batch.global_batch_size"):
        with pytest.raises(CheckpointError, match=f"{key}: saved with"):
            check_identity(old, Recipe.model_validate(with_other(tiny_recipe, key)).identity("a"), {})
    with pytest.raises(CheckpointError, match=r"digest of data\.shards: saved with a, now b"):
        check_identity(old, Recipe.model_validate(tiny_recipe).identity("b"), {})


def test_a_manifest_without_settings_is_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, 1, 4, 10, 1, 2, "fp32", {}, {}, None)
    checkpoint.write(tmp_path)
    body = json.loads((tmp_path / "manifest.json").read_text())
    assert body.pop("settings") is None
    (tmp_path / "manifest.json").write_text(json.dumps(body))
    assert Checkpoint.read(tmp_path).settings is None


def test_changes_tell_types_and_absent_keys_apart() -> None:
    from codeparrot_ds.run.changes import changes, describe

    old = {"a": 1, "b": None, "only_old": 3, "ds_config.x": 1, "ds_config.train_batch_size": 4}
    new = {"a": True, "b": 0, "only_new": 4, "ds_config.y": False, "ds_config.train_batch_size": 8}
    changed = changes(old, new)
    assert changed == {"a": (1, True), "b": (None, 0), "ds_config.x": (1, None), "ds_config.y": (None, False)}
    assert describe(changed) == "a 1 -> true; b null -> 0; ds_config.x 1 -> null; ds_config.y null -> false"


def test_a_resumed_loss_scale_has_its_own_settings() -> None:
    """The state of the search goes on; window, minimum and hysteresis are those of the new configuration."""
    from codeparrot_ds.training.engine import continue_loss_scale

    def dynamic(scale: float, minimum: float, shift: int, window: int) -> Any:
        return DynamicLossScaler(scale, window, minimum, shift, False)

    saved = dynamic(2.0**16, 1, 4, 1000)
    saved.cur_scale, saved.cur_iter, saved.last_overflow_iter, saved.cur_hysteresis = 8.0, 50, 40, 3
    scaler = dynamic(2.0**20, 32, 2, 7)
    continue_loss_scale(scaler, saved)
    assert (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis) == (32.0, 50, 40, 2)
    assert (scaler.min_scale, scaler.scale_window, scaler.delayed_shift) == (32, 7, 2)

    constant = LossScaler(128.0)
    continue_loss_scale(constant, saved)
    assert constant.loss_scale == 128.0
    fresh = dynamic(2.0**20, 1, 2, 7)
    continue_loss_scale(fresh, LossScaler(64.0))
    assert fresh.cur_scale == 2.0**20


if __name__ == "__main__":
    print(table(), end="")
