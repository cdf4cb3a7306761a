"""Recipes and DeepSpeed JSON: shipped ones are valid, and errors are named."""

import itertools
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.run.ds_config import load_ds_config, required_ops, resolve
from codeparrot_ds.run.recipe import Recipe, load_recipe
from codeparrot_ds.run.sections import Schedule
from codeparrot_ds.training.preflight import check_compiler
from tests.conftest import ROOT, save_recipe

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def test_the_recipes_and_configurations_that_ship() -> None:
    assert {"codeparrot-small", "codeparrot-xl", "quickstart"} <= {path.stem for path in RECIPES}
    assert {"zero1", "zero2", "zero3"} <= {path.stem for path in DS_CONFIGS}


@pytest.mark.parametrize(("recipe", "ds_config"), list(itertools.product(RECIPES, DS_CONFIGS)), ids=lambda p: p.stem)
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_every_recipe_resolves_with_every_configuration(recipe: Path, ds_config: Path, world_size: int) -> None:
    loaded = load_recipe(recipe, ["engine.nvme=/local/nvme"])
    resolved = resolve(load_ds_config(ds_config), loaded, world_size)
    assert "auto" not in json.dumps(resolved)
    assert resolved["data_types"]["grad_accum_dtype"] == "fp32"
    per_step = resolved["train_micro_batch_size_per_gpu"] * resolved["gradient_accumulation_steps"] * world_size
    assert per_step == resolved["train_batch_size"] == loaded.batch.global_batch_size
    stage, _, offload = ds_config.stem.removeprefix("zero").partition("_")
    assert resolved["zero_optimization"]["stage"] == int(stage)
    assert (resolved["bf16"]["enabled"], resolved["fp16"]["enabled"]) == (loaded.engine.precision == "bf16", False)
    ops = {"": [], "offload": ["cpu_adam"], "nvme": ["cpu_adam", "async_io"]}
    assert required_ops(resolved) == ops[offload]


def test_nvme_offload_without_a_directory_is_refused() -> None:
    loaded = load_recipe(ROOT / "launch" / "recipes" / "codeparrot-xl.yaml")
    with pytest.raises(ConfigError, match=r"nvme_path: set engine\.nvme in the recipe"):
        resolve(load_ds_config(ROOT / "ds_configs" / "zero3_nvme.json"), loaded, 1)


@pytest.mark.parametrize(
    ("name", "millions", "global_batch", "learning_rate", "warmup", "steps"),
    [("codeparrot-small", 111.0, 192, 5e-4, 2000, 150_000), ("codeparrot-xl", 1529.6, 512, 2e-4, 750, 50_000)],
)
def test_full_size_recipes_have_the_published_figures(
    name: str, millions: float, global_batch: int, learning_rate: float, warmup: int, steps: int
) -> None:
    recipe = load_recipe(ROOT / "launch" / "recipes" / f"{name}.yaml")
    with torch.device("meta"):
        network = GPT2LMHeadModel(GPT2Config(**recipe.model.hugging_face_config(eos_id=0)))
    assert round(network.num_parameters() / 1e6, 1) == millions
    assert recipe.batch.global_batch_size == global_batch
    assert recipe.optimizer.learning_rate == learning_rate
    assert (recipe.schedule.warmup_steps, recipe.schedule.steps) == (warmup, steps)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.gradient_clipping, recipe.seed) == (0.1, 1.0, 1)
    assert recipe.model.scale_attn_by_inverse_layer_idx
    assert recipe.model.seq_len == 1024
    assert recipe.batch.micro_batch_and_accumulation(16) == ((12, 1) if name == "codeparrot-small" else (2, 16))


