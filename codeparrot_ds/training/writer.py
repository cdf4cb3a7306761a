"""How a rank's files of a checkpoint get to disk: beside training, from a copy in host memory.

DeepSpeed 0.19.8 has such a writer too, but cannot load again what it has saved. Ours only takes the place of the call
that writes a file, so the files are the same.
"""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from codeparrot_ds.system.files import flush_to_disk
from codeparrot_ds.system.launched import local_world_size
from codeparrot_ds.system.memory import available_bytes

_SPARE_MEMORY = 0.25  # of what is available: to be left by a copy


class CheckpointWriter(TorchCheckpointEngine):
    """Takes the place of `engine.checkpoint_engine`, which writes a file at each call of `save`.

    Attributes:
        files: path -> size and digest of each file that is down, since the last `begin`.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.files: dict[Path, dict[str, Any]] = {}
        self._background = False
        self._waiting: list[tuple[Any, Path]] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, background: bool) -> None:
        """What is saved from now on belongs to a new checkpoint. With `background`, it is written after `start`."""
        assert self._thread is None
        self.files, self._waiting, self._background, self._error = {}, [], background, None

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, or copy what goes into it. Where memory is too short for a copy, it is written at once."""
        # All ranks of a host copy at once.
        room = (1 - _SPARE_MEMORY) * available_bytes() / local_world_size(1)
        if self._background and tensor_bytes(state_dict) < room:
            self._waiting.append((copy_to_host(state_dict), Path(path)))
        elif self._error is None:
            try:
                self._write(state_dict, Path(path))
            except OSError as error:  # told by `wait`: the other ranks are about to wait in DeepSpeed's own barrier
                self._error = error

    def start(self) -> None:
        """Begin to write what has been copied."""
        self._thread = threading.Thread(target=self._write_all, name="checkpoint writer", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether files are still being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Block until every file is fsynced. Re-raises the first error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        if self._error is not None:
            return
        try:
            while self._waiting:
                self._write(*self._waiting.pop(0))
        except BaseException as error:
            self._error = error
            self._waiting = []

    def _write(self, state_dict: Any, path: Path) -> None:
        with _DigestingFile(path) as file:
            try:
                torch.save(state_dict, cast(IO[bytes], file), _use_new_zipfile_serialization=self.zipfile_serialization)
            except RuntimeError as error:  # as torch reports a full disk
                raise OSError(str(error)) from error
        flush_to_disk(path)
        self.files[path] = {"bytes": file.bytes, "xxh3_128": file.digest.hexdigest()}


class _DigestingFile:
    """A file that is written from its beginning to its end, and its digest, which then need not be read back."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.bytes, self.digest = 0, xxhash.xxh3_128()
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 (closed in __exit__)

    def write(self, data: Any) -> int:
        """Add `data` to the file and its digest."""
        self.digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    def __enter__(self) -> "_DigestingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def copy_to_host(state: Any) -> Any:
    """`state` with every tensor copied to host memory; those that share memory, as tied weights do, go on so."""
    copies: dict[Any, torch.Tensor] = {}

    def copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
        place = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        if tensor.numel() == 0 or place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        return copies[place]

    return _map_tensors(state, copy_tensor)


def tensor_bytes(state: Any) -> int:
    """Of all tensors in `state`."""
    total = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    _map_tensors(state, count, copy_rest=False)
    return total


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor], copy_rest: bool = True) -> Any:
    """`value` with `change` done to its tensors. Containers keep their types, for they are part of what is saved."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        changed = [(key, _map_tensors(each, change, copy_rest)) for key, each in value.items()]
        if type(value) is dict:
            return dict(changed)
        result = copy.copy(value)
        result.clear()
        result.update(changed)
        return result
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(each, change, copy_rest) for each in value))
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(each, change, copy_rest) for each in value)
    return copy.deepcopy(value) if copy_rest else value
