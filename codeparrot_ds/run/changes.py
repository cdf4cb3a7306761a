"""What happens to each recipe key when a run resumes, and what changed since a checkpoint.

A key either applies from the next step on, or is fixed: a run with another value is refused by name. docs/recipe.md has
the table, generated from here.
"""

from collections.abc import Mapping
from typing import Any

FIXED = "fixed"
APPLIES = "applies"

ON_RESUME = {
    "name": APPLIES,
    "seed": FIXED,
    "runs": APPLIES,
    "model.vocab_size": FIXED,
    "model.seq_len": FIXED,
    "model.n_layer": FIXED,
    "model.n_head": FIXED,
    "model.n_embd": FIXED,
    "model.dropout": FIXED,
    "model.scale_attn_by_inverse_layer_idx": FIXED,
    "model.init_std": FIXED,
    "model.activation_checkpointing": APPLIES,
    "model.init_from": FIXED,
    "data.shards": FIXED,  # by content: the directory may move
    "batch.global_batch_size": FIXED,
    "batch.micro_batch_size": APPLIES,
    "optimizer.name": FIXED,
    "optimizer.learning_rate": APPLIES,
    "optimizer.betas": APPLIES,
    "optimizer.eps": APPLIES,
    "optimizer.weight_decay": APPLIES,
    "optimizer.gradient_clipping": APPLIES,
    "schedule.name": APPLIES,
    "schedule.steps": APPLIES,
    "schedule.tokens": APPLIES,
    "schedule.warmup_steps": APPLIES,
    "schedule.warmup_tokens": APPLIES,
    "schedule.decay_steps": APPLIES,
    "schedule.decay_tokens": APPLIES,
    "schedule.min_ratio": APPLIES,
    "engine.deepspeed": APPLIES,
    "engine.precision": APPLIES,
    "engine.float32_matmul_precision": APPLIES,
    "engine.nvme": APPLIES,
    "engine.loss_chunk_tokens": APPLIES,
    "engine.compile": APPLIES,
    "engine.allow_untested": APPLIES,
    "evaluation.every_steps": APPLIES,
    "evaluation.sequences": APPLIES,
    "evaluation.samples": APPLIES,
    "evaluation.sample_tokens": APPLIES,
    "evaluation.humaneval": APPLIES,
    "checkpoints.every_steps": APPLIES,
    "checkpoints.every_minutes": APPLIES,
    "checkpoints.keep_last": APPLIES,
    "checkpoints.keep_every_steps": APPLIES,
    "checkpoints.background": APPLIES,
    "checkpoints.shared_disk": APPLIES,
    "export.every_steps": APPLIES,
    "export.dtype": APPLIES,
    "export.sequences": APPLIES,
    "export.keep_last": APPLIES,
    "export.hub": APPLIES,
    "export.private": APPLIES,
    "guards.hang_seconds": APPLIES,
    "guards.max_skipped_steps": APPLIES,
    "guards.spike": APPLIES,
    "guards.spike_threshold": APPLIES,
    "guards.replica_check_steps": APPLIES,
    "logging.every_steps": APPLIES,
    "logging.tensorboard": APPLIES,
    "logging.wandb": APPLIES,
    "logging.peak_tflops": APPLIES,
}

# Of the DeepSpeed JSON: what follows from recipe keys and the number of ranks.
_DERIVED = {
    "engine.deepspeed",  # its content is compared
    "ds_config.train_batch_size",
    "ds_config.train_micro_batch_size_per_gpu",
    "ds_config.gradient_accumulation_steps",
    "ds_config.gradient_clipping",
    "ds_config.bf16.enabled",
    "ds_config.fp16.enabled",
    "ds_config.zero_optimization.offload_optimizer.nvme_path",
    "ds_config.zero_optimization.offload_param.nvme_path",
}
ENGINE = "ds_config."  # prefix of the keys of the DeepSpeed JSON

Changes = dict[str, tuple[Any, Any]]


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Flatten {"a": {"b": 1}} to {"a.b": 1}."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= flatten(inner, f"{key}.{name}" if key else str(name))
    return flat


def settings(recipe: Mapping[str, Any], ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run by dotted key, with the prefix `ds_config.` for those of the DeepSpeed JSON.

    Args:
        recipe: a recipe as JSON.
        ds_config: the DeepSpeed JSON, resolved.
    """
    shards = recipe["data"]["shards"]  # one value, even if it is a mapping of directories to weights
    rest = {name: section for name, section in recipe.items() if name != "data"}
    return flatten(rest) | {"data.shards": shards} | flatten({ENGINE.rstrip("."): dict(ds_config)})


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """The settings that differ: key -> (old value, new value), None for a key that is absent.

    Recipe keys that only one of them has are left out: another version of this package wrote the other.
    """
    found: Changes = {}
    for key in sorted((old.keys() | new.keys()) - _DERIVED):
        if (key in old and key in new) or key.startswith(ENGINE):
            before, after = old.get(key), new.get(key)
            if before != after or isinstance(before, bool) != isinstance(after, bool):
                found[key] = (before, after)
    return found


def describe(changed: Changes) -> str:
    """The changes on one line."""
    return "; ".join(f"{key} {_shown(before)} -> {_shown(after)}" for key, (before, after) in changed.items())


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
