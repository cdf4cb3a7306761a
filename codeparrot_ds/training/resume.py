"""Choice of the checkpoint to resume from, with its files on one disk or distributed over the disks of several hosts.

Without a shared disk, each host has the files that its own ranks wrote.

Every disk has the same manifest of all files, and is scanned for those it holds. A disk publishes a checkpoint (renames
its directory) only after every disk has the manifest, so a checkpoint published on one disk was completely written; a
directory that a crash left unpublished on another disk can still be published. A checkpoint is complete when the disks
of the current hosts together hold all its files.
"""

import math
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from codeparrot_ds.errors import CheckpointError, list_problems
from codeparrot_ds.run.directory import Checkpoint, RunDirectory, step_of
from codeparrot_ds.system.files import MANIFEST, digest_file
from codeparrot_ds.training.metrics import log
from codeparrot_ds.training.ranks import Ranks


@dataclass(frozen=True)
class _Copy:
    """The files of a checkpoint on one disk.

    Attributes:
        checkpoint: its manifest.
        digest: digest of the manifest file.
        good: names of the files that are present and undamaged.
        problems: name -> problem, for files that are present but damaged.
    """

    checkpoint: Checkpoint
    digest: str
    good: frozenset[str]
    problems: dict[str, str]

    @classmethod
    def inspect(cls, run: RunDirectory, step: int) -> "_Copy | None":
        """Verify every file of the checkpoint that this disk has; None without a readable manifest."""
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
    """Return the newest checkpoint that is complete over all disks, or None if there is none at all.

    Collective: all ranks must call. Every file is read and compared with its digest. Newer checkpoints that are damaged
    are reported, skipped, and set aside on every disk so that retention does not count them. Only checkpoints of up to
    `last_step` steps are considered.

    Raises:
        CheckpointError: on all ranks, when checkpoints exist but none is complete. A run never silently restarts from
            step 0.
    """
    reads, damaged = ranks.is_fs_leader, dict[int, list[str]]()
    here = ({step_of(path) for path in run.checkpoint_directories(whole=False)}, run.prepared_steps())
    named, prepared = (set[int]().union(*sets) for sets in zip(*ranks.gather(here), strict=True))
    for step in sorted((step for step in named | prepared if step <= last_step), reverse=True):
        copies: list[_Copy | None] = ranks.gather(_Copy.inspect(run, step) if reads else None)
        chosen, problems = _choose(copies)
        if chosen is None:
            if step in named:  # otherwise no disk finished saving it
                damaged[step] = problems
                if ranks.rank == 0:
                    fix = "Training resumes from the previous checkpoint."
                    log.warning("%s", list_problems(str(run.checkpoint(step)), problems, fix))
            continue
        failure = None
        if reads:
            try:
                for each in damaged:
                    run.set_aside(run.checkpoint(each))
                _complete(run, chosen, copies[ranks.rank])
            except OSError as error:
                failure = CheckpointError(f"{error.filename or run.checkpoints}: {error.strerror}")
        ranks.agree(failure)
        return Checkpoint.read(run.checkpoint(step))
    if damaged:
        fix = "Restore one from a backup, or remove them all to restart from step 0."
        if ranks.on_many_disks:
            fix = "Run on the hosts that have those files, in any order and number. Otherwise: " + fix
        raise CheckpointError(
            list_problems(
                f"{run.checkpoints}: no undamaged checkpoint is left ({len(damaged)} damaged)",
                [f"step {step}: {problem}" for step, problems in damaged.items() for problem in problems],
                fix,
            )
        )
    return None


def _choose(copies: Sequence[_Copy | None]) -> tuple[_Copy | None, list[str]]:
    """Return a copy of the checkpoint if it is complete over all disks, or else the problems of all copies.

    Copies with different manifests are from different runs or attempts at the step. The most common manifest is tried
    first.
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
            f"{len(names)} files written by {host} are on none of these hosts, e.g. {min(names)}"
            for host, names in sorted(missing.items(), key=str)
        ]
    return None, problems or ["no readable manifest, so the checkpoint is incomplete"]


def _complete(run: RunDirectory, chosen: _Copy, mine: _Copy | None) -> None:
    """Publish this disk's copy if necessary, and remove its damaged files."""
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
