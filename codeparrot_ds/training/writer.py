"""Asynchronous writing of a rank's checkpoint files, from a copy in host memory while training continues.

DeepSpeed 0.19.8 has such a writer too, but cannot load the checkpoints it saves. Ours only replaces the call that
writes a file, so the files are the same.
"""

import copy
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from codeparrot_ds.system.files import flush_to_disk
from codeparrot_ds.system.launched import local_world_size
from codeparrot_ds.system.memory import available_bytes

_SPARE_MEMORY = 0.25  # fraction of available memory that a copy must leave free
_MIN_LOCKED_BYTES = 1 << 20  # smaller tensors are copied to pageable memory


class CheckpointWriter(TorchCheckpointEngine):
    """Replaces `engine.checkpoint_engine`, which writes a file at each call of `save`.

    Attributes:
        files: path -> size and digest of each file fsynced since the last `begin`.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.files: dict[Path, dict[str, Any]] = {}
        self._background = False
        self._buffers = LockedBuffers()
        self._waiting: list[tuple[Any, Path]] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, background: bool) -> None:
        """Begin a new checkpoint. With `background`, files are copied on `save` and written after `start`."""
        assert self._thread is None
        self.files, self._waiting, self._background, self._error = {}, [], background, None
        self._buffers.reuse()

    def save(self, state_dict: Any, path: str) -> None:
        """Copy a file's contents for background writing, or write it immediately if memory is too low for a copy."""
        # All ranks of a host copy at the same time.
        room = (1 - _SPARE_MEMORY) * available_bytes() / local_world_size(1)
        if self._background and tensor_bytes(state_dict) < room + self._buffers.free_bytes:
            self._waiting.append((copy_to_host(state_dict, self._buffers), Path(path)))
        elif self._error is None:
            try:
                self._write(state_dict, Path(path))
            except OSError as error:  # raised by `wait`: the other ranks are about to enter DeepSpeed's barrier
                self._error = error

    def start(self) -> None:
        """Start writing the copied files."""
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
    """A file that is written sequentially and hashed on the way, so that it need not be read back."""

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
        """Flush buffered data to the operating system."""
        self._file.flush()

    def __enter__(self) -> "_DigestingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class LockedBuffers:
    """Page-locked host memory for copies of GPU tensors, kept and used again for the next checkpoint.

    The GPU copies into it directly. Locking takes seconds for ten gigabytes, which only the first checkpoint pays.

    Attributes:
        free_bytes: size of the buffers that no copy uses.
    """

    def __init__(self) -> None:
        self.free_bytes = 0
        self._buffers: list[torch.Tensor] = []
        self._free: dict[int, list[torch.Tensor]] = {}

    def reuse(self) -> None:
        """Allow all buffers to be overwritten."""
        self._free = {}
        for buffer in self._buffers:
            self._free.setdefault(len(buffer), []).append(buffer)
        self.free_bytes = sum(map(len, self._buffers))

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a contiguous tensor in a buffer of its size."""
        size = tensor.nbytes
        if free := self._free.get(size):
            buffer = free.pop()
            self.free_bytes -= size
        else:
            buffer = torch.empty(size, dtype=torch.uint8)
            lock_pages(buffer)
            self._buffers.append(buffer)
        return buffer.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def lock_pages(buffer: torch.Tensor) -> None:
    """Lock the pages of host memory for the life of the process. Where CUDA refuses to, copies are only slower."""
    # torch's own page-locked tensors are rounded up to a power of two bytes: 8.6 GB for 6.1.
    if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), len(buffer), 0)) != 0:
        with suppress(RuntimeError):  # CUDA keeps the error until a kernel is launched, and raises it there
            torch.ones(1, device="cuda")


def copy_to_host(state: Any, buffers: LockedBuffers) -> Any:
    """Return `state` with every tensor copied to host memory. Tensors that share memory, as tied weights, still do.

    Large tensors on a GPU are copied to `buffers`, which must not be reused before the copy has been written.
    """
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
            locked = tensor.is_cuda and tensor.is_contiguous() and tensor.nbytes >= _MIN_LOCKED_BYTES
            copies[place] = buffers.copy(tensor) if locked else tensor.detach().to("cpu", copy=True)
        return copies[place]

    return _map_tensors(state, copy_tensor)


def tensor_bytes(state: Any) -> int:
    """Return the total bytes of all tensors in `state`."""
    total = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    _map_tensors(state, count, copy_rest=False)
    return total


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor], copy_rest: bool = True) -> Any:
    """Apply `change` to the tensors in `value`. Containers keep their types, because checkpoints store them."""
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
