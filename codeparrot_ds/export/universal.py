"""Convert a ZeRO checkpoint to a DeepSpeed universal checkpoint, which any ZeRO stage and rank count can resume from.

    OUT/manifest.json  recipe.yaml  ds_config.json  tokenizer/
    OUT/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt  zero/optimizer_state.pt
    OUT/{mp_rank_00,zero_pp_rank_0_mp_rank_00}_model_states.pt    counters, for an engine below stage 3 and at stage 3

Source of the layout: DeepSpeed 0.19.8, `checkpoint/ds_to_universal.py`, and its readers, `runtime/base_optimizer.py`
and `runtime/zero/stage3.py`. DeepSpeed's script holds whole ranks in memory and its output can be loaded only by stages
of one kind; this module handles one tensor at a time, and all stages can load its output.
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

_OF_TENSORS = {"module", "optimizer"}  # entries of the model state that are stored in zero/


def to_universal(checkpoint: Checkpoint, output: Path, memory_cap_bytes: int) -> Checkpoint:
    """Write `checkpoint` as a universal checkpoint, read back and compare every tensor, and return it.

    Args:
        checkpoint: source; all its files are verified first.
        output: must not exist; it is written atomically.
        memory_cap_bytes: memory limit of this process, everything included.

    Raises:
        CheckpointError: the checkpoint is damaged or hostile, or the written data reads back differently.
        ConfigError: `output` exists, too little memory, or too little disk space.
    """
    checkpoint.verify()
    saved = open_state(checkpoint)
    largest_bytes = 4 * max(shape.numel() for shape in saved.shapes.values())
    # The tensor, the ranks' pieces of it, and its copy read back.
    _require_memory(memory.resident_bytes() + 3 * largest_bytes, memory_cap_bytes)
    output = output.resolve()  # may be a link to another disk
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
            f"--memory-cap {memory_cap_bytes / 1e9:.2f}GB: this checkpoint needs {needed_bytes / 1e9:.2f} GB: three "
            "times its largest tensor, plus Python and torch. Raise the limit."
        )


def _step(checkpoint: Checkpoint, saved: SavedState) -> "torch.Tensor | int":
    """Return the step as the resuming optimizer stores it: an int for DeepSpeed's CPUAdam, a tensor for torch."""
    return torch.tensor(float(saved.step)) if checkpoint.offload == "none" else saved.step


def _optimizer_state(checkpoint: Checkpoint, saved: SavedState) -> dict[str, Any]:
    """Return the optimizer state: ZeRO-1 and ZeRO-2 read it at the top level, ZeRO-3 one level below."""
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
            # Compared bit by bit, because NaN is not equal to itself.
            if not torch.equal(*(state.read(name, what).view(torch.int32) for state in (saved, written))):
                raise CheckpointError(f"{name}: its {what} reads back differently. Nothing was written.")
    if written.step != saved.step:
        raise CheckpointError("AdamW's step reads back differently. Nothing was written.")
