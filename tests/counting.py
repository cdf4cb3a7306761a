"""Counts memory traffic and host reads of a piece of code, operator by operator."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that return a number to the host or need one from the device: with a GPU, the host waits for each.
HOST_READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.masked_select")
_ONLY_WRITTEN = ("copy_", "zero_", "fill_", "normal_")  # in place, without reading the previous content


class Counter(TorchDispatchMode):
    """Counts within `with counter:`, except within `counter.paused()`.

    Attributes:
        traffic_bytes: bytes read and written by operators, each tensor once per operator; views are free.
        host_reads: names of the operators that the host of a GPU would wait for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic_bytes, self.host_reads, self._counts = 0, list[str](), True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._counts:
            self._count(func, (args, kwargs or {}), out)
        return out

    def _count(self, func: Any, inputs: Any, out: Any) -> None:
        name = str(func)
        if name.startswith(HOST_READS):
            self.host_reads.append(name)
        if func.is_view or name.startswith(("aten.empty", "aten.detach", "aten._unsafe_view")):
            return
        read, written = set[int](), set[int]()
        for schema, value in _named(func, *inputs):
            changes = schema.alias_info is not None and schema.alias_info.is_write
            only_written = changes and func.overloadpacket.__name__ in _ONLY_WRITTEN
            for tensor in _tensors(value):
                self.traffic_bytes += _bytes(tensor) * (not only_written) + _bytes(tensor) * changes
                (written if changes else read).add(id(tensor))
        for tensor in _tensors(out):
            if id(tensor) not in read | written:
                self.traffic_bytes += _bytes(tensor)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend counting."""
        self._counts = False
        yield
        self._counts = True


def _named(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    arguments = func._schema.arguments
    yield from zip(arguments, args, strict=False)
    for argument in arguments:
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
