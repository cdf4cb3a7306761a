"""The keys that a DeepSpeed JSON may hold: each tested one reaches DeepSpeed, and no other passes unseen."""

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.run.ds_config import load_ds_config, resolve
from codeparrot_ds.run.recipe import Recipe, load_recipe
from tests.conftest import ROOT, save_recipe

ZERO = "zero_optimization."


def nested(key: str, value: Any) -> dict[str, Any]:
    """A configuration with one dotted key, and a stage unless that is the key."""
    config: dict[str, Any] = {"zero_optimization": {"stage": 3 if "stage3" in key or "offload" in key else 2}}
    *sections, last = key.split(".")
    target = config
    for section in sections:
        target = target.setdefault(section, {})
    target[last] = value
    return config


def problem(body: dict[str, Any], config: dict[str, Any], allow: list[str] | None = None) -> str:
    """The message that refuses a configuration."""
    with pytest.raises(ConfigError) as caught:
        accept(body, config, allow)
    return str(caught.value)


def accept(body: dict[str, Any], config: dict[str, Any], allow: list[str] | None = None) -> dict[str, Any]:
    """The resolved configuration."""
    body = {**body, "engine": {**body["engine"], "allow_untested": allow or []}}
    return resolve(config, Recipe.model_validate(body), world_size=1)


# Key, a value that is not the default, and where DeepSpeed keeps it.
REACHES: list[tuple[str, Any, str]] = [
    ("communication_data_type", "fp32", "communication_data_type"),
    ("fp16.loss_scale", 128, "float16_config.loss_scale"),
    ("fp16.initial_scale_power", 12, "float16_config.initial_scale_power"),
    ("fp16.loss_scale_window", 500, "float16_config.loss_scale_window"),
    ("fp16.hysteresis", 3, "float16_config.hysteresis"),
    ("fp16.consecutive_hysteresis", True, "float16_config.consecutive_hysteresis"),
    ("fp16.min_loss_scale", 4, "float16_config.min_loss_scale"),
    ("bf16.immediate_grad_update", True, "bfloat16_config.immediate_grad_update"),
    ("bf16.check_grad_overflow", True, "bfloat16_config.check_grad_overflow"),
    (f"{ZERO}stage", 1, "zero_config.stage"),
    (f"{ZERO}overlap_comm", True, "zero_config.overlap_comm"),
    (f"{ZERO}contiguous_gradients", False, "zero_config.contiguous_gradients"),
    (f"{ZERO}reduce_scatter", False, "zero_config.reduce_scatter"),
    (f"{ZERO}reduce_bucket_size", 5e6, "zero_config.reduce_bucket_size"),
    (f"{ZERO}allgather_partitions", False, "zero_config.allgather_partitions"),
    (f"{ZERO}allgather_bucket_size", 5e6, "zero_config.allgather_bucket_size"),
    (f"{ZERO}sub_group_size", 1e8, "zero_config.sub_group_size"),
    (f"{ZERO}stage3_prefetch_bucket_size", 1e6, "zero_config.prefetch_bucket_size"),
    (f"{ZERO}stage3_param_persistence_threshold", 1e4, "zero_config.param_persistence_threshold"),
    (f"{ZERO}stage3_max_live_parameters", 1e8, "zero_config.max_live_parameters"),
    (f"{ZERO}stage3_max_reuse_distance", 1e8, "zero_config.max_reuse_distance"),
    (f"{ZERO}offload_optimizer.device", "cpu", "zero_config.offload_optimizer.device"),
    (f"{ZERO}offload_optimizer.pin_memory", False, "zero_config.offload_optimizer.pin_memory"),
    (f"{ZERO}offload_optimizer.buffer_count", 5, "zero_config.offload_optimizer.buffer_count"),
    (f"{ZERO}offload_param.device", "cpu", "zero_config.offload_param.device"),
    (f"{ZERO}offload_param.pin_memory", False, "zero_config.offload_param.pin_memory"),
    (f"{ZERO}offload_param.buffer_count", 6, "zero_config.offload_param.buffer_count"),
    (f"{ZERO}offload_param.buffer_size", 1e7, "zero_config.offload_param.buffer_size"),
    (f"{ZERO}offload_param.max_in_cpu", 1e7, "zero_config.offload_param.max_in_cpu"),
    ("aio.block_size", 262144, "aio_config.block_size"),
    ("aio.queue_depth", 16, "aio_config.queue_depth"),
    ("aio.intra_op_parallelism", 2, "aio_config.intra_op_parallelism"),
    ("aio.single_submit", True, "aio_config.single_submit"),
    ("aio.overlap_events", False, "aio_config.overlap_events"),
    ("steps_per_print", 7, "steps_per_print"),
    ("wall_clock_breakdown", False, "wall_clock_breakdown"),
    ("timers.throughput.enabled", True, "timers_config.enabled"),
]
SET_BY_RECIPE = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "bf16.enabled": False,
    "fp16.enabled": False,
    "data_types.grad_accum_dtype": "fp32",
    f"{ZERO}offload_optimizer.nvme_path": "/nvme/tiny.swap",
    f"{ZERO}offload_param.nvme_path": "/nvme/tiny.swap",
}


