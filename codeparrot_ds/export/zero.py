"""Read fp32 weights out of a DeepSpeed checkpoint, one tensor at a time, without running code from it.

Files are memory-mapped, so only the tensor at hand takes memory. Source of the layouts: DeepSpeed 0.19.8,
`runtime/engine.py` (`_get_zero_param_shapes`), `runtime/zero/stage3.py` and `stage_1_and_2.py`:

    stage 3     each rank holds every parameter's slice of ceil(numel / ranks), parameters end to end
    stage 1, 2  each parameter group is flattened whole, padded, and cut into one piece a rank
    stage 0     rank 0 holds the module's own tensors
"""

import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.errors import CheckpointError
from codeparrot_ds.run_directory import Checkpoint, RunDirectory, classes_in_checkpoints


class ZeroCheckpoint:
    """The fp32 master weights of a published checkpoint.

    Attributes:
        shapes: parameter name -> shape, in the checkpoint's order; tied copies are left out.
        tied: name of a tied copy -> name of the parameter that it shares.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Map the checkpoint's files. Raises CheckpointError when they are incomplete or hold more than tensors."""
        self._stage = checkpoint.zero_stage
        self._path = checkpoint.path
        ranks = checkpoint.world_size
        if self._stage == 3:
            model_state = self._load("zero_pp_rank_0_mp_rank_00_model_states.pt")
        else:
            model_state = self._load("mp_rank_00_model_states.pt")
        self.tied: dict[str, str] = dict(model_state.get("shared_params") or {})
        if self._stage == 0:
            self._module: dict[str, torch.Tensor] = {}
            first_name: dict[int, str] = {}  # DeepSpeed lists no ties here, but they share their memory
            for name, tensor in model_state["module"].items():
                owner = first_name.setdefault(tensor.data_ptr(), name)
                if owner == name:
                    self._module[name] = tensor
                else:
                    self.tied[name] = owner
            self.shapes = {name: tensor.shape for name, tensor in self._module.items()}
            return
        self._groups: list[dict[str, torch.Size]] = [dict(group) for group in model_state["param_shapes"]]
        self.shapes = {name: shape for group in self._groups for name, shape in group.items()}
        key = "fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups"
        prefix = "bf16_" if checkpoint.precision == "bf16" else ""
        self._partitions: list[list[torch.Tensor]] = []
        for rank in range(ranks):
            state = self._load(f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            self._partitions.append(list(state["optimizer_state_dict"][key]))

    def _load(self, name: str) -> dict[str, Any]:
        path = self._path / name
        try:
            with _allow_deepspeed_classes():
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing, so this checkpoint is incomplete.") from None
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path}: refused: it holds more than tensors and plain values, and loading it could run code "
                f"({str(error).splitlines()[0]})."
            ) from None
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{path}: damaged ({str(error).splitlines()[0]}).") from None
        return state

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, value) of every parameter, fp32 on the CPU, each made only when asked for."""
        if self._stage == 0:
            for name, tensor in self._module.items():
                yield name, tensor.detach().float()
        elif self._stage == 3:
            yield from self._stage_3()
        else:
            yield from self._stage_1_and_2()

    def _stage_3(self) -> Iterator[tuple[str, torch.Tensor]]:
        streams = [_FlatStream(pieces) for pieces in self._partitions]
        for name, shape in self.shapes.items():
            share = math.ceil(shape.numel() / len(streams))
            whole = torch.cat([stream.take(share) for stream in streams])
            yield name, whole[: shape.numel()].view(shape)

    def _stage_1_and_2(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, group in enumerate(self._groups):
            stream = _FlatStream([partition[number] for partition in self._partitions])
            for name, shape in group.items():
                yield name, stream.take(shape.numel()).view(shape)


class _FlatStream:
    """Flat tensors end to end, read front to back."""

    def __init__(self, pieces: list[torch.Tensor]) -> None:
        self._pieces = [piece.detach().flatten() for piece in pieces]  # some are saved as parameters

    def take(self, count: int) -> torch.Tensor:
        """The next `count` elements, [count]. Raises CheckpointError when there are fewer."""
        taken: list[torch.Tensor] = []
        while count > 0:
            if not self._pieces:
                raise CheckpointError("the checkpoint's partitions hold fewer weights than its parameters need.")
            head = self._pieces[0]
            taken.append(head[:count])
            count -= len(taken[-1])
            self._pieces[0] = head[len(taken[-1]) :]
            if not len(self._pieces[0]):
                self._pieces.pop(0)
        return taken[0] if len(taken) == 1 else torch.cat(taken)


@contextmanager
def _allow_deepspeed_classes() -> Iterator[None]:
    """Let `weights_only` loading build the few plain classes that DeepSpeed puts beside the tensors."""
    # Nothing is computed with DeepSpeed here; left to choose, it looks for a GPU and prints what it found.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with torch.serialization.safe_globals(classes_in_checkpoints()):
        yield


def source_checkpoint(source: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint that `source` means: a run directory (its newest, or `step`) or a checkpoint directory.

    Raises CheckpointError when there is none.
    """
    source = source.resolve()
    if (source / "checkpoints").is_dir():
        run = RunDirectory(source)
        return run.newest_checkpoint() if step is None else Checkpoint.read(run.checkpoint(step))
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such run or checkpoint directory.")
    return Checkpoint.read(source)
