"""This process's memory: what it takes, and what glibc does with what is freed."""

import ctypes
import resource
from pathlib import Path

import psutil

_M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_TRIM_THRESHOLD = -3, -4, -1  # malloc.h
_LARGE_BYTES = 1 << 20


def resident_bytes() -> int:
    """What this process holds in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most that this process has ever held in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_bytes() -> int:
    """Bytes that this process may still take: of the machine, and of the container or job that it runs in."""
    free = [int(psutil.virtual_memory().available)]
    try:
        group = Path("/proc/self/cgroup").read_text().splitlines()[-1].rpartition(":")[2]
        place = Path("/sys/fs/cgroup", group.lstrip("/"))
        for directory in (place, *place.parents):
            limit = (directory / "memory.max").read_text().strip() if (directory / "memory.max").exists() else "max"
            if limit != "max":
                free.append(int(limit) - int((directory / "memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        pass  # no such groups here, or older ones
    return max(0, min(free))


def manage_freed_memory(scarce: bool) -> None:
    """Tell glibc what to do with the memory of tensors that are freed, for processes that compute on CPU cores.

    Left alone, it gives those above 32 MB back to the kernel and keeps the others for what is next. The first costs
    a third of a training step in page faults when tensors come and go; the second holds twice the weights of a model
    that was built and partitioned, matrix by matrix.

    Args:
        scarce: give all of it back, for a model that barely fits; otherwise keep all.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    if scarce:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    else:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
