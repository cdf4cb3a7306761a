"""The DeepSpeed engine of a run: its JSON resolved against the recipe, its optimizer and its operators."""

import contextlib
import inspect
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.run.ds_config import required_ops
from codeparrot_ds.run.recipe import Optimizer, Recipe

if TYPE_CHECKING:  # resolving needs no torch, so bad input is refused before anything is imported or allocated
    from torch import nn


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
