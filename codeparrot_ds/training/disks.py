"""Sending checkpoint files between hosts that each keep their ranks' files on their own disk.

Files that a rank needs and its own disk lacks are sent from a disk that has them. Which checkpoint to resume from is
decided in resume.py.
"""

import contextlib
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from codeparrot_ds.errors import CheckpointError, ConfigError
from codeparrot_ds.run.directory import Checkpoint
from codeparrot_ds.system.files import flush_to_disk, require_free_space
from codeparrot_ds.training.ranks import Ranks

_PIECE_BYTES = 1 << 26


def fetch(checkpoint: Checkpoint, ranks: Ranks, needed: Collection[str]) -> None:
    """Fetch the `needed` files that are not on this rank's disk. Collective: all ranks must call, each with its own
    names.

    Raises:
        CheckpointError: on all ranks, when a file could not be read or written.
    """
    there = {name for name in checkpoint.files if (checkpoint.path / name).is_file()}
    everyone = ranks.gather((there, set(needed) - there))
    failure = None
    lacking_here = set().union(*(lacking for rank, (_, lacking) in enumerate(everyone) if ranks.shares_disk(rank)))
    try:
        needed_bytes = sum(checkpoint.files[name]["bytes"] for name in lacking_here)
        require_free_space(checkpoint.path, needed_bytes, "the part of this checkpoint on other hosts")
    except ConfigError as error:
        failure = CheckpointError(str(error))
    ranks.agree(failure)
    if ranks.is_fs_leader:
        for name in sorted(set().union(*(lacking for _, lacking in everyone))):
            sources = [rank for rank in sorted(set(ranks.disk_of)) if name in everyone[rank][0]]
            if sources:
                problem = _transfer(checkpoint, name, sources[0], ranks, name in lacking_here)
            else:
                problem = f"{checkpoint.path / name}: has disappeared from all disks since it was checked"
            if problem is not None:
                failure = CheckpointError(problem)
    ranks.agree(failure)


def _transfer(checkpoint: Checkpoint, name: str, source: int, ranks: Ranks, wanted: bool) -> str | None:
    """Broadcast one file from rank `source` to all disks, and store it here if `wanted`.

    Every rank participates to the end even after an error, because the others would wait for it. Returns the error
    message, or None.
    """
    path, entry = checkpoint.path / name, checkpoint.files[name]
    partial, digest, failure = path.with_name(f"{path.name}.tmp"), xxhash.xxh3_128(), None
    file: Any = None
    with contextlib.suppress(OSError):  # after a read error the digest does not match, and the file is refused
        if wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = partial.open("wb")
        elif source == ranks.rank:
            file = path.open("rb")
    for start in range(0, entry["bytes"], _PIECE_BYTES):
        piece = np.zeros(min(_PIECE_BYTES, entry["bytes"] - start), dtype=np.uint8)
        if source == ranks.rank and file is not None:
            with contextlib.suppress(OSError):
                file.readinto(piece.data)
        dist.broadcast(torch.from_numpy(piece), source, group=ranks.disks)
        if wanted and file is not None and failure is None:
            digest.update(piece.data)
            try:
                file.write(piece.data)
            except OSError as error:
                failure = f"{path}: {error.strerror}"
    try:
        if file is not None:
            file.close()
        if not wanted:
            return None
        if failure is None and (file is None or digest.hexdigest() != entry["xxh3_128"]):
            failure = f"{path}: could not be written here, or not read on the host that sent it"
        if failure is None:
            flush_to_disk(partial)
            partial.rename(path)
        partial.unlink(missing_ok=True)
    except OSError as error:
        failure = f"{path}: {error.strerror}"
    return failure
