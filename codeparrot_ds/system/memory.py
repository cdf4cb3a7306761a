"""Memory of this process: usage, limits, and how glibc handles freed memory."""

import ctypes
import resource
from pathlib import Path

import psutil

_M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_TRIM_THRESHOLD = -3, -4, -1  # malloc.h
_LARGE_BYTES = 1 << 20


def resident_bytes() -> int:
    """Current resident set size of this process (bytes)."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Peak resident set size of this process (bytes)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_bytes() -> int:
    """Bytes that this process can still allocate, limited by the machine and by its container or job (cgroup v2)."""
    free = [int(psutil.virtual_memory().available)]
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()[-1].rpartition(":")[2]
        place = Path("/sys/fs/cgroup", group.lstrip("/"))
        for directory in (place, *place.parents):
            limit = (
                (directory / "memory.max").read_text(encoding="utf-8").strip()
                if (directory / "memory.max").exists()
                else "max"
            )
            if limit != "max":
                free.append(int(limit) - int((directory / "memory.current").read_text(encoding="utf-8")))
    except (OSError, ValueError, IndexError):
        pass  # no cgroups, or cgroup v1
    return max(0, min(free))


def manage_freed_memory(scarce: bool) -> None:
    """Set how glibc handles the memory of freed tensors, for processes that compute on CPU cores.

    By default, glibc returns allocations above 32 MB to the kernel and keeps smaller ones for reuse. The former costs
    a third of a training step in page faults when tensors are repeatedly allocated and freed; the latter retains twice
    the weights of a model that was built and partitioned matrix by matrix.

    Args:
        scarce: return freed memory to the kernel, for a model that barely fits; otherwise keep it for reuse.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    if scarce:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    else:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
