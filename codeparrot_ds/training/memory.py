"""Current and peak tensor memory of a rank: counted by PyTorch on GPUs, and by our own allocator on CPU."""

import ctypes
import shutil
from pathlib import Path

import psutil
import torch

from codeparrot_ds.errors import ConfigError

_SOURCE = Path(__file__).with_name("cpu_allocator.cpp")


class DeviceMemory:
    """Memory of a GPU, as counted by PyTorch's allocator.

    Attributes:
        name: name of the device.
        total_bytes: total memory of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.name = torch.cuda.get_device_name(device)
        self.total_bytes = int(torch.cuda.get_device_properties(device).total_memory)

    @property
    def held_bytes(self) -> int:
        """Bytes held by tensors now."""
        return int(torch.cuda.memory_allocated(self._device))

    @property
    def peak_bytes(self) -> int:
        """Peak bytes held by tensors since `reset_peak`."""
        return int(torch.cuda.max_memory_allocated(self._device))

    @property
    def reserved_bytes(self) -> int:
        """Peak bytes reserved by the allocator since `reset_peak`."""
        return int(torch.cuda.max_memory_reserved(self._device))

    def reset_peak(self) -> None:
        """Reset the peak counters."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""
        torch.cuda.synchronize(self._device)


class HostMemory(DeviceMemory):
    """Memory of a CPU rank: counts tensors allocated after its construction.

    The allocator is compiled once per machine, which takes seconds. Raises ConfigError without a compiler.
    """

    def __init__(self) -> None:
        from torch.utils.cpp_extension import load

        for program, package in (("c++", "g++"), ("ninja", "ninja-build")):
            if shutil.which(program) is None:
                raise ConfigError(f"measuring the memory of CPU ranks needs {program}: `apt-get install {package}`.")
        built = load("codeparrot_ds_cpu_allocator", [str(_SOURCE)], is_python_module=False)
        self._library = ctypes.CDLL(str(built))
        for name in ("held_bytes", "peak_bytes"):
            getattr(self._library, name).restype = ctypes.c_int64
        self._library.start()
        self.name = "cpu"
        self.total_bytes = psutil.virtual_memory().total

    @property
    def held_bytes(self) -> int:
        """Bytes held by tensors now."""
        return int(self._library.held_bytes())

    @property
    def peak_bytes(self) -> int:
        """Peak bytes held by tensors since `reset_peak`."""
        return int(self._library.peak_bytes())

    @property
    def reserved_bytes(self) -> int:
        """Same as `peak_bytes`: nothing is reserved in advance."""
        return self.peak_bytes

    def reset_peak(self) -> None:
        """Reset the peak counters."""
        self._library.reset_peak()

    def synchronize(self) -> None:
        """Do nothing: work on a CPU rank is synchronous."""


def device_memory(device: torch.device) -> DeviceMemory:
    """Return the memory counters of a rank's device."""
    return HostMemory() if device.type == "cpu" else DeviceMemory(device)
