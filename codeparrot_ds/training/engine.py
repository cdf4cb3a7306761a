"""Construction of a run's DeepSpeed engine and optimizer."""

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from codeparrot_ds.run.ds_config import required_ops
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.run.sections import Optimizer

if TYPE_CHECKING:  # nothing needs torch at import time, so bad input is refused before it is loaded
    from torch import nn


def build_engine(network: "nn.Module", recipe: Recipe, ds_config: Mapping[str, Any]) -> Any:
    """Build the DeepSpeed engine for `network`, with the recipe's optimizer over its two parameter groups."""
    import torch

    from codeparrot_ds.training.model import compile_blocks, gather_whole_blocks, parameter_groups
    from codeparrot_ds.training.writer import CheckpointWriter
    from codeparrot_ds.training.zero1 import initialize

    torch.set_float32_matmul_precision(recipe.engine.float32_matmul_precision)
    groups = parameter_groups(network, recipe.optimizer.weight_decay)
    optimizer = OPTIMIZERS[recipe.optimizer.name](groups, recipe.optimizer, "cpu_adam" in required_ops(ds_config))
    if ds_config["zero_optimization"]["stage"] == 3:
        gather_whole_blocks(network)
    with silence_prints():
        engine = initialize(network, optimizer, ds_config)
        engine.checkpoint_engine = CheckpointWriter(engine._config)
        # DeepSpeed's converter scripts are never used, and a failure to copy them would leave other ranks waiting.
        engine._copy_recovery_script = lambda directory: None
        if recipe.engine.compile:
            compile_blocks(network, engine.device)
    return engine


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """Compute matrix products of fp32 in fp32, so that a loss can be compared with that of another program."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def forget_trace(engine: Any) -> None:
    """Discard ZeRO-3's trace of the module order. Call on all ranks before modules run in a different order.

    This is needed after an evaluation before the first step, and when the activations to recompute change. ZeRO-3
    records the order in which modules run, and uses it to decide which weights stay gathered for the backward pass.
    DeepSpeed 0.19.8 caches those decisions and never drops them: when it first sees an order without a backward pass,
    it gathers every weight twice in each later step (17 % of a step on two CPU ranks).
    """
    if engine.zero_optimization_stage() != 3:
        return
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    cached = type(coordinator)._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()  # wrapped by DeepSpeed's profiling decorator


@contextlib.contextmanager
def keep_settings(engine: Any) -> Iterator[None]:
    """Keep the engine's own settings while DeepSpeed loads a checkpoint.

    DeepSpeed 0.19.8 replaces AdamW's hyperparameters, the clipping norm (at stages 1 and 2) and the settings of the
    loss scaler by those that the checkpoint was saved with.
    """
    optimizer = engine.optimizer
    groups = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
    kept = {name: getattr(optimizer, name) for name in ("clip_grad", "dynamic_loss_scale") if hasattr(optimizer, name)}
    scaler = getattr(optimizer, "loss_scaler", None)
    yield
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)
    for name, value in kept.items():
        setattr(optimizer, name, value)
    if scaler is not None:
        saved, optimizer.loss_scaler = optimizer.loss_scaler, scaler
        continue_loss_scale(scaler, saved)


def continue_loss_scale(scaler: Any, saved: Any) -> None:
    """Continue the search for a loss scale where `saved` was, with the settings of `scaler`.

    A scaler with a constant scale, or one that follows a constant scale, is left as it is.
    """
    if scaler is saved or not (scaler.dynamic and saved.dynamic):
        return
    for name in ("cur_iter", "last_overflow_iter"):
        setattr(scaler, name, getattr(saved, name))
    scaler.cur_scale = max(saved.cur_scale, scaler.min_scale)
    scaler.cur_hysteresis = min(saved.cur_hysteresis, scaler.delayed_shift)


def _adamw(groups: list[dict[str, Any]], settings: Optimizer, offloaded: bool) -> Any:
    import deepspeed
    import torch

    options: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    if offloaded:
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    # torch's fused AdamW runs one kernel per group and, unlike DeepSpeed's FusedAdam, needs no compilation.
    return torch.optim.AdamW(groups, fused=True, **options)


# recipe.optimizer.name -> factory of an optimizer over parameter groups, with state offloaded or on the device
OPTIMIZERS = {"adamw": _adamw}


@contextlib.contextmanager
def silence_prints() -> Iterator[None]:
    """Suppress DeepSpeed's bare print() calls; its errors and logger are unaffected."""
    with open(os.devnull, "w", encoding="utf-8") as devnull, contextlib.redirect_stdout(devnull):
        yield
