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
from codeparrot_ds.run_directory import Checkpoint, RunDirectory
from codeparrot_ds.training.metrics import log
from codeparrot_ds.training.ranks import Ranks

_RANK_FILE = re.compile(r"zero_pp_rank_(\d+)_")


def save(engine: Any, run: RunDirectory, checkpoint: Checkpoint, keep_last: int, ranks: Ranks) -> None:
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
        published = dataclasses.replace(checkpoint, files=merged)
        published.write(unfinished)
        flush_to_disk(unfinished)
        shutil.rmtree(published.path, ignore_errors=True)  # the same step, saved again after a fall-back
        unfinished.rename(published.path)
        flush_to_disk(run.checkpoints)
        run.point_latest_at(published.path)
        for script in run.checkpoints.glob(
            "zero_to_*.py"
        ):  # DeepSpeed's: they load pickles, and nothing here runs them
            script.unlink()
        _remove_old(run, keep_last)
    ranks.gather(None)


def _flush_and_hash(directory: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and digest of the files that this rank wrote, which are then on disk."""
    files = {}
    for path in sorted(directory.iterdir()):
        match = _RANK_FILE.search(path.name)
        if (int(match[1]) if match else 0) == rank:
            flush_to_disk(path)
            files[path.name] = {"bytes": path.stat().st_size, "xxh3_128": digest_file(path)}
    return files


def _remove_old(run: RunDirectory, keep_last: int) -> None:
    for old in run.complete_checkpoints()[:-keep_last]:
        shutil.rmtree(old.path)


def find_resume_point(
    run: RunDirectory, identity: dict[str, Any], zero_stage: int, world_size: int
) -> Checkpoint | None:
    """The newest undamaged checkpoint to go on from, or None when the run has none yet.

    A damaged one is reported and passed over. Raises CheckpointError when all are damaged (never silently back to
    step 0), or when the newest is of another model, other data, another ZeRO stage or another number of ranks.
    """
    found = run.complete_checkpoints()
    wanted = {**identity, "ZeRO stage": zero_stage, "number of ranks": world_size}
    for checkpoint in reversed(found):
        try:
            checkpoint.verify()
        except CheckpointError as error:
            log.warning("%s", error)
            continue
        saved = {
            **checkpoint.identity,
            "ZeRO stage": checkpoint.zero_stage,
            "number of ranks": checkpoint.world_size,
        }
        problems = [
            f"{key}: saved with {saved.get(key)}, now {value}"
            for key, value in wanted.items()
            if saved.get(key) != value
        ]
        if problems:
            mend = "go on with what it was saved with, or start under another name (--set name=…)"
            raise CheckpointError(list_problems(str(checkpoint.path), [*problems, mend]))
        return checkpoint
    if found:
        raise CheckpointError(
            f"{run.checkpoints}: none of the {len(found)} checkpoints is undamaged (see above). Restore one from a "
            "copy, or remove them all to start again from step 0."
        )
    return None


def load(engine: Any, checkpoint: Checkpoint) -> None:
    """Load weights and optimizer state; only tensors and the few classes below are unpickled. All ranks must call."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address])
    path, state = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    if path is None or state["samples_seen"] != checkpoint.samples_seen:
        raise CheckpointError(f"{checkpoint.path}: DeepSpeed could not load it. Remove it to go on from an older one.")
