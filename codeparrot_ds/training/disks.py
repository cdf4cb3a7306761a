"""Which checkpoint to resume from, whose files lie on one disk, or on those of several hosts.

Without a shared disk, each host has the files that its own ranks wrote.

Every disk has the same manifest, of all files; which of them are there is seen by looking. A directory gets its name
only after every disk has the manifest, so what one disk has published is whole somewhere: what a crash has left
without its name on another can still be given it. A checkpoint is whole when the disks of the hosts that are now there
hold all its files between them; what a rank needs and its own disk lacks is then sent from one that has it.
"""

import contextlib
import math
import shutil
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from codeparrot_ds.errors import CheckpointError, ConfigError, list_problems
from codeparrot_ds.run.directory import Checkpoint, RunDirectory, step_of
from codeparrot_ds.system.files import MANIFEST, digest_file, flush_to_disk, require_free_space
from codeparrot_ds.training.metrics import log
from codeparrot_ds.training.ranks import Ranks

_PIECE_BYTES = 1 << 26


@dataclass(frozen=True)
class _Copy:
    """What one disk has of a checkpoint.

    Attributes:
        digest: of the manifest.
        good: names of the files that are there as they were written.
        problems: of those that are there and are not.
    """

    checkpoint: Checkpoint
    digest: str
    good: frozenset[str]
    problems: dict[str, str]

    @classmethod
    def look(cls, run: RunDirectory, step: int) -> "_Copy | None":
        """Read every file of it that this disk has; None when it has not even a manifest."""
        for path in (run.checkpoint(step), run.unfinished(step)):
            try:
                checkpoint = Checkpoint.read(path)
            except CheckpointError:
                continue
            there = [name for name in checkpoint.files if (path / name).is_file()]
            problems = checkpoint.problems(there)
            return cls(checkpoint, digest_file(path / MANIFEST), frozenset(there) - problems.keys(), problems)
        return None


def find_resume_point(run: RunDirectory, ranks: Ranks, last_step: float = math.inf) -> Checkpoint | None:
    """The newest checkpoint that is whole on all disks together, or None when no disk has any. All ranks must call.

    Every file is read and compared with its digest. Newer checkpoints that are damaged are reported, passed over, and
    set aside on every disk so that retention never counts them. Only those of up to `last_step` steps are looked at.
    Raises CheckpointError on all ranks when there are some and none is whole: a run never starts silently from step 0.
    """
    looks, passed_over = ranks.is_fs_leader, dict[int, list[str]]()
    here = ({step_of(path) for path in run.checkpoint_directories(whole=False)}, run.prepared_steps())
    named, prepared = (set[int]().union(*sets) for sets in zip(*ranks.gather(here), strict=True))
    for step in sorted((step for step in named | prepared if step <= last_step), reverse=True):
        copies: list[_Copy | None] = ranks.gather(_Copy.look(run, step) if looks else None)
        chosen, problems = _choose(copies)
        if chosen is None:
            if step in named:  # else its saving was never finished anywhere
                passed_over[step] = problems
                if ranks.rank == 0:
                    mend = "Training goes on from the checkpoint before it."
                    log.warning("%s", list_problems(str(run.checkpoint(step)), problems, mend))
            continue
        failure = None
        if looks:
            try:
                for passed in passed_over:
                    run.set_aside(run.checkpoint(passed))
                _complete(run, chosen, copies[ranks.rank])
            except OSError as error:
                failure = CheckpointError(f"{error.filename or run.checkpoints}: {error.strerror}")
        ranks.agree(failure)
        return Checkpoint.read(run.checkpoint(step))
    if passed_over:
        mend = "Restore one from a copy, or remove them all to start again from step 0."
        if ranks.on_many_disks:
            mend = "Start with the hosts that have those files, in any order and number. Or: " + mend
        raise CheckpointError(
            list_problems(
                f"{run.checkpoints}: no undamaged checkpoint is left ({len(passed_over)} damaged)",
                [f"step {step}: {problem}" for step, problems in passed_over.items() for problem in problems],
                mend,
            )
        )
    return None


