"""Saving, publishing and resuming. A checkpoint becomes visible only when every rank's files are on disk.

The protocol: (1) all ranks save into `step-N.tmp`; (2) each flushes and hashes its files; (3) all meet, which they do
only if all went well; (4) rank 0 writes the manifest; (5) renames the directory; (6) replaces `latest`; (7) removes
old ones.
DeepSpeed's own `latest` is never written: rank 0 would publish it before the other ranks' files are down.
"""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.errors import CheckpointError, list_problems
from codeparrot_ds.files import digest_file, flush_to_disk
from codeparrot_ds.run_directory import Checkpoint, RunDirectory, classes_in_checkpoints, step_of
from codeparrot_ds.training import reshard
from codeparrot_ds.training.engine import silence_prints
from codeparrot_ds.training.metrics import log
from codeparrot_ds.training.ranks import Ranks

_RANK_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_|offloaded_tensors/rank(\d+)/)")  # the rest is rank 0's


def save(
    engine: Any,
    run: RunDirectory,
    checkpoint: Checkpoint,
    keep_last: int,
    ranks: Ranks,
    *,
    keep_every_steps: int | None = None,
) -> None:
    """Save and publish `checkpoint`, whose `files` are filled in here. All ranks must call.

    Raises CheckpointError on a rank that could not write: its end makes the launcher end the others, which may be
    waiting in DeepSpeed's own barrier. Older checkpoints are then untouched.
    """
    unfinished = checkpoint.path.with_name(f"{checkpoint.path.name}.tmp")
    if ranks.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    ranks.gather(None)  # nobody writes before rank 0 has cleared the place
    try:
        state = {"step": checkpoint.step, "samples_seen": checkpoint.samples_seen}
        engine.save_checkpoint(str(run.checkpoints), tag=unfinished.name, client_state=state, save_latest=False)
        files = _flush_and_hash(unfinished, ranks.rank)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        message = f"{unfinished}: rank {ranks.rank} could not save ({error}). Older checkpoints are untouched."
        log.error("%s", message)
        raise CheckpointError(message) from error
    files_of_all_ranks = ranks.gather(files)  # reached by all only when all went well
    if ranks.rank == 0:
        merged = {name: entry for files in files_of_all_ranks for name, entry in files.items()}
        _publish(run, dataclasses.replace(checkpoint, files=merged), unfinished)
        # DeepSpeed's own converters: they load pickles, and nothing here runs them.
        for script in run.checkpoints.glob("zero_to_*.py"):
            script.unlink()
        for old in run.checkpoint_directories()[:-keep_last]:
            if keep_every_steps is None or step_of(old) % keep_every_steps:
                shutil.rmtree(old)
    ranks.gather(None)


def _publish(run: RunDirectory, checkpoint: Checkpoint, unfinished: Path) -> None:
    """Make a checkpoint visible. Raises CheckpointError when a rank's files did not arrive in this directory."""
    absent = [name for name in checkpoint.files if not (unfinished / name).is_file()]
    if absent:
        raise CheckpointError(
            list_problems(
                str(unfinished),
                [f"{name} was written by another host and is not here" for name in absent],
                "Put the run directory on a disk that all hosts share.",
            )
        )
    checkpoint.write(unfinished)
    for directory in (*filter(Path.is_dir, unfinished.rglob("*")), unfinished):
        flush_to_disk(directory)
    shutil.rmtree(checkpoint.path, ignore_errors=True)  # the same step, saved again after a fall-back
    unfinished.rename(checkpoint.path)
    flush_to_disk(run.checkpoints)
    run.point_latest_at(checkpoint.path)


def _flush_and_hash(directory: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and digest of the files that this rank wrote, which are then on disk."""
    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        match = _RANK_FILE.search(name)
        if path.is_file() and (int(match[1] or match[2]) if match else 0) == rank:
            flush_to_disk(path)
            files[name] = {"bytes": path.stat().st_size, "xxh3_128": digest_file(path)}
    return files


def find_resume_point(run: RunDirectory, identity: dict[str, Any]) -> Checkpoint | None:
    """The newest undamaged checkpoint to go on from, or None when the run has none yet. For rank 0 alone.

    Damaged ones are reported and passed over, and renamed so that retention never counts them. Raises
    CheckpointError when all are damaged (never silently back to step 0), or when the newest good one is of another
    model or other data.
    """
    damaged: list[Path] = []
    for directory in reversed(run.checkpoint_directories()):
        try:
            checkpoint = Checkpoint.read(directory)
            checkpoint.verify()
        except CheckpointError as error:
            log.warning("%s", error)
            damaged.append(directory)
            continue
        _check_identity(checkpoint, identity)
        for path in damaged:
            path.rename(path.with_name(f"{path.name}.damaged"))
        return checkpoint
    if damaged:
        raise CheckpointError(
            f"{run.checkpoints}: no undamaged checkpoint is left ({len(damaged)} damaged, see above). Restore one from "
            "a copy, or remove them all to start again from step 0."
        )
    return None


def _check_identity(checkpoint: Checkpoint, wanted: dict[str, Any]) -> None:
    saved = checkpoint.identity
    problems = [
        f"{key}: saved with {saved.get(key)}, now {value}" for key, value in wanted.items() if saved.get(key) != value
    ]
    if problems:
        mend = "Go on with what it was saved with, or start under another name (--set name=…)."
        raise CheckpointError(list_problems(str(checkpoint.path), problems, mend))


def load(engine: Any, checkpoint: Checkpoint, like: Checkpoint, ranks: Ranks) -> None:
    """Load weights and optimizer state; nothing that could run code is unpickled. All ranks must call.

    `like` is what this run would save: a checkpoint of another ZeRO stage, number of ranks, precision or place of
    the optimizer's state is read by parameter. So is any whose optimizer is on NVMe: DeepSpeed 0.19.8 copies its files
    back, but not AdamW's step, forgets its moments, and leaves groups below 1 MiB as they were initialised.
    """
    layout = ("zero_stage", "world_size", "precision", "offload")
    differing = [name for name in layout if getattr(checkpoint, name) != getattr(like, name)]
    if differing:
        for name in differing:
            log.info(
                "%s: saved with %s %s, now %s",
                checkpoint.path.name,
                name.replace("_", " "),
                getattr(checkpoint, name),
                getattr(like, name),
            )
    if differing or checkpoint.offload == "nvme":
        reshard.load(engine, checkpoint, ranks)
        return
    torch.serialization.add_safe_globals(classes_in_checkpoints())
    with silence_prints():
        path, state = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    if path is None or state["samples_seen"] != checkpoint.samples_seen:
        raise CheckpointError(f"{checkpoint.path}: DeepSpeed could not load it. Remove it to go on from an older one.")
