"""What a run offloads to NVMe: where a host keeps it, and what the host must allow.

The directory is one run's alone, empty at its start and gone at its end. DeepSpeed 0.19.8 writes into the files that it
finds, never shortens them, and copies all of them into every checkpoint.
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

_CAP_IPC_LOCK = 14  # linux/capability.h: may lock any amount of memory
_OF_DEEPSPEED = "zero_stage_3"  # the directory that it makes


@contextlib.contextmanager
def hold_swap_directory(path: Path) -> Iterator[None]:
    """Keep `path` for one run: what another has left there goes at once, the rest when the block has ended well.

    Raises ConfigError when another run uses it, or when it cannot be written to.
    """
    make_directory(path)
    busy = f"{path}: another run offloads to this directory. Stop it, or use another --set engine.nvme=…"
    with exclusive_lock(path / ".lock", busy):
        shutil.rmtree(path / _OF_DEEPSPEED, ignore_errors=True)
        yield
        shutil.rmtree(path, ignore_errors=True)


def check_locked_memory(ds_config: Mapping[str, Any], share: int, largest: int) -> None:
    """Raise ConfigError when this rank may not lock the memory that DeepSpeed's buffers take: it would abort.

    Args:
        ds_config: resolved.
        share: parameters of this rank.
        largest: parameters of this rank in the model's largest tensor.
    """
    needed_bytes = swap_buffer_bytes(ds_config, share, largest)
    if not needed_bytes:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    if hard in (resource.RLIM_INFINITY, -1) or hard >= needed_bytes or _may_lock_any_amount():
        return
    raise ConfigError(
        f"DeepSpeed's buffers for NVMe offload lock up to {needed_bytes / 1e6:,.0f} MB of memory a rank, and a process "
        f"may lock {hard / 1e6:,.0f} MB here. Raise `memlock` in /etc/security/limits.conf (in a container: "
        "`docker run --ulimit memlock=-1`) and log in again, or use ds_configs/zero3_offload.json."
    )


def _may_lock_any_amount() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False
