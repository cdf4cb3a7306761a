"""Processes that end with the one they work for."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def kill_with_parent(parent: int | None = None) -> None:
    """Have the kernel SIGKILL this process when its parent ends, however that ends. Does nothing outside Linux.

    Args:
        parent: its process id, where that is known: it may have ended before this call.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
