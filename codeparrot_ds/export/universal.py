"""Write a ZeRO checkpoint as DeepSpeed's universal checkpoint, which any stage and number of ranks can go on from.

    OUT/manifest.json  recipe.yaml  ds_config.json  tokenizer/
    OUT/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt  zero/optimizer_state.pt
    OUT/{mp_rank_00,zero_pp_rank_0_mp_rank_00}_model_states.pt    counters, for an engine below stage 3 and at stage 3

Source of the layout: DeepSpeed 0.19.8, `checkpoint/ds_to_universal.py`, and what reads it, `runtime/base_optimizer.py`
and `runtime/zero/stage3.py`. Its script holds whole ranks in memory and writes what only the stages of one kind
can load; this takes one tensor at a time, and is read by all.
"""

import dataclasses
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.checkpoint.zero import (
    FP32,
    MOMENTS,
    OPTIMIZER_STATE,
    SavedState,
    UniversalCheckpoint,
    model_states,
    open_state,
    tensor_file,
)
from codeparrot_ds.errors import CheckpointError, ConfigError
from codeparrot_ds.run.directory import Checkpoint
from codeparrot_ds.system import memory
from codeparrot_ds.system.files import digest_file, make_directory, publish_directory, require_free_space
from codeparrot_ds.system.jobs import progress

_OF_TENSORS = {"module", "optimizer"}  # of the model's state: what is in zero/


def to_universal(checkpoint: Checkpoint, output: Path, memory_cap_bytes: int) -> Checkpoint:
    """Write `checkpoint` as a universal one, every tensor read back and compared, and return it.

    Args:
        checkpoint: all its files are verified first.
        output: must not exist; it is whole or absent.
        memory_cap_bytes: what this process may hold, everything included.

    Raises:
        CheckpointError: the checkpoint is damaged or hostile, or what was written reads back differently.
        ConfigError: `output` exists, too little memory, or the disk is too small.
    """
    checkpoint.verify()
    saved = open_state(checkpoint)
    largest_bytes = 4 * max(shape.numel() for shape in saved.shapes.values())
    # The tensor, the ranks' pieces of it, and again when it is read back.
    _require_memory(memory.resident_bytes() + 3 * largest_bytes, memory_cap_bytes)
    make_directory(output.parent)
    require_free_space(output.parent, 3 * 4 * checkpoint.parameters, "the universal checkpoint")
    memory.manage_freed_memory(scarce=True)
    with publish_directory(output) as unfinished:
        for name in ("recipe.yaml", "ds_config.json"):
            shutil.copyfile(checkpoint.run.path / name, unfinished / name)
        shutil.copytree(checkpoint.run.tokenizer, unfinished / "tokenizer")
        for name in progress(saved.shapes, "converting", len(saved.shapes), "tensor"):
            (unfinished / "zero" / name).mkdir(parents=True)
            for what in (FP32, *MOMENTS):
                torch.save(
                    {"param": saved.read(name, what).view(saved.shapes[name])}, unfinished / tensor_file(name, what)
                )
            torch.save(_step(checkpoint, saved), unfinished / tensor_file(name, "step"))
        torch.save(_optimizer_state(checkpoint, saved), unfinished / OPTIMIZER_STATE)
        counters = {key: value for key, value in saved.model_state.items() if key not in _OF_TENSORS}
        counters |= {"module": {}, "optimizer": None, "param_shapes": [saved.shapes], "shared_params": saved.tied}
        for stage in (0, 3):
            torch.save(counters, unfinished / model_states(stage))
        files = {
            path.relative_to(unfinished).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": digest_file(path)}
            for path in sorted(unfinished.rglob("*"))
            if path.is_file()
        }
        written = dataclasses.replace(checkpoint, path=output.resolve(), universal=True, files=files)
        _compare(saved, UniversalCheckpoint(dataclasses.replace(written, path=unfinished)))
        written.write(unfinished)
    return written


def _require_memory(needed_bytes: int, memory_cap_bytes: int) -> None:
    if needed_bytes > memory_cap_bytes:
        raise ConfigError(
            f"--memory-cap {memory_cap_bytes / 1e9:.2f}GB: this checkpoint takes {needed_bytes / 1e9:.2f} GB, three "
            "times its largest tensor and Python and torch themselves. Allow as much."
        )


def _step(checkpoint: Checkpoint, saved: SavedState) -> "torch.Tensor | int":
    """As the optimizer that goes on will count: DeepSpeed's CPUAdam in a plain number, torch in a tensor."""
    return torch.tensor(float(saved.step)) if checkpoint.offload == "none" else saved.step


def _optimizer_state(checkpoint: Checkpoint, saved: SavedState) -> dict[str, Any]:
    """What ZeRO 1 and 2 read at the top, and ZeRO-3 one level below."""
    groups = [{**group, "params": [number]} for number, group in enumerate(saved.hyperparameters())]
    step = _step(checkpoint, saved)
    state: dict[str, Any] = {
        "ds_version": version("deepspeed"),
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
    }
    scaler = saved.loss_scaler()
    if scaler is not None:
        state |= {"loss_scaler": scaler, "dynamic_loss_scale": bool(scaler.dynamic)}
    return state


def _compare(saved: SavedState, written: SavedState) -> None:
    for name in saved.shapes:
        for what in (FP32, *MOMENTS):
            # Bit by bit: a weight that is not finite is not equal to itself.
            if not torch.equal(*(state.read(name, what).view(torch.int32) for state in (saved, written))):
                raise CheckpointError(f"{name}: its {what} reads back differently. Nothing was written.")
    if written.step != saved.step:
        raise CheckpointError("AdamW's step reads back differently. Nothing was written.")
