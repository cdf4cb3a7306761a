"""Process lifetime, Ctrl-C, and available CPU cores."""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1


def kill_with_parent(parent: int | None = None) -> None:
    """Have the kernel SIGKILL this process when its parent exits for any reason. No-op outside Linux.

    Args:
        parent: process id of the parent, if known, to detect a parent that exited before this call.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def available_cores() -> int:
    """Number of CPUs that this process may use, limited by its affinity and its cgroup's quota (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, max(1, int(quota) // int(period)))  # ValueError: "max" means no quota
    return cores


def interrupt_imports() -> None:
    """Have Ctrl-C always end this process during an import: what runs then may catch KeyboardInterrupt and go on."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as under nohup
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt
