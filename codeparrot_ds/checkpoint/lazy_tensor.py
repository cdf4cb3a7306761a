"""Open files written by torch.save without running code from them and without loading their tensors.

A tensor is returned as its location in the file, and any range of it is read on demand. A memory map would count as
memory of the process while it is open, and a disk error would kill the process without a message (SIGBUS).
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
        path: file that contains the tensor.
        offset: start of the tensor in the file (bytes).
        dtype: of the elements.
        shape: of the whole tensor.
        name_on_disk: DeepSpeed's id of a tensor that was swapped out, or None.
    """

    def __init__(
        self, path: Path, offset: int, dtype: torch.dtype, shape: torch.Size, name_on_disk: str | None = None
    ) -> None:
        self.path, self.offset, self.dtype, self.shape, self.name_on_disk = path, offset, dtype, shape, name_on_disk

    def __len__(self) -> int:
        """Total number of elements."""
        return self.shape.numel()

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read elements `start` .. `stop` - 1 of the flattened tensor into new memory. Raises CheckpointError."""
        count = (len(self) if stop is None else stop) - start
        size = self.dtype.itemsize
        try:
            values = np.fromfile(self.path, np.uint8, count * size, offset=self.offset + start * size)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror or error}).") from None
        if len(values) < count * size:
            raise CheckpointError(f"{self.path}: too short, so this checkpoint is damaged.")
        return torch.from_numpy(values).view(self.dtype)


def load_lazily(path: Path) -> dict[str, Any]:
    """Load a dictionary written by torch.save, with a `StoredTensor` for each tensor. Raises CheckpointError."""
    stored = load_value(path)
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: damaged (it does not contain a dictionary).")
    return stored


def load_value(path: Path) -> Any:
    """Load a value written by torch.save, with a `StoredTensor` for each tensor.

    Raises CheckpointError when the file is missing or damaged, or contains anything but tensors, plain values and the
    few plain classes that DeepSpeed stores with them.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    # DeepSpeed computes nothing here; without this setting it looks for a GPU and prints what it finds.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with FakeTensorMode(), torch.serialization.safe_globals(classes_in_checkpoints()):
            state = torch.load(path, map_location="cpu", weights_only=True)
        return _stored(state, path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, so this checkpoint is incomplete.") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it contains more than tensors and plain values, and loading it could run code "
            f"({_reason(error)})."
        ) from None
    except (RuntimeError, OSError, EOFError) as error:  # includes RecursionError: a pickle may contain itself
        raise CheckpointError(f"{path}: damaged ({(str(error) or type(error).__name__).splitlines()[0]}).") from None


def _stored(value: Any, path: Path) -> Any:
    """`value` with every tensor replaced by a `StoredTensor`."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        begin = getattr(storage, "_checkpoint_offset", None)  # None in files older than torch 1.6
        if begin is None or not value.is_contiguous():
            raise CheckpointError(f"{path}: damaged (a tensor is not stored contiguously in it).")
        offset = begin + value.storage_offset() * value.dtype.itemsize
        return StoredTensor(path, offset, value.dtype, value.shape, getattr(value, "ds_id", None))
    if isinstance(value, dict):
        return {key: _stored(item, path) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_stored(item, path) for item in value)
    return value


def _reason(error: pickle.UnpicklingError) -> str:
    """torch's reason for the refusal, without its advice to load the file anyway."""
    found = re.search(r"WeightsUnpickler error: (.*?)(\. Please|\n|$)", str(error))
    return found[1] if found else str(error).splitlines()[0]
