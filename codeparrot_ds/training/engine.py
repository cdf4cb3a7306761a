"""The DeepSpeed engine of a run: its JSON resolved against the recipe, its optimizer and its operators."""

import contextlib
import inspect
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeparrot_ds.errors import ConfigError, list_problems
from codeparrot_ds.recipe import Optimizer, Recipe

if TYPE_CHECKING:  # resolving needs no torch, so bad input is refused before anything is imported or allocated
    from torch import nn

# Sections that would decide twice what the recipe decides, or that DeepSpeed 0.19.8 accepts and does not honour.
_REFUSED = {
    "optimizer": "the recipe's `optimizer` section decides",
    "scheduler": "the recipe's `schedule` section decides",
    "elasticity": "DeepSpeed 0.19.8 has no elastic training any more",
    "bfloat16": "`bf16` is its name now, and the recipe's `engine.precision` decides",
    "amp": "the recipe's `engine.precision` decides",
    "torch_autocast": "the recipe's `engine.precision` decides",
    "checkpoint.writer": "this writer saves what DeepSpeed cannot load again",
}
_OFFLOADS = ("offload_optimizer", "offload_param")


def load_ds_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON. Raises ConfigError."""
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such DeepSpeed configuration. Those shipped are in ds_configs/.") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: not a readable DeepSpeed JSON ({error}).") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{path}: a DeepSpeed configuration is a JSON object.")
    return body


def resolve(ds_config: Mapping[str, Any], recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration with every "auto" filled in from the recipe. Touches nothing outside.

    A key that the recipe decides may be "auto", absent, or equal to the recipe's value.

    Raises:
        ConfigError: names every contradicted, refused or left-over key.
    """
    micro, accumulation = recipe.batch.micro_batch_and_accumulation(world_size)
    decided = {
        "train_batch_size": recipe.batch.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "bf16.enabled": recipe.engine.precision == "bf16",
        "fp16.enabled": recipe.engine.precision == "fp16",
        "data_types.grad_accum_dtype": "fp32",  # DeepSpeed's default under bf16 is bf16, which loses small gradients
    }
    resolved = deepcopy(dict(ds_config))
    problems = [
        f'{section}: {resolved.pop(section)!r}; it is a section, as {{"enabled": "auto"}}.'
        for section in ("bf16", "fp16", "data_types", "zero_optimization")
        if not isinstance(resolved.setdefault(section, {}), dict)
    ]
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
        elif given != value:
            problems.append(f'{key}: {given!r}, but the recipe makes it {value!r}. Write "auto", or the same value.')
    for key, reason in _REFUSED.items():
        if _get(resolved, key) is not None:
            problems.append(f"{key}: remove it; {reason}.")
    problems += [f'{key}: "auto" is left, and the recipe has no value for it. Give one.' for key in _autos(resolved)]
    stage = _get(resolved, "zero_optimization.stage")
    if stage not in (0, 1, 2, 3):
        problems.append(f"zero_optimization.stage: {stage!r}; give 0, 1, 2 or 3.")
    elif stage == 0 and recipe.engine.precision != "fp32":
        problems.append(
            f"zero_optimization.stage: 0 cannot accumulate {recipe.engine.precision} gradients in fp32. Use 1."
        )
    if problems:
        raise ConfigError(list_problems(str(recipe.engine.deepspeed), problems))
    # Ours reports the steps; DeepSpeed's own lines would repeat them.
    resolved.setdefault("steps_per_print", 2**31 - 1)
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
    """Where a resolved configuration keeps the optimizer's state: "none" (with the weights), "cpu" or "nvme"."""
    return str(_get(ds_config, "zero_optimization.offload_optimizer.device") or "none")


def checkpoint_bytes(parameters: int, zero_stage: int, precision: str) -> tuple[int, int]:
    """Of a checkpoint of so many parameters: bytes in the partitions of all ranks together, and in a file of rank 0's.

    The partitions are fp32 weights and AdamW's two moments, the file the weights that are computed with. ZeRO-3 leaves
    those out. Without ZeRO the file holds all, and in fp32 one kind of weights is the other.
    """
    masters_and_moments, computed_with = 12 * parameters, (4 if precision == "fp32" else 2) * parameters
    if zero_stage == 0:
        return 0, masters_and_moments + (0 if precision == "fp32" else computed_with)
    return masters_and_moments, computed_with if zero_stage < 3 else 0


