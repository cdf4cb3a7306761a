"""The DeepSpeed engine of a run: its JSON resolved against the recipe, its optimizer and its operators."""

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from codeparrot_ds.run.ds_config import required_ops
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.run.sections import Optimizer

if TYPE_CHECKING:  # resolving needs no torch, so bad input is refused before anything is imported or allocated
    from torch import nn


def build_engine(network: "nn.Module", recipe: Recipe, ds_config: Mapping[str, Any]) -> Any:
    """The DeepSpeed engine for `network`, with the recipe's optimizer over its two parameter groups."""
    from codeparrot_ds.training.model import compile_blocks, gather_whole_blocks, parameter_groups
    from codeparrot_ds.training.writer import CheckpointWriter
    from codeparrot_ds.training.zero1 import initialize

    groups = parameter_groups(network, recipe.optimizer.weight_decay)
    optimizer = OPTIMIZERS[recipe.optimizer.name](groups, recipe.optimizer, "cpu_adam" in required_ops(ds_config))
    if ds_config["zero_optimization"]["stage"] == 3:
        gather_whole_blocks(network)
    with silence_prints():
        engine = initialize(network, optimizer, ds_config)
        engine.checkpoint_engine = CheckpointWriter(engine._config)
        # Its converters load pickles, and nothing here runs them; a copy that failed would keep other ranks waiting.
        engine._copy_recovery_script = lambda directory: None
        if recipe.engine.compile:
            compile_blocks(network, engine.device)
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