@pytest.mark.parametrize(("key", "value", "attribute"), REACHES, ids=[key for key, _, _ in REACHES])
def test_a_tested_key_reaches_deepspeed(tiny_recipe: dict[str, Any], key: str, value: Any, attribute: str) -> None:
    found: Any = DeepSpeedConfig(accept(tiny_recipe, nested(key, value)))
    for name in attribute.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value or str(found).lower() in (f"torch.float{str(value)[2:]}", f"offloaddeviceenum.{value}")


@pytest.mark.parametrize("key", SET_BY_RECIPE)
def test_what_the_recipe_sets_may_be_absent_auto_or_equal(tiny_recipe: dict[str, Any], key: str) -> None:
    tiny_recipe["engine"]["nvme"] = "/nvme"
    expected = SET_BY_RECIPE[key]
    for value in ("auto", expected):
        config = nested(key, value)
        if "nvme" in key:
            config["zero_optimization"][key.split(".")[1]]["device"] = "nvme"
        found: Any = accept(tiny_recipe, config)
        for name in key.split("."):
            found = found[name]
        assert found == expected


def test_every_key_on_the_list_has_a_test() -> None:
    from codeparrot_ds.run.ds_keys import TESTED

    assert set(TESTED) == {key for key, _, _ in REACHES} | set(SET_BY_RECIPE)


def test_every_key_that_deepspeed_knows_has_a_decision() -> None:
    from codeparrot_ds.run.ds_keys import REFUSED, TESTED, UNTESTED

    sections = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
    }
    decided = {*TESTED, *REFUSED, *UNTESTED, *sections}
    for section, model in sections.items():
        known = {f"{section}.{field.alias or name}" for name, field in model.model_fields.items()}
        assert known <= decided, known - decided


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_what_ships_needs_no_permission(path: Path) -> None:
    from codeparrot_ds.run.ds_keys import key_problems, untested_keys

    config = load_ds_config(path)
    assert key_problems(config, []) == untested_keys(config) == []


