"""NVMe offload: the swap directory of a host, and the limit on locked memory.

The directory belongs to a single run, is empty at its start and removed at its end: DeepSpeed 0.19.8 overwrites
existing files without truncating them, and copies all files of the directory into every checkpoint.
"""

import contextlib
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.run.ds_config import swap_buffer_bytes
from codeparrot_ds.system.files import exclusive_lock, make_directory

_CAP_IPC_LOCK = 14  # linux/capability.h: permits locking any amount of memory
_OF_DEEPSPEED = "zero_stage_3"  # the directory that DeepSpeed creates


@contextlib.contextmanager
def hold_swap_directory(path: Path) -> Iterator[None]:
    """Reserve `path` for one run: leftovers are removed on entry, the whole directory when the block ends normally.

    Raises:
        ConfigError: when another run uses the directory, or it is not writable.
    """
    make_directory(path)
    busy = f"{path}: another run offloads to this directory. Stop it, or use another --set engine.nvme=…"
    with exclusive_lock(path / ".lock", busy):
        shutil.rmtree(path / _OF_DEEPSPEED, ignore_errors=True)
        yield
        shutil.rmtree(path, ignore_errors=True)


def check_locked_memory(ds_config: Mapping[str, Any], share: int, largest: int) -> None:
    """Check that this rank may lock the memory of DeepSpeed's buffers, without which DeepSpeed would abort.

    Args:
        ds_config: resolved DeepSpeed configuration.
        share: number of parameters in this rank's partition.
        largest: number of those in the model's largest tensor.

    Raises:
        ConfigError: when the limit on locked memory is too low.
    """
    needed_bytes = swap_buffer_bytes(ds_config, share, largest)
    if not needed_bytes:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    if hard in (resource.RLIM_INFINITY, -1) or hard >= needed_bytes or _may_lock_any_amount():
        return
    raise ConfigError(
        f"DeepSpeed's buffers for NVMe offload lock up to {needed_bytes / 1e6:,.0f} MB of memory per rank, but a "
        f"process may lock only {hard / 1e6:,.0f} MB here. Raise `memlock` in /etc/security/limits.conf (in a "
        "container: `docker run --ulimit memlock=-1`) and log in again, or use ds_configs/zero3_offload.json."
    )


def _may_lock_any_amount() -> bool:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False
