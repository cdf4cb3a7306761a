"""Read any range of any weight or optimizer tensor from a DeepSpeed checkpoint, without running code from it.

Only the requested range is read into memory. Source of the layouts: DeepSpeed 0.19.8, `runtime/engine.py`
(`_get_zero_param_shapes`), `runtime/zero/stage3.py` and `stage_1_and_2.py`, `checkpoint/ds_to_universal.py`:

    stage 3     each rank holds a slice of ceil(numel / ranks) elements of every parameter, concatenated
    stage 1, 2  each parameter group is flattened as a whole, padded, and split into one partition per rank
    stage 0     rank 0 holds the module's own tensors
    universal   one directory per parameter, one file each for its weights and moments: zero/NAME/fp32.pt

A tensor that was offloaded to NVMe is empty in these files and stored in a separate raw file, padded at the end
(`runtime/swap_tensor/optimizer_utils.py`).
"""

import math
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.checkpoint.lazy_tensor import StoredTensor, load_lazily, load_value
from codeparrot_ds.errors import CheckpointError
from codeparrot_ds.run.directory import Checkpoint
from codeparrot_ds.system.files import drop_from_cache

FP32, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
OPTIMIZER_STATE = "zero/optimizer_state.pt"  # of a universal checkpoint


_RANK_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_|offloaded_tensors/rank(\d+)/)")


def rank_of_file(name: str) -> int | None:
    """The rank whose partition is in this checkpoint file; None for shared files, which rank 0 writes."""
    match = _RANK_FILE.search(name)
    return int(match[1] or match[2]) if match else None


def model_states(zero_stage: int) -> str:
    """Name of rank 0's file with the state that is not partitioned."""
    return f"{'zero_pp_rank_0_' if zero_stage == 3 else ''}mp_rank_00_model_states.pt"


class SavedState(ABC):
    """The fp32 master weights of a published checkpoint, and AdamW's moments.

    Attributes:
        shapes: parameter name -> shape, in the checkpoint's order, without tied copies.
        tied: name of a tied copy -> name of the parameter that it shares.
        model_state: state that DeepSpeed does not partition: counters and, below stage 3, the module.
    """

    shapes: dict[str, torch.Size]
    tied: dict[str, str]

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Open the checkpoint's files. Raises CheckpointError when they are incomplete or contain more than tensors."""
        self._path = checkpoint.path
        self._files = checkpoint.files
        self.model_state = load_lazily(self._path / model_states(checkpoint.zero_stage))
        self.tied = dict(self.model_state.get("shared_params") or {})

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Lazily yield (name, value) of every parameter, fp32 on the CPU."""
        for name, shape in self.shapes.items():
            yield name, self.read(name).view(shape)

    def read(self, name: str, what: str = FP32, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read a range of a parameter or of one of its moments, flat, fp32 on the CPU.

        Before the first optimizer step, moments do not exist yet and are returned as zeros.

        Args:
            name: of the parameter.
            what: "fp32" for the weights, or one of the `MOMENTS`.
            start: first element.
            stop: one past the last element; None for the end.

        Raises:
            CheckpointError: the file is damaged.
        """
        numel = self.shapes[name].numel()
        stop = numel if stop is None else stop
        assert 0 <= start <= stop <= numel
        if what != FP32 and not self.step:
            return torch.zeros(stop - start)
        return self._read(name, what, start, stop)

    @abstractmethod
    def _read(self, name: str, what: str, start: int, stop: int) -> torch.Tensor: ...

    def drop_from_cache(self) -> None:
        """Drop the files that contain weights from the page cache."""
        for name in self.files(FP32):
            drop_from_cache(self._path / name)

    @abstractmethod
    def files(self, what: str) -> set[str]:
        """Names, as in the manifest, of the files that contain the weights ("fp32") or a moment."""

    @property
    @abstractmethod
    def step(self) -> int:
        """AdamW's step count, without skipped steps. Raises CheckpointError when parameters disagree."""

    @abstractmethod
    def hyperparameters(self) -> list[dict[str, Any]]:
        """AdamW's settings for each parameter group: learning rate, weight decay and others."""

    @abstractmethod
    def loss_scaler(self) -> Any:
        """DeepSpeed's loss scaler with its current scale under fp16; None without one."""


def open_state(checkpoint: Checkpoint) -> SavedState:
    """Open a checkpoint of any layout. Raises CheckpointError when it is incomplete or contains more than tensors."""
    return UniversalCheckpoint(checkpoint) if checkpoint.universal else ZeroCheckpoint(checkpoint)


