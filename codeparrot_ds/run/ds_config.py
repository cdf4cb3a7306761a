"""Resolve the DeepSpeed JSON against the recipe, and derive sizes from it. Arithmetic only: no torch, no GPU."""

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import ConfigError, list_problems
from codeparrot_ds.run.ds_keys import TESTED, key_problems, refused
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.run.shipped import DS_CONFIGS, names

_OFFLOADS = ("offload_optimizer", "offload_param")


def load_ds_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON. Raises ConfigError."""
    try:
        body = json.loads(path.read_bytes(), object_pairs_hook=_distinct, parse_constant=_no_constant)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such DeepSpeed JSON. These come with the package: {names(DS_CONFIGS)}."
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable DeepSpeed JSON ({error}).") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{path}: a DeepSpeed configuration must be a JSON object.")
    return body


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(repeated)} appears twice in one section")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def resolve(ds_config: Mapping[str, Any], recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration with every "auto" filled in from the recipe. Does not modify its arguments.

    A key that the recipe sets may be "auto", absent, or equal to the recipe's value.

    Args:
        ds_config: as read from the DeepSpeed JSON.
        recipe: the run's recipe.
        world_size: number of ranks.

    Raises:
        ConfigError: lists every key that contradicts the recipe, is not allowed, or is still "auto".
    """
    micro, accumulation = recipe.batch.micro_batch_and_accumulation(world_size)
    decided = {
        "train_batch_size": recipe.batch.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "bf16.enabled": recipe.engine.precision == "bf16",
        "fp16.enabled": recipe.engine.precision == "fp16",
        "data_types.grad_accum_dtype": "fp32",  # DeepSpeed's default with bf16 is bf16, which loses small gradients
    }
    resolved = deepcopy(dict(ds_config))
    not_admitted, problems = key_problems(resolved, recipe.engine.allow_untested), list[str]()
    for section in ("bf16", "fp16", "data_types", "zero_optimization"):
        if not isinstance(resolved.setdefault(section, {}), dict):
            del resolved[section]
    for section in _OFFLOADS:
        key = f"zero_optimization.{section}.nvme_path"
        if _get(resolved, f"zero_optimization.{section}.device") == "nvme" and recipe.swap_directory is not None:
            decided[key] = str(recipe.swap_directory)
        elif _get(resolved, f"zero_optimization.{section}.device") == "nvme":
            _set(resolved, key, None)
            problems.append(f"{key}: set engine.nvme in the recipe to a directory on a fast local disk of every host.")
    for key, value in decided.items():
        given = _get(resolved, key)
        if given is None or given == "auto":
            _set(resolved, key, value)
        elif given != value and TESTED[key].contains(given):
            problems.append(f'{key}: {given!r}, but the recipe sets {value!r}. Use "auto" or the same value.')
    problems += not_admitted
    problems += [
        f'{key}: "auto", but the recipe has no value for it. Set one, e.g. that of a DeepSpeed JSON of this package.'
        for key in _autos(resolved)
        if not refused(key)
    ]
    stage = _get(resolved, "zero_optimization.stage")
    if stage is None and "stage" not in resolved["zero_optimization"]:
        problems.append("zero_optimization.stage: None; must be 0, 1, 2 or 3.")
    elif stage == 0 and recipe.engine.precision != "fp32":
        problems.append(
            f"zero_optimization.stage: 0 cannot accumulate {recipe.engine.precision} gradients in fp32. Use 1."
        )
    if problems:
        raise ConfigError(list_problems(str(recipe.engine.deepspeed), problems))
    # The training loop logs the steps itself; DeepSpeed's throughput timer synchronizes the device twice per step.
    resolved.setdefault("steps_per_print", 2**31 - 1)
    resolved.setdefault("timers", {"throughput": {"enabled": False}})
    if stage == 1 and recipe.engine.precision == "bf16":  # or bf16 gradients are kept until the backward pass ends
        resolved["bf16"].setdefault("immediate_grad_update", True)
    return resolved