def _choose(copies: Sequence[_Copy | None]) -> tuple[_Copy | None, list[str]]:
    """A copy of the checkpoint that is whole on all disks together, or what is wrong with all.

    Copies with another manifest are of another run, or of another attempt at the step. What most disks have counts.
    """
    by_manifest = defaultdict[str, list[_Copy]](list)
    for copy in copies:
        if copy is not None:
            by_manifest[copy.digest].append(copy)
    problems: list[str] = []
    for same in sorted(by_manifest.values(), key=len, reverse=True):
        files, good = same[0].checkpoint.files, frozenset[str]().union(*(copy.good for copy in same))
        if good >= files.keys():
            return same[0], []
        damaged = {name: problem for copy in same for name, problem in copy.problems.items() if name not in good}
        problems += damaged.values()
        missing = defaultdict[str | None, list[str]](list)
        for name in files.keys() - good - damaged.keys():
            missing[files[name].get("host")].append(name)
        problems += [f"{name} is missing" for name in sorted(missing.pop(None, []))]  # written to a shared disk
        problems += [
            f"{len(names)} files that {host} wrote are on none of these hosts, such as {min(names)}"
            for host, names in sorted(missing.items(), key=str)
        ]
    return None, problems or ["no readable manifest, so this is no complete checkpoint"]


def _complete(run: RunDirectory, chosen: _Copy, mine: _Copy | None) -> None:
    """Have this disk's copy under its name, without what is damaged."""
    step = chosen.checkpoint.step
    if mine is None or mine.digest != chosen.digest:
        run.set_aside(run.checkpoint(step))
        shutil.rmtree(run.unfinished(step), ignore_errors=True)
        run.unfinished(step).mkdir(parents=True)
        chosen.checkpoint.write(run.unfinished(step))
        run.publish(step)
        return
    for name in mine.problems:
        (mine.checkpoint.path / name).unlink()
    if mine.checkpoint.path == run.unfinished(step):
        run.publish(step)


def fetch(checkpoint: Checkpoint, ranks: Ranks, needed: Collection[str]) -> None:
    """Have the files that this rank has `needed` on its own disk. All ranks must call, each with its own names.

    Raises CheckpointError on all ranks when one could not be read or written.
    """
    there = {name for name in checkpoint.files if (checkpoint.path / name).is_file()}
    everyone = ranks.gather((there, set(needed) - there))
    failure = None
    lacking_here = set().union(*(lacking for rank, (_, lacking) in enumerate(everyone) if ranks.shares_disk(rank)))
    try:
        needed_bytes = sum(checkpoint.files[name]["bytes"] for name in lacking_here)
        require_free_space(checkpoint.path, needed_bytes, "what other hosts have of this checkpoint")
    except ConfigError as error:
        failure = CheckpointError(str(error))
    ranks.agree(failure)
    if ranks.is_fs_leader:
        for name in sorted(set().union(*(lacking for _, lacking in everyone))):
            sources = [rank for rank in sorted(set(ranks.disk_of)) if name in everyone[rank][0]]
            if sources:
                problem = _transfer(checkpoint, name, sources[0], ranks, name in lacking_here)
            else:
                problem = f"{checkpoint.path / name}: is gone from all disks since it was looked at"
            if problem is not None:
                failure = CheckpointError(problem)
    ranks.agree(failure)


def _transfer(checkpoint: Checkpoint, name: str, source: int, ranks: Ranks, wanted: bool) -> str | None:
    """Send one file from the rank `source` to all disks, and keep it if it is `wanted`. What went wrong, if anything.

    Each takes part to the end, whatever goes wrong: the others would wait.
    """
    path, entry = checkpoint.path / name, checkpoint.files[name]
    beside, digest, failure = path.with_name(f"{path.name}.tmp"), xxhash.xxh3_128(), None
    file: Any = None
    with contextlib.suppress(OSError):  # a file that was not read does not arrive as it was written, and is refused
        if wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = beside.open("wb")
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
            failure = f"{path}: could not be written here, or not be read there"
        if failure is None:
            flush_to_disk(beside)
            beside.rename(path)
        beside.unlink(missing_ok=True)
    except OSError as error:
        failure = f"{path}: {error.strerror}"
    return failure