ZEROPP = "users have reported wrong or zero losses"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (f"{ZERO}zero_hpz_partition_size", 2, ZEROPP),
        (f"{ZERO}zero_quantized_weights", True, ZEROPP),
        (f"{ZERO}zero_quantized_nontrainable_weights", True, ZEROPP),
        (f"{ZERO}zero_quantized_gradients", True, ZEROPP),
        ("compile.deepcompile", True, "engine.compile"),
        ("checkpoint.load_universal", True, "without it"),
        (f"{ZERO}offload_optimizer.ratio", 0.5, "not tested"),
        (f"{ZERO}offload_optimizer.super_offload", True, "not tested"),
        (f"{ZERO}zenflow.topk_ratio", 0.1, "not tested"),
        (f"{ZERO}stage3_gather_16bit_weights_on_model_save", True, "convert"),
        (f"{ZERO}memory_efficient_linear", False, "not tested"),
        ("prescale_gradients", True, "not tested"),
        ("comms_logger.enabled", True, "silenced"),
        ("flops_profiler.enabled", True, "MFU"),
        ("hybrid_engine.enabled", True, "not tested"),
    ],
)
def test_an_untested_key_is_refused_or_accepted_by_name(
    tiny_recipe: dict[str, Any], key: str, value: Any, expected: str
) -> None:
    from codeparrot_ds.run.ds_keys import untested_keys

    config = nested(key, value)
    message = problem(tiny_recipe, config)
    assert f"{key}: not tested with this package" in message and expected in message
    assert f"engine.allow_untested: [{key}]" in message
    resolved = accept(tiny_recipe, config, [key])
    assert untested_keys(resolved) == [key]
    for name in key.split("."):
        resolved = resolved[name]
    assert resolved == value


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optimizer.type", "AdamW", "optimizer: remove it; the recipe's `optimizer` section"),
        ("scheduler", {}, "scheduler: remove it; the recipe's `schedule` section"),
        ("amp.enabled", False, "amp: remove it"),
        ("activation_checkpointing.partition_activations", True, "model.activation_checkpointing"),
        ("tensorboard.enabled", True, "`logging` section"),
        ("data_efficiency.enabled", True, "order of the data"),
        ("curriculum_learning.enabled", True, "no longer supports it"),
        ("gradient_allreduce_op", "sum", "multiply the gradients"),
        ("tensor_parallel.autotp_size", 2, "own slice"),
        ("checkpoint.writer.type", "fast", "cannot load"),
        ("fp16.fp16_master_weights_and_grads", True, "master weights and gradients are fp32"),
        ("bf16.bf16_optimizer_states", True, "fp32"),
        ("fp16.auto_cast", True, "token ids"),
        (f"{ZERO}cpu_offload", True, "now called `offload_optimizer`"),
        (f"{ZERO}load_from_fp32_weights", False, "rounded weights"),
        (f"{ZERO}round_robin_gradients", True, "does not read"),
        (f"{ZERO}elastic_checkpoint", True, "does not read"),
        (f"{ZERO}mics_shard_size", 2, "no longer supports it"),
    ],
)
def test_a_key_that_breaks_a_run_cannot_be_accepted(
    tiny_recipe: dict[str, Any], key: str, value: Any, expected: str
) -> None:
    assert expected in problem(tiny_recipe, nested(key, value))
    message = problem(tiny_recipe, nested(key, value), [key])
    assert expected in message and f"engine.allow_untested: {key} cannot be admitted" in message


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"gradient_cliping": 0.5}, "gradient_cliping: unknown key. Did you mean gradient_clipping?"),
        ({"train_batchsize": 4}, "train_batchsize: unknown key. Did you mean train_batch_size?"),
        ({"fp16": {"loss_scale_windw": 5}}, "fp16.loss_scale_windw: unknown key. Did you mean fp16.loss_scale_window?"),
        ({"zero_optimisation": {"stage": 3}}, "Did you mean zero_optimization.stage?"),
        ({"Zero_Optimization": {"overlap_comm": True}}, "Zero_Optimization.overlap_comm: unknown key. Did you mean"),
        ({"overlap_comm": True}, "overlap_comm: unknown key. Did you mean zero_optimization.overlap_comm?"),
        ({"zero_optimization.stage": 3}, 'Write nested sections: {"zero_optimization": {"stage": …}}'),
        ({"quite_new": 1}, "quite_new: not tested with this package"),
    ],
    ids=str,
)
def test_a_key_that_deepspeed_would_ignore_is_refused(
    tiny_recipe: dict[str, Any], config: dict[str, Any], expected: str
) -> None:
    assert expected in problem(tiny_recipe, {"zero_optimization": {"stage": 1}, **config})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (f"{ZERO}overlap_comm", "true", "'true'; must be false or true"),
        (f"{ZERO}overlap_comm", 1, "1; must be false or true"),
        (f"{ZERO}overlap_comm", None, "None; must be false or true"),
        (f"{ZERO}stage", True, "True; must be 0, 1, 2 or 3"),
        (f"{ZERO}stage", "3", "'3'; must be 0, 1, 2 or 3"),
        (f"{ZERO}stage", None, "None; must be 0, 1, 2 or 3"),
        (f"{ZERO}reduce_bucket_size", "5e7", "'5e7'; must be an integer of at least 1"),
        (f"{ZERO}reduce_bucket_size", 0, "0; must be an integer of at least 1"),
        (f"{ZERO}reduce_bucket_size", 1.5, "1.5; must be an integer"),
        (f"{ZERO}reduce_bucket_size", float("inf"), "inf; must be an integer"),
        (f"{ZERO}reduce_bucket_size", True, "True; must be an integer"),
        (f"{ZERO}offload_optimizer", "cpu", "'cpu'; must be a section"),
        (f"{ZERO}offload_param", None, "None; must be a section"),
        (f"{ZERO}offload_optimizer.device", "disk", "'disk'; must be 'none', 'cpu' or 'nvme'"),
        ("gradient_clipping", True, "True; must be a number of at least 0"),
        ("train_batch_size", "4", "'4'; must be an integer"),
        ("communication_data_type", "float32", "'float32'; must be 'fp32', 'fp16' or 'bf16'"),
        ("data_types.grad_accum_dtype", "bf16", "'bf16'; must be 'fp32'"),
        ("bf16.immediate_grad_update", False, "False; must be true"),
        ("bf16.check_grad_overflow", False, "False; must be true"),
        ("aio", [], "[]; must be a section"),
        ("aio.block_size", 1048576.0, "1048576.0; must be an integer"),
        ("wall_clock_breakdown", True, "True; must be false"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_refused(
    tiny_recipe: dict[str, Any], key: str, value: Any, expected: str
) -> None:
    message = problem(tiny_recipe, nested(key, value))
    assert f"{key}: {expected}" in message
    assert "problems" not in message  # it is reported once
    assert f"engine.allow_untested: {key} is " in problem(tiny_recipe, nested(key, value), [key])


def test_permission_is_for_named_keys_that_are_there(tiny_recipe: dict[str, Any]) -> None:
    config = nested("comms_logger.enabled", True) | {"compile": {"deepcompile": True}}
    assert accept(tiny_recipe, config, ["comms_logger", "compile.deepcompile"])["comms_logger"] == {"enabled": True}
    for allow, expected in (
        (["comms_logger"], "compile.deepcompile: not tested"),
        (["comms_logger", "compile", "hybrid_engine"], "engine.allow_untested: hybrid_engine is not in the DeepSpeed"),
        (["comms_logger", "compile", "comms_loger"], "comms_loger is not in the DeepSpeed JSON"),
        (["comms_logger", "compile", "zero_optimization"], "zero_optimization is a section with tested keys"),
        (["comms_logger", "compil"], "Did you mean compile"),
    ):
        assert expected in problem(tiny_recipe, config, allow)
    whole = nested(f"{ZERO}zero_hpz_partition_size", 2)
    assert "zero_hpz_partition_size: not tested" in problem(tiny_recipe, whole, ["zero_optimization"])


def test_permission_is_stored_with_the_recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    tiny_recipe["engine"]["allow_untested"] = ["comms_logger.enabled"]
    recipe = load_recipe(save_recipe(tiny_recipe, tmp_path / "r.yaml"))
    resolved = resolve(nested("comms_logger.enabled", True), recipe, 1)
    (tmp_path / "ds_config.json").write_text(json.dumps(resolved))
    (tmp_path / "again.yaml").write_text(recipe.resolved(tmp_path / "ds_config.json").to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert again.engine.allow_untested == ("comms_logger.enabled",)
    assert resolve(load_ds_config(again.engine.deepspeed), again, 1) == resolved


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"zero_optimization": {"stage": 1, "stage": 3}}', "stage appears twice in one section"),
        ('{"steps_per_print": 1, "steps_per_print": 1}', "steps_per_print appears twice"),
        ('{"gradient_clipping": NaN}', "NaN is not a JSON number"),
        ('{"gradient_clipping": -Infinity}', "-Infinity is not a JSON number"),
        ("[" * 100_000, "not a readable DeepSpeed JSON"),
    ],
    ids=["nested", "top", "nan", "infinity", "deep"],
)
def test_json_that_readers_disagree_on_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_ds_config(tmp_path / "ds.json")
