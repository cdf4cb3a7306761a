"""What tensors hold on a rank's device, now and at most: on GPUs as PyTorch counts it, on CPU cores as we do."""

import ctypes
import shutil
from pathlib import Path

import psutil
import torch

from codeparrot_ds.errors import ConfigError

_SOURCE = Path(__file__).with_name("cpu_allocator.cpp")


class DeviceMemory:
    """Of a GPU, by PyTorch's allocator.

    Attributes:
        name: of the device.
        total_bytes: that it has.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.name = torch.cuda.get_device_name(device)
        self.total_bytes = int(torch.cuda.get_device_properties(device).total_memory)

    @property
    def held_bytes(self) -> int:
        """By tensors, now."""
        return int(torch.cuda.memory_allocated(self._device))

    @property
    def peak_bytes(self) -> int:
        """By tensors, the most since `reset_peak`."""
        return int(torch.cuda.max_memory_allocated(self._device))

    @property
    def reserved_bytes(self) -> int:
        """Taken from the device for tensors, the most since `reset_peak`."""
        return int(torch.cuda.max_memory_reserved(self._device))

    def reset_peak(self) -> None:
        """Begin to look for the most anew."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        torch.cuda.synchronize(self._device)


class HostMemory(DeviceMemory):
    """Of CPU ranks: counts the tensors that are made after it. Compiled in seconds, once a machine.

    Raises ConfigError when there is no compiler.
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
        """By tensors, now."""
        return int(self._library.held_bytes())

    @property
    def peak_bytes(self) -> int:
        """By tensors, the most since `reset_peak`."""
        return int(self._library.peak_bytes())

    @property
    def reserved_bytes(self) -> int:
        """The same: nothing is taken in advance."""
        return self.peak_bytes

    def reset_peak(self) -> None:
        """Begin to look for the most anew."""
        self._library.reset_peak()

    def synchronize(self) -> None:
        """Nothing runs behind the back of a CPU rank."""


def device_memory(device: torch.device) -> DeviceMemory:
    """That of a rank."""
    return HostMemory() if device.type == "cpu" else DeviceMemory(device)