class ZeroCheckpoint(SavedState):
    """A checkpoint as written by the ranks of a training run."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._stage = checkpoint.zero_stage
        self._flats_of: dict[str, list[_Flat]] = {}
        ranks = checkpoint.world_size
        self._states: list[dict[str, Any]] = []  # of each rank
        if self._stage == 0:
            self._module: dict[str, StoredTensor] = {}
            first_name: dict[int, str] = {}  # DeepSpeed lists no ties here, but tied tensors share their offset
            for name, tensor in self.model_state["module"].items():
                owner = first_name.setdefault(tensor.offset, name)
                if owner == name:
                    self._module[name] = tensor
                else:
                    self.tied[name] = owner
            self.shapes = {name: tensor.shape for name, tensor in self._module.items()}
            return
        groups: list[dict[str, torch.Size]] = list(self.model_state["param_shapes"])
        self.shapes = {name: shape for group in groups for name, shape in group.items()}
        prefix = "bf16_" if checkpoint.precision == "bf16" else ""
        for rank in range(ranks):
            state = load_lazily(self._path / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            self._states.append(state["optimizer_state_dict"])
        # Stage 3: elements of each group per rank, which a swapped-out tensor does not record itself.
        self._group_sizes = [sum(self._share(shape.numel()) for shape in group.values()) for group in groups]
        self._places: dict[str, tuple[int, int]] = {}  # stage 1, 2: (group, first element); stage 3: (0, offset)
        for number, group in enumerate(groups):
            if self._stage != 3 or number == 0:
                offset = 0
            for name, shape in group.items():
                self._places[name] = (0 if self._stage == 3 else number, offset)
                offset += self._share(shape.numel()) if self._stage == 3 else shape.numel()

    def _share(self, numel: int) -> int:
        return math.ceil(numel / len(self._states))

    def files(self, what: str) -> set[str]:
        """See `SavedState`."""
        if self._stage == 0:
            return {model_states(0)}
        return {file.relative_to(self._path).as_posix() for flat in self._flats(what) for file in flat.files()}

    def _read(self, name: str, what: str, start: int, stop: int) -> torch.Tensor:
        if self._stage == 0:
            tensor = self._module[name] if what == FP32 else self._stage_0_state(name)[what]
            return tensor.read(start, stop).float()
        flats = self._flats(what)
        group, offset = self._places[name]
        if self._stage != 3:
            return flats[group].read(offset + start, offset + stop)
        share = self._share(self.shapes[name].numel())
        taken = []
        for rank in range(start // share, math.ceil(stop / share)):
            begin, end = max(start, rank * share), min(stop, (rank + 1) * share)
            taken.append(flats[rank].read(offset + begin - rank * share, offset + end - rank * share))
        return taken[0] if len(taken) == 1 else torch.cat(taken or [torch.empty(0)])

    def _flats(self, what: str) -> list["_Flat"]:
        """Flat tensors of the weights or a moment: one per rank at stage 3, one per parameter group at stages 1, 2."""
        if what not in self._flats_of:
            self._flats_of[what] = self._map_flats(what)
        return self._flats_of[what]

    def _map_flats(self, what: str) -> list["_Flat"]:

        def pieces(state: dict[str, Any]) -> list[StoredTensor]:
            if what == FP32:
                return list(state["fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups"])
            base = self._base(state)
            return [base["state"][number][what] for number in range(len(base["state"]))]

        of_ranks = [pieces(state) for state in self._states]
        if self._stage != 3:
            return [_Flat(self._path, tensors) for tensors in zip(*of_ranks, strict=True)]
        return [
            _Flat(self._path, [self._on_disk(rank, *tensor) for tensor in zip(tensors, self._group_sizes, strict=True)])
            for rank, tensors in enumerate(of_ranks)
        ]

    def _on_disk(self, rank: int, tensor: StoredTensor, numel: int) -> StoredTensor:
        """`tensor`, or the raw file that replaces it if it was offloaded to NVMe."""
        if len(tensor) == numel:
            return tensor
        name = f"offloaded_tensors/rank{rank:02d}/{tensor.name_on_disk}.tensor.swp"
        if len(tensor) or name not in self._files:  # only files in the manifest, so that a pickle cannot name others
            raise CheckpointError(f"{self._path}: its partitions contain fewer weights than its parameters need.")
        return StoredTensor(self._path / name, 0, torch.float32, torch.Size([numel]))

    def _base(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state_dict of the optimizer that DeepSpeed wraps."""
        base: dict[str, Any] = state["optimizer_state_dict" if self._stage == 3 else "base_optimizer_state"]
        return base

    def _bases(self) -> list[dict[str, Any]]:
        return [self._base(state) for state in self._states] if self._stage else [self.model_state["optimizer"]]

    @cached_property
    def step(self) -> int:
        """See `SavedState`."""
        steps = {_count(state["step"]) for base in self._bases() for state in base["state"].values() if "step" in state}
        return _only(steps, self._path)

    def hyperparameters(self) -> list[dict[str, Any]]:
        """See `SavedState`."""
        return [_without_params(group) for group in self._bases()[0]["param_groups"]]

    def _stage_0_state(self, name: str) -> dict[str, StoredTensor]:
        optimizer = self.model_state["optimizer"]
        # As in training.model.parameter_groups: parameters with two dimensions first, each group in model order.
        names = sorted(self.shapes, key=lambda each: len(self.shapes[each]) < 2)
        numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
        state: dict[str, StoredTensor] = optimizer["state"][numbers[names.index(name)]]
        return state

    def loss_scaler(self) -> Any:
        """See `SavedState`."""
        return self._states[0].get("loss_scaler") if self._states else None


