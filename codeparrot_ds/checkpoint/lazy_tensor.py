"""Open files that torch.save wrote, without running code from them and without their tensors in memory.

A tensor comes back as its place in the file, and any stretch of it is read when asked for. A memory map would count as
memory of the process as long as it is open, and where the disk fails under it the process dies without a word.
"""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codeparrot_ds.errors import CheckpointError
from codeparrot_ds.run.directory import classes_in_checkpoints


class StoredTensor:
    """A contiguous tensor in a file.

    Attributes:
        path: the file.
        offset: where it begins there, bytes.
        dtype: of its elements.
        shape: of the whole.
        name_on_disk: what DeepSpeed calls a tensor that it has swapped out, or None.
    """

    def __init__(
        self, path: Path, offset: int, dtype: torch.dtype, shape: torch.Size, name_on_disk: str | None = None
    ) -> None:
        self.path, self.offset, self.dtype, self.shape, self.name_on_disk = path, offset, dtype, shape, name_on_disk

    def __len__(self) -> int:
        """Elements in all dimensions."""
        return self.shape.numel()

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements `start` .. `stop` - 1 of the flattened tensor, in memory of their own. Raises CheckpointError."""
        count = (len(self) if stop is None else stop) - start
        size = self.dtype.itemsize
        try:
            values = np.fromfile(self.path, np.uint8, count * size, offset=self.offset + start * size)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror or error}).") from None
        if len(values) < count * size:
            raise CheckpointError(f"{self.path}: too short, so this checkpoint is damaged.")
        return torch.from_numpy(values).view(self.dtype)


def load(path: Path) -> dict[str, Any]:
    """What torch.save wrote to `path`, a dictionary, with a `StoredTensor` for each tensor. Raises CheckpointError."""
    stored = load_value(path)
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: damaged (it holds no dictionary).")
    return stored


def load_value(path: Path) -> Any:
    """What torch.save wrote to `path`, with a `StoredTensor` for each tensor.

    Raises CheckpointError when it is missing or damaged, or holds more than tensors, plain values and the few plain
    classes that DeepSpeed puts beside them.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Nothing is computed with DeepSpeed here; left to choose, it looks for a GPU and prints what it found.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with FakeTensorMode(), torch.serialization.safe_globals(classes_in_checkpoints()):
            state = torch.load(path, map_location="cpu", weights_only=True)
        return _stored(state, path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, so this checkpoint is incomplete.") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it holds more than tensors and plain values, and loading it could run code "
            f"({_reason(error)})."
        ) from None
    except (RuntimeError, OSError, EOFError) as error:  # RecursionError too: a pickle may hold itself
        raise CheckpointError(f"{path}: damaged ({(str(error) or type(error).__name__).splitlines()[0]}).") from None


def _stored(value: Any, path: Path) -> Any:
    """`value` with every tensor replaced."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        begin = getattr(storage, "_checkpoint_offset", None)  # None in files older than torch 1.6
        if begin is None or not value.is_contiguous():
            raise CheckpointError(f"{path}: damaged (a tensor does not lie in it whole).")
        offset = begin + value.storage_offset() * value.dtype.itemsize
        return StoredTensor(path, offset, value.dtype, value.shape, getattr(value, "ds_id", None))
    if isinstance(value, dict):
        return {key: _stored(item, path) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_stored(item, path) for item in value)
    return value


def _reason(error: pickle.UnpicklingError) -> str:
    """What torch has found, without its advice to load it all the same."""
    found = re.search(r"WeightsUnpickler error: (.*?)(\. Please|\n|$)", str(error))
    return found[1] if found else str(error).splitlines()[0]
