"""How long a checkpoint of GPT-2 xl keeps one GPU waiting. Usage: python gpu_checkpoint.py JOB.json

Three checkpoints in the background, as in a real run, to /dev/shm: the first one copied to page-locked memory, which
has to be locked, one copied to the memory locked before, and one copied to pageable host memory. A row has the seconds
for which training waits for the copy, and those until all files were written.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_job import Job
from gpu_step import ROOT, TINY

from codeparrot_ds.run.directory import Checkpoint
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.train import end
from codeparrot_ds.training import writer
from codeparrot_ds.training.loop import Trainer
from codeparrot_ds.trial import take_steps, trainer_on_random_ids

SHARED_MEMORY = Path("/dev/shm")
SECONDS_A_CHECKPOINT = 20.0  # required to start one


class PageableMemory(writer.LockedBuffers):
    """Host memory as allocated, not locked and not kept."""

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy in host memory."""
        return tensor.detach().to("cpu", copy=True)


def save(trainer: Trainer, step: int) -> dict[str, Any]:
    """Save a checkpoint; return its times in seconds and its size in bytes."""
    trainer.step = step
    torch.cuda.synchronize() if torch.cuda.is_available() else None
    started = time.perf_counter()
    trainer.save()
    copied = time.perf_counter() - started
    trainer.publish()
    saved = trainer.run.checkpoint(step)
    files = Checkpoint.read(saved).files
    return {
        "waited_seconds": copied,
        "seconds": time.perf_counter() - started,
        "bytes": sum(entry["bytes"] for entry in files.values()),
    }


def main() -> None:
    """Save the three checkpoints, while time remains."""
    job = Job.from_command_line()
    tempfile.tempdir = str(SHARED_MEMORY) if os.access(SHARED_MEMORY, os.W_OK) else None
    settings = [f"engine.deepspeed={ROOT}/ds_configs/zero1.json", "model.activation_checkpointing=none"]
    settings += [*(TINY if job.tiny else []), "batch.global_batch_size=1", "batch.micro_batch_size=1"]
    settings += ["checkpoints.keep_last=1"]
    recipe = load_recipe(ROOT / "launch" / "recipes" / "codeparrot-xl.yaml", settings)
    with trainer_on_random_ids(recipe, draw_weights=True) as (trainer, memory):
        trainer.data.digest = "random"  # type: ignore[misc]  # part of the manifest of a checkpoint
        take_steps(trainer, memory, 1)
        locked = trainer.engine.checkpoint_engine._buffers
        copies = {"locked, first": locked, "locked before": locked, "pageable": PageableMemory()}
        for step, (name, buffers) in enumerate(copies.items(), start=1):
            if job.seconds_left < SECONDS_A_CHECKPOINT * (not job.tiny):
                print(f"no time left for {name}", file=sys.stderr, flush=True)
                break
            trainer.engine.checkpoint_engine._buffers = buffers
            job.add(part="checkpoint", memory=name, device=memory.name, **save(trainer, step))


if __name__ == "__main__":
    main()
    end(0)
