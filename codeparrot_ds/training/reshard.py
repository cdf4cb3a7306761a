"""Load a checkpoint into an engine with a different ZeRO stage or world size.

Each rank reads by parameter name only those parts of the saved partitions that its own partitions hold. DeepSpeed's
alternative, a universal checkpoint on disk, is not used: under ZeRO-3 it applies the weight decay of the first
parameter group to all groups. Source of the engine's layouts: DeepSpeed 0.19.8, `runtime/zero/stage3.py`,
`stage_1_and_2.py`, `bf16_optimizer.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from codeparrot_ds.checkpoint.zero import FP32, MOMENTS, SavedState, open_state
from codeparrot_ds.errors import CheckpointError
from codeparrot_ds.run.directory import Checkpoint
from codeparrot_ds.training.engine import continue_loss_scale
from codeparrot_ds.training.ranks import Ranks


@dataclass
class _Fragment:
    """`count` elements of parameter `name` from `start`, stored at `offset` of a flat tensor."""

    name: str
    start: int
    count: int
    offset: int


def load_resharded(engine: Any, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Load weights, moments, step and counters of `checkpoint` into a new `engine`. Collective: all ranks must call.

    The optimizer's hyperparameters remain those of the engine's own parameter groups.

    Raises:
        CheckpointError: when the checkpoint's parameters are not those of the model.
    """
    saved = open_state(checkpoint)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    missing = set(names.values()) ^ set(saved.shapes)
    if missing:
        raise CheckpointError(f"{checkpoint.path}: its parameters differ from the model's, e.g. {sorted(missing)[0]}.")
    stage = engine.zero_optimization_stage()
    if stage == 3:
        _load_stage_3(engine.optimizer, saved, names, ranks)
    elif stage:
        _load_stage_1_and_2(engine.optimizer, saved, names)
    else:
        _load_stage_0(engine.optimizer, saved, names)
    if stage != 3:  # unpartitioned on every rank
        with torch.no_grad():
            for name, parameter in engine.module.named_parameters():
                parameter.copy_(saved.read(name).view(parameter.shape))
    engine.global_steps = saved.model_state["global_steps"]
    engine.global_samples = saved.model_state["global_samples"]
    engine.skipped_steps = saved.model_state["skipped_steps"]
    scaler = saved.loss_scaler()
    if scaler is not None and hasattr(engine.optimizer, "loss_scaler"):
        continue_loss_scale(engine.optimizer.loss_scaler, scaler)


def _read(saved: SavedState, flat: torch.Tensor, fragments: list[_Fragment], what: str) -> torch.Tensor:
    """Return the saved values of a flat tensor, with zeros in its padding."""
    values = torch.zeros(flat.shape, dtype=torch.float32)
    for each in fragments:
        values[each.offset : each.offset + each.count] = saved.read(
            each.name, what, each.start, each.start + each.count
        )
    return values


def _set(optimizer: Any, flat: torch.Tensor, fragments: list[_Fragment], saved: SavedState) -> None:
    """Load one flat tensor of master weights, and its state in the optimizer that DeepSpeed wraps."""
    flat.data.copy_(_read(saved, flat, fragments, FP32))
    if not saved.step:
        return
    old = optimizer.state.get(flat, {})
    state = {}
    for what in MOMENTS:
        values = _read(saved, flat, fragments, what)
        # DeepSpeed's swapper identifies moments by tensor object, so existing ones are updated in place.
        state[what] = old[what].copy_(values) if what in old else values.to(flat.device)
    # torch stores the step in a tensor, DeepSpeed's CPUAdam in an int.
    is_torch = isinstance(optimizer, torch.optim.AdamW)
    optimizer.state[flat] = {
        "step": torch.tensor(float(saved.step), device=flat.device) if is_torch else saved.step,
        **state,
    }


def _load_stage_3(optimizer: Any, saved: SavedState, names: dict[int, str], ranks: Ranks) -> None:
    optimizer.checkpoint_event_prologue()  # partitions all gathered parameters
    swapped = getattr(optimizer, "swap_optimizer", False)
    for number, group in enumerate(optimizer.fp16_groups):
        fragments, offset = [], 0
        for parameter in group:
            share = parameter.ds_tensor.ds_numel
            start = min(ranks.rank * share, parameter.ds_numel)
            count = min(share, parameter.ds_numel - start)
            fragments.append(_Fragment(names[id(parameter)], start, count, offset))
            offset += share
        flat = optimizer.fp32_partitioned_groups_flat[number]
        on_disk = swapped and optimizer._swappable_optimizer_subgroup(number)
        if on_disk:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        _set(optimizer.optimizer, flat, fragments, saved)
        optimizer._reassign_or_swap_out_partitioned_parameters(number)  # updates the weights used in forward
        if on_disk:
            optimizer._optimizer_states_and_gradient_swap_out(number)
    optimizer.checkpoint_event_epilogue()  # gathers persistent parameters again


def _load_stage_1_and_2(optimizer: Any, saved: SavedState, names: dict[int, str]) -> None:
    bf16 = hasattr(optimizer, "fp32_groups_flat_partition")  # DeepSpeed's BF16_Optimizer: stage 1 under bf16
    flats = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
    groups = optimizer.bf16_groups if bf16 else optimizer.bit16_groups
    for flat, group in zip(flats, groups, strict=True):
        _set(optimizer.optimizer, flat, list(_fragments(group, names)), saved)


def _fragments(group: list[Any], names: dict[int, str]) -> Iterator[_Fragment]:
    for parameter in group:
        mapping = parameter._hp_mapping  # None when the parameter is entirely on other ranks
        if mapping is not None:
            inside, place = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield _Fragment(names[id(parameter)], inside.start, inside.numel, place.start)


def _load_stage_0(optimizer: Any, saved: SavedState, names: dict[int, str]) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not saved.step:
                continue
            name, device = names[id(parameter)], parameter.device
            moments = {what: saved.read(name, what).view(parameter.shape).to(device) for what in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(saved.step), device=device), **moments}
