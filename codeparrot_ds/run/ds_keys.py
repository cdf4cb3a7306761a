"""Which keys a DeepSpeed JSON may hold.

DeepSpeed ignores unknown keys at the top level and some known ones in some configurations, and several of its options
are unproven with this package. A key is therefore either tested (`TESTED`, with a test each), or refused because it
would break a run (`REFUSED`), or refused unless the recipe lists it in `engine.allow_untested` (all others). Source of
the names: DeepSpeed 0.19.8, `runtime/config.py`, `runtime/zero/config.py`, `runtime/precision_config.py`.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Values:
    """The values that a key may have.

    Attributes:
        text: the values, for error messages.
        contains: whether a value is one of them.
    """

    text: str
    contains: Callable[[Any], bool]


def only(*allowed: Any) -> Values:
    """Exactly these values, of exactly these types: in Python, True equals 1."""
    names = [str(value).lower() if isinstance(value, bool) else repr(value) for value in allowed]
    text = " or ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} or {names[-1]}"
    return Values(text, lambda value: any(type(value) is type(each) and value == each for each in allowed))


def integer(minimum: int) -> Values:
    """An integer of at least `minimum`."""
    return Values(
        f"an integer of at least {minimum}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
    )


def size(minimum: int) -> Values:
    """An integer of at least `minimum`, which may be written as 5e7."""
    return Values(
        f"an integer of at least {minimum}",
        lambda value: _is_number(value) and float(value).is_integer() and value >= minimum,
    )


def number(minimum: float) -> Values:
    """A finite number of at least `minimum`."""
    return Values(f"a number of at least {minimum:g}", lambda value: _is_number(value) and value >= minimum)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


BOOLEAN = only(False, True)

TESTED: dict[str, Values] = {
    # Set by the recipe: "auto", absent or equal.
    "train_batch_size": integer(1),
    "train_micro_batch_size_per_gpu": integer(1),
    "gradient_accumulation_steps": integer(1),
    "gradient_clipping": number(0),
    "bf16.enabled": BOOLEAN,
    "fp16.enabled": BOOLEAN,
    "data_types.grad_accum_dtype": only("fp32"),
    "zero_optimization.offload_optimizer.nvme_path": Values("a directory", lambda value: isinstance(value, str)),
    "zero_optimization.offload_param.nvme_path": Values("a directory", lambda value: isinstance(value, str)),
    # Gradients.
    "communication_data_type": only("fp32", "fp16", "bf16"),
    "bf16.immediate_grad_update": only(True),  # false keeps 2 more bytes per parameter, which `plan` does not count
    "bf16.check_grad_overflow": only(True),  # false would apply non-finite gradients
    "fp16.loss_scale": number(0),
    "fp16.initial_scale_power": integer(0),
    "fp16.loss_scale_window": integer(1),
    "fp16.hysteresis": integer(1),
    "fp16.consecutive_hysteresis": BOOLEAN,
    "fp16.min_loss_scale": integer(1),
    # ZeRO.
    "zero_optimization.stage": only(0, 1, 2, 3),
    "zero_optimization.overlap_comm": BOOLEAN,
    "zero_optimization.contiguous_gradients": BOOLEAN,
    "zero_optimization.reduce_scatter": BOOLEAN,
    "zero_optimization.reduce_bucket_size": size(1),
    "zero_optimization.allgather_partitions": BOOLEAN,
    "zero_optimization.allgather_bucket_size": size(1),
    "zero_optimization.sub_group_size": size(1),
    "zero_optimization.stage3_prefetch_bucket_size": size(0),
    "zero_optimization.stage3_param_persistence_threshold": size(0),
    "zero_optimization.stage3_max_live_parameters": size(0),
    "zero_optimization.stage3_max_reuse_distance": size(0),
    # Offload.
    "zero_optimization.offload_optimizer.device": only("none", "cpu", "nvme"),
    "zero_optimization.offload_optimizer.pin_memory": BOOLEAN,
    "zero_optimization.offload_optimizer.buffer_count": integer(1),
    "zero_optimization.offload_param.device": only("none", "cpu", "nvme"),
    "zero_optimization.offload_param.pin_memory": BOOLEAN,
    "zero_optimization.offload_param.buffer_count": integer(1),
    "zero_optimization.offload_param.buffer_size": size(1),
    "zero_optimization.offload_param.max_in_cpu": size(0),
    "aio.block_size": integer(1),
    "aio.queue_depth": integer(1),
    "aio.intra_op_parallelism": integer(1),
    "aio.single_submit": BOOLEAN,
    "aio.overlap_events": BOOLEAN,
    # DeepSpeed's own log, of which only errors are shown.
    "steps_per_print": integer(1),
    "wall_clock_breakdown": only(False),  # metrics.jsonl has the times; true would synchronize the device for nothing
    "timers.throughput.enabled": BOOLEAN,
}

# Keys and sections that contradict the recipe or this package's checkpoints, or give a result known to be wrong.
# `engine.allow_untested` does not admit them.
REFUSED = {
    "optimizer": "the recipe's `optimizer` section sets it",
    "scheduler": "the recipe's `schedule` section sets it",
    "bfloat16": "the section is now called `bf16`, and the recipe's `engine.precision` sets it",
    "amp": "the recipe's `engine.precision` sets it",
    "torch_autocast": "the recipe's `engine.precision` sets it",
    "data_types.param_dtype": "the recipe's `engine.precision` sets it",
    "activation_checkpointing": "the recipe's `model.activation_checkpointing` sets it",
    "tensorboard": "the recipe's `logging` section sets it",
    "wandb": "the recipe's `logging` section sets it",
    "data_efficiency": "the recipe's `data` section and `seed` determine the order of the data",
    "dataloader_drop_last": "the recipe's `data` section and `seed` determine the order of the data",
    "gradient_allreduce_op": "the loss is a mean over ranks, and a sum would multiply the gradients by their number",
    "managed_gradient_accumulation": "the training loop relies on DeepSpeed to accumulate",
    "tensor_parallel": "each rank trains on its own slice of the batch",
    "sequence_parallel_size": "each rank trains on its own slice of the batch",
    "expert_parallel": "the model has no experts",
    "pipeline": "the model is not a pipeline",
    "elasticity": "DeepSpeed 0.19.8 no longer supports elastic training",
    "compression_training": "DeepSpeed 0.19.8 no longer supports it",
    "curriculum_learning": "DeepSpeed 0.19.8 no longer supports it",
    "eigenvalue": "DeepSpeed 0.19.8 no longer supports it",
    "graph_harvesting": "DeepSpeed 0.19.8 no longer supports it",
    "nebula": "DeepSpeed 0.19.8 no longer supports it",
    "progressive_layer_drop": "DeepSpeed 0.19.8 no longer supports it",
    "quantize_training": "DeepSpeed 0.19.8 no longer supports it",
    "sparse_attention": "DeepSpeed 0.19.8 no longer supports it",
    "sparse_gradients": "DeepSpeed 0.19.8 no longer supports it",
    "zero_optimization.mics_shard_size": "DeepSpeed 0.19.8 no longer supports it",
    "zero_optimization.mics_hierarchical_params_gather": "DeepSpeed 0.19.8 no longer supports it",
    "zero_optimization.zeropp_loco_param": "DeepSpeed 0.19.8 no longer supports it",
    "zero_optimization.cpu_offload": "it is now called `offload_optimizer`, a section with a `device`",
    "zero_optimization.cpu_offload_param": "it is now called `offload_param`, a section with a `device`",
    "zero_optimization.cpu_offload_use_pin_memory": "it is now `pin_memory` in `offload_optimizer` and `offload_param`",
    "zero_optimization.legacy_stage1": "this package does not read the checkpoints that it writes",
    "zero_optimization.elastic_checkpoint": "this package does not read the checkpoints that it writes",
    "zero_optimization.round_robin_gradients": "this package does not read the checkpoints that it writes",
    "zero_optimization.parameter_alignment": "this package does not read the checkpoints that it writes",
    "zero_optimization.load_from_fp32_weights": "false would resume from rounded weights",
    "zero_optimization.compute_grad_norm": "the guards and the metrics need the gradient norm",
    "checkpoint.writer": "DeepSpeed cannot load what this writer saves",
    "checkpoint.use_node_local_storage": "the recipe's `checkpoints.shared_disk` sets it",
    "fp16.auto_cast": "the inputs are token ids",
    "fp16.fp16_master_weights_and_grads": "master weights and gradients are fp32",
    "bf16.bf16_master_weights_and_grads": "master weights and gradients are fp32",
    "bf16.bf16_optimizer_states": "the optimizer state is fp32",
}

# Keys that DeepSpeed knows and that are not tested, with the reason where there is more to say than that.
_ZEROPP = "a part of ZeRO++, with which users have reported wrong or zero losses"
UNTESTED = {
    "zero_optimization.zero_hpz_partition_size": _ZEROPP,
    "zero_optimization.zero_quantized_weights": _ZEROPP,
    "zero_optimization.zero_quantized_nontrainable_weights": _ZEROPP,
    "zero_optimization.zero_quantized_gradients": _ZEROPP,
    "compile": "it replaces ZeRO's communication; the recipe's `engine.compile` compiles the model's blocks",
    "checkpoint.load_universal": "a run resumes on any number of ranks and ZeRO stage without it",
    "checkpoint.tag_validation": "this package names and compares checkpoints itself",
    "checkpoint.parallel_write": "this package writes checkpoints itself",
    "comms_logger": "DeepSpeed's log is silenced, except for errors",
    "csv_monitor": "metrics.jsonl has the metrics",
    "comet": "metrics.jsonl has the metrics",
    "flops_profiler": "metrics.jsonl has the MFU",
    "dump_state": "DeepSpeed's log is silenced, except for errors",
    "memory_breakdown": "DeepSpeed's log is silenced, except for errors",
    "log_level": "DeepSpeed's log is silenced, except for errors",
    "zero_allow_untested_optimizer": "AdamW needs it neither on GPUs nor offloaded",
    "zero_force_ds_cpu_optimizer": "offloaded optimizer states use DeepSpeed's CPU AdamW already",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "`codeparrot-ds convert` gathers the weights",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "`codeparrot-ds convert` gathers the weights",
    "zero_optimization.leaf_module": "ZeRO-3 gathers whole blocks already",
    "prescale_gradients": "it changes the order of rounding",
    "gradient_predivide_factor": "it changes the order of rounding",
    "seq_parallel_communication_data_type": "there is no sequence parallelism",
    "autotuning": "`codeparrot-ds tune` takes its place",
    "datastates": "this package writes checkpoints itself",
    **dict.fromkeys(
        (
            "data_types.buffer_dtype",
            "data_types.keep_in_fp32_modules",
            "disable_allgather",
            "disable_python_gc",
            "hybrid_engine",
            "vocabulary_size",
            "weight_quantization",
            "use_data_before_expert_parallelism",
            "aio.use_gds",
            "timers.throughput.synchronized",
            "zero_optimization.use_multi_rank_bucket_allreduce",
            "zero_optimization.ignore_unused_parameters",
            "zero_optimization.memory_efficient_linear",
            "zero_optimization.pipeline_loading_checkpoint",
            "zero_optimization.override_module_apply",
            "zero_optimization.log_trace_cache_warnings",
            "zero_optimization.enable_sanity_checks",
            "zero_optimization.save_muon_momentum_buffer_in_memory",
            "zero_optimization.zenflow",
            "zero_optimization.stage3_model_persistence_threshold",
            "zero_optimization.stage3_module_granularity_threshold",
            "zero_optimization.stage3_use_all_reduce_for_fetch_params",
            "zero_optimization.stage3_allgather_sequential",
            "zero_optimization.offload_optimizer.pipeline_read",
            "zero_optimization.offload_optimizer.pipeline_write",
            "zero_optimization.offload_optimizer.fast_init",
            "zero_optimization.offload_optimizer.ratio",
            "zero_optimization.offload_optimizer.super_offload",
            "zero_optimization.offload_optimizer.cpuadam_cores_perc",
        ),
        "",
    ),
}
_SECTIONS = {key[:end] for key in TESTED for end, letter in enumerate(key) if letter == "."}


def key_problems(config: Mapping[str, Any], allow_untested: Sequence[str]) -> list[str]:
    """One sentence for each key of a DeepSpeed JSON that is not admitted, or whose value is not.

    Args:
        config: as read from the file; values of "auto" are not judged.
        allow_untested: dotted keys, or sections without any tested key, that the recipe admits.
    """
    problems, used = [], set()
    for path, value in _leaves(config):
        key = ".".join(path)
        dotted = [name for name in path if "." in name]
        if dotted:
            problems.append(f'"{dotted[0]}": one key with a dot in its name. Write nested sections: {_nested(key)}.')
        elif key in TESTED:
            if value != "auto" and not TESTED[key].contains(value):
                problems.append(f"{key}: {value!r}; must be {TESTED[key].text}.")
        elif key in _SECTIONS:
            if value != {}:
                problems.append(f"{key}: {value!r}; must be a section, e.g. {_example(key)}.")
        elif reason := _reason(REFUSED, key):
            problems.append(f"{reason[0]}: remove it; {reason[1]}.")
        elif admitted := [entry for entry in allow_untested if _admits(entry, key)]:
            used.update(admitted)
        else:
            problems.append(f"{key}: {_not_tested(key)}")
    return list(dict.fromkeys(problems)) + [
        f"engine.allow_untested: {entry} {_useless(config, entry)}" for entry in allow_untested if entry not in used
    ]


def refused(key: str) -> bool:
    """Whether a key, or a section that contains it, is refused in any case."""
    return _reason(REFUSED, key) is not None


def untested_keys(config: Mapping[str, Any]) -> list[str]:
    """The dotted keys of an accepted configuration that only `engine.allow_untested` admits."""
    keys = (".".join(path) for path, _ in _leaves(config))
    return [key for key in keys if key not in TESTED and key not in _SECTIONS]


def _leaves(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is not a section with content, with the names that lead to it."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, str(name)))
        else:
            yield (*path, str(name)), value


def _admits(entry: str, key: str) -> bool:
    return key == entry or (key.startswith(f"{entry}.") and entry not in _SECTIONS)


def _reason(reasons: Mapping[str, str], key: str) -> tuple[str, str] | None:
    """The entry for this key or for a section that contains it."""
    for entry, reason in reasons.items():
        if key == entry or key.startswith(f"{entry}."):
            return entry, reason
    return None


def _not_tested(key: str) -> str:
    because = _reason(UNTESTED, key)
    if because is None and (meant := _near_miss(key)):
        return f"unknown key. Did you mean {meant}?"
    why = f" ({because[1]})" if because and because[1] else ""
    return (
        f"not tested with this package{why}. Remove it, or accept it at your own risk with "
        f"engine.allow_untested: [{key}] in the recipe."
    )


def _near_miss(key: str) -> str | None:
    """The known key that was meant: misspelt in the same section, or the same name in another section."""
    section, _, name = key.rpartition(".")
    known = [each.rpartition(".") for each in (*TESTED, *UNTESTED, *REFUSED)]
    beside = [last for of, _, last in known if of == section]
    if close := difflib.get_close_matches(name, beside, n=1, cutoff=0.8):
        return f"{section}.{close[0]}" if section else close[0]
    elsewhere = [f"{of}.{last}" if of else last for of, _, last in known if last == name]
    return next(iter(difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.0)), None)


def _useless(config: Mapping[str, Any], entry: str) -> str:
    there = [".".join(path[:length]) for path, _ in _leaves(config) for length in range(1, len(path) + 1)]
    if entry in _SECTIONS:
        return "is a section with tested keys. List its other keys instead, each with the section's name."
    if entry in TESTED:
        return "is tested, so it needs no permission. Remove it from the list."
    if _reason(REFUSED, entry) is not None:
        return "cannot be admitted. Remove it from the list."
    meant = difflib.get_close_matches(entry, there, n=1, cutoff=0.8)
    return "is not in the DeepSpeed JSON. " + (f"Did you mean {meant[0]}?" if meant else "Remove it from the list.")


def _example(section: str) -> str:
    inner = next(key for key in TESTED if key.startswith(f"{section}.")).removeprefix(f"{section}.")
    return f'{{"{inner}": …}}' if inner != "enabled" else '{"enabled": "auto"}'


def _nested(key: str) -> str:
    names = key.split(".")
    return "".join(f'{{"{name}": ' for name in names) + "…" + "}" * len(names)