class UniversalCheckpoint(SavedState):
    """A checkpoint converted by `convert --to-universal` or DeepSpeed's `ds_to_universal.py`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        groups: list[dict[str, torch.Size]] = list(self.model_state["param_shapes"])
        self.shapes = {name: shape for group in groups for name, shape in group.items()}
        self._optimizer = load_lazily(self._path / OPTIMIZER_STATE)

    def files(self, what: str) -> set[str]:
        """See `SavedState`."""
        return {tensor_file(name, what) for name in self.shapes}

    def _read(self, name: str, what: str, start: int, stop: int) -> torch.Tensor:
        value = self._value(tensor_file(name, what))
        tensor = value["param"] if isinstance(value, dict) else value  # a bare tensor if ZeRO-3 partitions were merged
        if not isinstance(tensor, StoredTensor) or len(tensor) != self.shapes[name].numel():
            raise CheckpointError(f"{self._path / tensor_file(name, what)}: not a tensor of its parameter's size.")
        return tensor.read(start, stop).float()

    def _value(self, file: str) -> Any:
        if file not in self._files:  # only files in the manifest, so that a pickle cannot name others
            raise CheckpointError(f"{self._path / file}: missing, so this checkpoint is incomplete.")
        return load_value(self._path / file)

    def _base(self) -> dict[str, Any]:
        """AdamW's state that is not per parameter; DeepSpeed's script stores it elsewhere below stage 3."""
        base: dict[str, Any] = self._optimizer.get("optimizer_state_dict") or self._optimizer
        return base

    @cached_property
    def step(self) -> int:
        """See `SavedState`."""
        steps = {_count(state["step"]) for state in self._base().get("state", {}).values() if "step" in state}
        if not steps:
            files = [file for name in self.shapes if (file := tensor_file(name, "step")) in self._files]
            steps = {_count(self._value(file)) for file in files}
        return _only(steps, self._path)

    def hyperparameters(self) -> list[dict[str, Any]]:
        """See `SavedState`."""
        return [_without_params(group) for group in self._base()["param_groups"]]

    def loss_scaler(self) -> Any:
        """See `SavedState`."""
        return self._optimizer.get("loss_scaler")


def tensor_file(name: str, what: str) -> str:
    """Name of a universal checkpoint's file for a parameter's weights ("fp32"), one of its `MOMENTS`, or its "step"."""
    return f"zero/{name}/{what}.pt"


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _only(steps: set[int], path: Path) -> int:
    if len(steps) > 1:
        raise CheckpointError(f"{path}: its parameters have different step counts: {sorted(steps)}.")
    return steps.pop() if steps else 0


def _count(value: "StoredTensor | int") -> int:
    """Step count as an int: torch stores a tensor, DeepSpeed's CPUAdam a plain number."""
    return int(value.read()[0]) if isinstance(value, StoredTensor) else int(value)


class _Flat:
    """Flat tensors addressed as one concatenated tensor."""

    def __init__(self, path: Path, pieces: Sequence[StoredTensor]) -> None:
        self._path = path
        self._pieces = pieces
        self._starts = [0, *accumulate(map(len, pieces))]

    def files(self) -> set[Path]:
        """Files that contain the tensors."""
        return {piece.path for piece in self._pieces}

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements `start` .. `stop` - 1. Raises CheckpointError when there are fewer."""
        if stop > self._starts[-1]:
            raise CheckpointError(f"{self._path}: its partitions contain fewer weights than its parameters need.")
        taken = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            end = min(stop, self._starts[number + 1])
            taken.append(self._pieces[number].read(start - self._starts[number], end - self._starts[number]).float())
            start = end
            number += 1
        return taken[0] if len(taken) == 1 else torch.cat(taken or [torch.empty(0)])


def check_pickles(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a local file of `checkpoint` contains more than tensors and plain values."""
    for name in checkpoint.files:
        if name.endswith(".pt") and (checkpoint.path / name).exists():
            load_value(checkpoint.path / name)