def required_ops(ds_config: Mapping[str, Any]) -> list[str]:
    """DeepSpeed operators that a resolved configuration compiles: none unless it offloads."""
    devices = {section: _get(ds_config, f"zero_optimization.{section}.device") for section in _OFFLOADS}
    ops = ["cpu_adam"] if devices["offload_optimizer"] in ("cpu", "nvme") else []
    return ops + (["async_io"] if "nvme" in devices.values() else [])


def check_compiler(ds_config: Mapping[str, Any]) -> None:
    """Raise ConfigError when DeepSpeed must compile operators, and lacks a C++ compiler, ninja or libaio for it."""
    ops = required_ops(ds_config)
    if not ops:
        return
    compiler = _find_compiler()
    needed = {  # and the Debian package that has it
        "g++": ("g++", compiler),
        "ninja": ("ninja-build", shutil.which("ninja")),
        "libaio": ("libaio-dev", "async_io" not in ops or (compiler and _has_libaio(compiler))),
    }
    missing = {name: package for name, (package, found) in needed.items() if not found}
    if missing:
        raise ConfigError(
            f"DeepSpeed compiles {' and '.join(ops)} for this configuration, and {' and '.join(missing)} cannot be "
            f"found. Install it (Debian or Ubuntu: `apt-get install {' '.join(missing.values())}`), or use a "
            "configuration without offload, such as ds_configs/zero3.json."
        )


def check_precision(precision: str) -> None:
    """Raise ConfigError when DeepSpeed cannot compute in this precision on the device at hand."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    supported = {"bf16": device.is_bf16_supported, "fp16": device.is_fp16_supported}
    if precision in supported and not supported[precision]():
        raise ConfigError(
            f"engine.precision: {precision} is not supported on {device.device_name()} devices like these. "
            f"Use {'bf16' if precision == 'fp16' and device.is_bf16_supported() else 'fp32'}."
        )


def _find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def _has_libaio(compiler: str) -> bool:
    """Whether a program that uses libaio can be built, its headers included: the library alone is not enough."""
    flags = [shlex.split(os.environ.get(name, "")) for name in ("CFLAGS", "LDFLAGS")]  # where DeepSpeed looks as well
    source = "#include <libaio.h>\nint main() { return io_queue_init(1, nullptr); }"
    with tempfile.TemporaryDirectory() as directory:
        command = [compiler, *flags[0], "-x", "c++", "-", *flags[1], "-laio", "-o", f"{directory}/probe"]
        return subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0


def build_engine(network: "nn.Module", recipe: Recipe, ds_config: Mapping[str, Any]) -> Any:
    """The DeepSpeed engine for `network`, with the recipe's optimizer over its two parameter groups."""
    import deepspeed

    from codeparrot_ds.training.model import parameter_groups
    from codeparrot_ds.training.writer import CheckpointWriter

    groups = parameter_groups(network, recipe.optimizer.weight_decay)
    optimizer = OPTIMIZERS[recipe.optimizer.name](groups, recipe.optimizer, "cpu_adam" in required_ops(ds_config))
    with silence_prints():
        engine, *_ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=dict(ds_config), dist_init_required=False
        )
        engine.checkpoint_engine = CheckpointWriter(engine._config)
        # Its converters load pickles, and nothing here runs them; a copy that failed would keep other ranks waiting.
        engine._copy_recovery_script = lambda directory: None
        if recipe.engine.compile:
            engine.compile()
    return engine


def forget_trace(engine: Any) -> None:
    """Call on all ranks when modules will run in another order: after an evaluation that came before the first step, or
    when other activations are to be recomputed.

    ZeRO-3 records in which order modules run, and decides by it which weights to keep gathered for the backward pass.
    DeepSpeed 0.19.8 caches those decisions and never drops them: an order without a backward pass, seen first, has
    every weight gathered twice in each step from then on (17 % of a step on two CPU ranks).
    """
    if engine.zero_optimization_stage() != 3:
        return
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    cached = type(coordinator)._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()  # below DeepSpeed's profiling


def _adamw(groups: list[dict[str, Any]], settings: Optimizer, offloaded: bool) -> Any:
    import deepspeed
    import torch

    options: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    if offloaded:
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    # torch's fused AdamW: one kernel a group, and nothing to compile, unlike DeepSpeed's FusedAdam.
    return torch.optim.AdamW(groups, fused=True, **options)


# recipe.optimizer.name -> maker of an optimizer over parameter groups, for states in host memory or on the device
OPTIMIZERS = {"adamw": _adamw}


@contextlib.contextmanager
def silence_prints() -> Iterator[None]:
    """Keep DeepSpeed's bare print() calls from the user; its errors and its logger are not touched."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