def test_all_problems_are_reported_at_once(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    tiny_recipe["modle"] = {}
    tiny_recipe["model"]["n_head"] = 3
    tiny_recipe["batch"]["micro_batch_size"] = "many"
    del tiny_recipe["optimizer"]["learning_rate"]
    with pytest.raises(ConfigError) as caught:
        load_recipe(save_recipe(tiny_recipe, tmp_path / "r.yaml"))
    message = str(caught.value)
    for expected in (
        "4 problems",
        "modle: unknown key",
        "n_embd 32 is not a multiple of n_head 3",
        "optimizer.learning_rate: missing",
        "batch.micro_batch_size: ",
    ):
        assert expected in message


def test_an_unknown_key_is_named_in_full(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    tiny_recipe["log-ging"] = {}
    tiny_recipe["model"]["n-layer"] = 3
    with pytest.raises(ConfigError, match=r"(?s)model\.n-layer: unknown key.*log-ging: unknown key"):
        load_recipe(save_recipe(tiny_recipe, tmp_path / "r.yaml"))


def test_overrides_win_and_are_checked(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    path = save_recipe(tiny_recipe, tmp_path / "r.yaml")
    assert load_recipe(path, ["optimizer.learning_rate=1e-4", "schedule.steps=9"]).optimizer.learning_rate == 1e-4
    with pytest.raises(ConfigError, match=r"schedule\.stepz: unknown key"):
        load_recipe(path, ["schedule.stepz=9"])
    with pytest.raises(ConfigError, match=r"must have the form section\.key=value"):
        load_recipe(path, ["schedule.steps"])
    with pytest.raises(ConfigError, match="name is a value, not a section"):
        load_recipe(path, ["name.x=1"])


def test_the_resolved_recipe_holds_from_anywhere(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(save_recipe(tiny_recipe, tmp_path / "r.yaml"))
    (tmp_path / "ds_config.json").write_text(json.dumps(resolve(load_ds_config(recipe.engine.deepspeed), recipe, 2)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "again.yaml").write_text(recipe.resolved(Path("ds_config.json")).to_yaml())
    monkeypatch.chdir("/")
    again = load_recipe(tmp_path / "again.yaml")
    assert again.data.shards.is_absolute()
    assert resolve(load_ds_config(again.engine.deepspeed), again, 2)["train_micro_batch_size_per_gpu"] == 2


def test_a_stored_recipe_loads_as_the_same(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(save_recipe(tiny_recipe, tmp_path / "r.yaml"))
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- a", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.system [id]", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ConfigError, match=expected):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("global_batch", "micro", "world_size", "expected"),
    [(12, 3, 2, (3, 2)), (12, "auto", 4, (3, 1)), (8, "auto", 3, "3 ranks"), (12, 4, 2, "Use a divisor of 6")],
)
def test_batch_arithmetic(
    tiny_recipe: dict[str, Any], global_batch: int, micro: int | str, world_size: int, expected: Any
) -> None:
    tiny_recipe["batch"] = {"global_batch_size": global_batch, "micro_batch_size": micro}
    batch = Recipe.model_validate(tiny_recipe).batch
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            batch.micro_batch_and_accumulation(world_size)
    else:
        assert batch.micro_batch_and_accumulation(world_size) == expected


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`config` with one dotted key replaced."""
    result = deepcopy(config)
    *sections, last = key.split(".")
    target = result
    for section in sections:
        target = target.setdefault(section, {})
    target[last] = value
    return result


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train_batch_size", 7, "train_batch_size: 7, but the recipe sets 4"),
        ("bf16.enabled", True, r"bf16\.enabled: True, but the recipe sets False"),
        ("data_types.grad_accum_dtype", "bf16", r"data_types\.grad_accum_dtype: 'bf16'"),
        (
            "zero_optimization.reduce_bucket_size",
            "auto",
            r'zero_optimization\.reduce_bucket_size: "auto", but the recipe has no value',
        ),
        ("zero_optimization.stage", 4, r"zero_optimization\.stage: 4"),
        ("optimizer", {"type": "AdamW"}, "optimizer: remove it"),
        ("scheduler", {"type": "WarmupLR"}, "scheduler: remove it"),
        ("checkpoint.writer", {"type": "fast"}, r"checkpoint\.writer: remove it"),
        ("elasticity", {"enabled": True}, "elasticity: remove it"),
        ("bfloat16", {"enabled": True}, "bfloat16: remove it"),
        ("torch_autocast", {"enabled": True}, "torch_autocast: remove it"),
        ("bf16", "auto", "bf16: 'auto'; must be a section"),
        ("zero_optimization", {}, r"zero_optimization\.stage: None"),
    ],
)
def test_a_wrong_engine_setting_is_named(tiny_recipe: dict[str, Any], key: str, value: Any, expected: str) -> None:
    config = changed(load_ds_config(ROOT / "ds_configs" / "zero3.json"), key, value)
    with pytest.raises(ConfigError, match=expected):
        resolve(config, Recipe.model_validate(tiny_recipe), world_size=2)


def test_a_section_to_remove_is_named_once(tiny_recipe: dict[str, Any]) -> None:
    """The JSON of Hugging Face's Trainer has "auto" in sections that the recipe replaces."""
    config = load_ds_config(ROOT / "ds_configs" / "zero3.json")
    config |= {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "steps_per_print": "auto"}
    with pytest.raises(ConfigError) as refused:
        resolve(config, Recipe.model_validate(tiny_recipe), world_size=2)
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()[1:]] == [
        "  - optimizer",
        "  - steps_per_print",
    ]


def test_an_equal_value_and_a_missing_key_are_both_fine(tiny_recipe: dict[str, Any]) -> None:
    config = changed(load_ds_config(ROOT / "ds_configs" / "zero3.json"), "train_batch_size", 4)
    del config["gradient_clipping"]
    before = deepcopy(config)
    resolved = resolve(config, Recipe.model_validate(tiny_recipe), world_size=2)
    assert (resolved["train_batch_size"], resolved["gradient_clipping"]) == (4, 1.0)
    assert config == before  # resolving does not modify its input


def test_all_wrong_settings_are_named_at_once(tiny_recipe: dict[str, Any]) -> None:
    config = changed(load_ds_config(ROOT / "ds_configs" / "zero3.json"), "train_batch_size", 7)
    config = changed(config, "optimizer", {})
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*train_batch_size.*optimizer"):
        resolve(config, Recipe.model_validate(tiny_recipe), world_size=2)


def test_a_file_that_is_no_ds_config(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{,}")
    with pytest.raises(ConfigError, match="not a readable DeepSpeed JSON"):
        load_ds_config(tmp_path / "c.json")
    with pytest.raises(ConfigError, match="no such DeepSpeed JSON"):
        load_ds_config(tmp_path / "absent.json")


def test_stage_0_is_for_fp32_alone(tiny_recipe: dict[str, Any]) -> None:
    config = changed(load_ds_config(ROOT / "ds_configs" / "zero3.json"), "zero_optimization", {"stage": 0})
    resolve(config, Recipe.model_validate(tiny_recipe), world_size=2)
    tiny_recipe["engine"]["precision"] = "bf16"
    with pytest.raises(ConfigError, match="cannot accumulate bf16 gradients in fp32"):
        resolve(config, Recipe.model_validate(tiny_recipe), world_size=2)


def test_operators_are_compiled_for_offload_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = load_ds_config(ROOT / "ds_configs" / "zero3.json")
    offload = changed(plain, "zero_optimization.offload_optimizer", {"device": "nvme"})
    assert required_ops(offload) == ["cpu_adam", "async_io"]
    monkeypatch.setenv("PATH", str(tmp_path))
    check_compiler(plain)
    with pytest.raises(ConfigError, match=r"cpu_adam and async_io.*apt-get install g\+\+"):
        check_compiler(offload)


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    schedule = Schedule(steps=100, warmup_steps=10, min_ratio=0.1)
    rates = [2.0 * schedule.ratio(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(0.2 + 1.8 * 0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.2 <= rates[-1] < 0.21
    with pytest.raises(ValueError, match="must be below steps"):
        Schedule(steps=10, warmup_steps=10)


def test_the_other_schedules() -> None:
    linear = Schedule.model_validate({"name": "linear", "steps": 100, "warmup_steps": 20, "min_ratio": 0.2})
    assert linear.ratio(60) == pytest.approx(0.2 + 0.8 * 0.5)
    constant = Schedule.model_validate({"name": "constant", "steps": 100, "warmup_steps": 20})
    assert [constant.ratio(step) for step in (9, 20, 99)] == pytest.approx([0.5, 1.0, 1.0])
    wsd = Schedule.model_validate({"name": "wsd", "steps": 100, "warmup_steps": 20, "decay_steps": 40})
    assert [wsd.ratio(step) for step in (19, 20, 59, 60, 80, 99)] == pytest.approx([1, 1, 1, 1, 0.5, 1 / 40])
    for wrong, message in (
        ({"name": "wsd"}, "decay_steps"),
        ({"name": "cosine", "decay_steps": 5}, "is required with name: wsd"),
        ({"name": "wsd", "warmup_steps": 50, "decay_steps": 60}, "exceed steps 100"),
        ({"tokens": 5}, "set steps or tokens, not both"),
        ({"warmup_steps": 5, "warmup_tokens": 5}, "warmup_steps or warmup_tokens, not both"),
    ):
        with pytest.raises(ValueError, match=message):
            Schedule.model_validate({"steps": 100, **wrong})
    with pytest.raises(ValueError, match="set steps or tokens"):
        Schedule.model_validate({})


def test_a_schedule_in_tokens_is_one_in_steps_rounded_up(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    per_step = tiny_recipe["batch"]["global_batch_size"] * tiny_recipe["model"]["seq_len"]
    tiny_recipe["schedule"] = {
        "name": "wsd",
        "tokens": 100 * per_step,
        "warmup_tokens": 9 * per_step + 1,
        "decay_tokens": 20 * per_step,
    }
    path = save_recipe(tiny_recipe, tmp_path / "r.yaml")
    schedule = load_recipe(path).schedule
    assert (schedule.steps, schedule.warmup_steps, schedule.decay_steps) == (100, 10, 20)
    (tmp_path / "resolved.yaml").write_text(load_recipe(path).to_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == load_recipe(path)
    with pytest.raises(ConfigError, match="exceed steps 100"):
        load_recipe(path, [f"schedule.decay_tokens={95 * per_step}"])


def test_yaml_floats_without_a_dot_are_numbers(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """YAML 1.1 reads 5e-4 as a string, but users write it."""
    text = yaml.safe_dump(tiny_recipe).replace("learning_rate: 0.01", "learning_rate: 5e-4")
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(tmp_path / "r.yaml").optimizer.learning_rate == 5e-4


def test_a_run_resumes_only_with_its_model_seed_batch_and_data(tiny_recipe: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(tiny_recipe)
    identity = recipe.identity("a")
    assert identity == Recipe.model_validate({**tiny_recipe, "name": "other"}).identity("a")
    changes: list[tuple[str, dict[str, Any], str]] = [
        ("digest of data.shards", {}, "b"),
        ("seed", {"seed": 2}, "a"),
        ("batch.global_batch_size", {"batch": {"global_batch_size": 8}}, "a"),
        ("model.n_layer", {"model": {**tiny_recipe["model"], "n_layer": 3}}, "a"),
        ("model.init_from", {"model": {**tiny_recipe["model"], "init_from": "/a"}}, "a"),
    ]
    for key, change, digest in changes:
        other = Recipe.model_validate({**tiny_recipe, **change}).identity(digest)
        assert {name for name in identity if other[name] != identity[name]} == {key}


def test_a_byte_order_mark_is_ignored(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Some editors write one. In a file of `corpus clean` and in a hostfile, see their tests."""
    mark = "\ufeff".encode()
    ds_config = tmp_path / "ds.json"
    ds_config.write_bytes(mark + Path(tiny_recipe["engine"]["deepspeed"]).read_bytes())
    tiny_recipe["engine"]["deepspeed"] = str(ds_config)
    path = save_recipe(tiny_recipe, tmp_path / "r.yaml")
    plain = load_recipe(path)
    path.write_bytes(mark + path.read_bytes())
    assert load_recipe(path) == plain
    assert load_ds_config(ds_config)["zero_optimization"]["stage"] == 3