def _get(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[last] = value


def _autos(config: Any, key: str = "") -> Iterator[str]:
    if config == "auto":
        yield key
    elif isinstance(config, Mapping):
        for name, value in config.items():
            yield from _autos(value, f"{key}.{name}" if key else str(name))
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from _autos(value, f"{key}[{number}]")


def offload_device(ds_config: Mapping[str, Any]) -> str:
    """Where a resolved configuration keeps the optimizer state: "none" (with the weights), "cpu" or "nvme"."""
    return str(_get(ds_config, "zero_optimization.offload_optimizer.device") or "none")


def checkpoint_bytes(parameters: int, zero_stage: int, precision: str) -> tuple[int, int]:
    """Size of a checkpoint: (bytes in the partitions of all ranks, bytes in rank 0's model file).

    The partitions hold the fp32 master weights and AdamW's two moments; rank 0's file holds the weights used in forward
    and backward, which ZeRO-3 omits. Without ZeRO, rank 0's file holds everything, and in fp32 master and model weights
    are the same.

    Args:
        parameters: number of model parameters.
        zero_stage: ZeRO stage, 0 to 3.
        precision: "bf16", "fp16" or "fp32".
    """
    masters_and_moments, computed_with = 12 * parameters, (4 if precision == "fp32" else 2) * parameters
    if zero_stage == 0:
        return 0, masters_and_moments + (0 if precision == "fp32" else computed_with)
    return masters_and_moments, computed_with if zero_stage < 3 else 0


def required_ops(ds_config: Mapping[str, Any]) -> list[str]:
    """DeepSpeed operators that a resolved configuration must compile: none without offloading."""
    devices = {section: _get(ds_config, f"zero_optimization.{section}.device") for section in _OFFLOADS}
    ops = ["cpu_adam"] if devices["offload_optimizer"] in ("cpu", "nvme") else []
    return ops + (["async_io"] if "nvme" in devices.values() else [])


def nvme_path(ds_config: Mapping[str, Any]) -> Path | None:
    """Directory that a resolved configuration offloads to on each host; None if it does not use NVMe."""
    zero = ds_config["zero_optimization"]
    for section in (zero.get("offload_optimizer"), zero.get("offload_param")):
        if section and section.get("device") == "nvme":
            return Path(section["nvme_path"])
    return None


def swap_buffer_bytes(ds_config: Mapping[str, Any], share: int, largest: int) -> int:
    """Pinned host memory (bytes) that a rank allocates for NVMe swap buffers.

    Args:
        ds_config: resolved configuration.
        share: number of parameters that this rank owns.
        largest: number of parameters that this rank owns of the model's largest tensor.
    """
    zero, needed_bytes = ds_config["zero_optimization"], 0
    optimizer, weights = (zero.get(name) or {} for name in _OFFLOADS)
    if optimizer.get("device") == "nvme":
        # Each buffer holds one fp32 tensor of the largest sub-group, which ends with the parameter that fills it.
        group = min(share, int(zero.get("sub_group_size", 1e9)) + largest)
        needed_bytes += 4 * group * int(optimizer.get("buffer_count", 4))
    if weights.get("device") == "nvme":
        item_bytes = 2 if ds_config["bf16"]["enabled"] or ds_config["fp16"]["enabled"] else 4
        needed_bytes += item_bytes * int(weights.get("buffer_size", 1e8)) * int(weights.get("buffer_count", 5))
    return needed_bytes


def swap_bytes_per_parameter(ds_config: Mapping[str, Any]) -> int:
    """Bytes on NVMe per parameter that a rank owns."""
    zero = ds_config["zero_optimization"]
    optimizer, weights = (zero.get(name) or {} for name in ("offload_optimizer", "offload_param"))
    # Optimizer: fp32 weights, two moments and gradients. Parameters: the weights used in forward and backward.
    return 16 * (optimizer.get("device") == "nvme") + 4 * (weights.get("device") == "nvme")
