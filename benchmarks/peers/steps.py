"""What the drivers of the step benchmark share: the job that they are given, its batches, what they report.

A driver trains GPT-2 over batches that lie ready, on every rank that `deepspeed` starts, and notes when each optimizer
step ended. None of it is ours but the resolved DeepSpeed JSON.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel


@dataclass(frozen=True)
class Job:
    """One run of a driver, as benchmarks/step.py writes it down.

    Attributes:
        model: arguments of GPT2Config.
        ds_config: resolved DeepSpeed JSON, the one that our run takes.
        batches: file of all ids, [steps, global_batch_size, seq_len + 1] int64, in the order of our run.
        output: receives the report of rank 0.
    """

    model: dict[str, Any]
    activation_checkpointing: bool
    ds_config: str
    batches: str
    steps: int
    log_every: int
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    gradient_clipping: float
    precision: str
    seed: int
    output: str

    @property
    def engine(self) -> dict[str, Any]:
        """The DeepSpeed JSON."""
        return json.loads(Path(self.ds_config).read_text())

    def ids(self) -> torch.Tensor:
        """All ids, [steps, global_batch_size, seq_len + 1] int64, read into memory."""
        return torch.from_numpy(np.load(self.batches))

    def network(self) -> GPT2LMHeadModel:
        """The model with Hugging Face's initial weights."""
        torch.manual_seed(self.seed)
        network = GPT2LMHeadModel(GPT2Config(**self.model, use_cache=False, attn_implementation="sdpa"))
        if self.activation_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        return network

    def optimizer(self, network: torch.nn.Module) -> torch.optim.AdamW:
        """torch's fused AdamW, weight decay for matrices and embeddings only."""
        decayed = [parameter for parameter in network.parameters() if parameter.dim() >= 2]
        plain = [parameter for parameter in network.parameters() if parameter.dim() < 2]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True)


def read_job() -> Job:
    """The job named on the command line; DeepSpeed's preparation for CPU ranks is cut short."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("--local_rank", type=int, help="set by deepspeed")
    body = json.loads(parser.parse_args().job.read_text())
    import deepspeed

    # An operator for inference that DeepSpeed would compile for CPU ranks at the start: 100 s, and no part of a step.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return Job(**body)


def tell_accelerate_the_backend() -> None:
    """On CPU ranks Accelerate takes each for a run of its own, unless its state is made with a backend beforehand."""
    if torch.cuda.is_available():
        return
    from accelerate import PartialState  # type: ignore[import-not-found, unused-ignore]

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


@dataclass
class Stopwatch:
    """When each optimizer step ended, Unix time in seconds, and the losses of this rank's micro-batches, unread."""

    ends: list[float] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)

    def tick(self) -> None:
        """An optimizer step has ended, once the GPU has done it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.time())

    def report(self, job: Job, last_loss: float | None = None) -> None:
        """Write everything down on rank 0, and end all ranks without Python's finalisation.

        last_loss: mean over the last `log_every` steps of all ranks, where the loop itself has made it.
        """
        if last_loss is None:
            each = torch.stack(self.losses)
            last = each[-job.log_every * len(each) // job.steps :].mean()
            torch.distributed.all_reduce(last)
            last_loss = last.item() / torch.distributed.get_world_size()
        if torch.distributed.get_rank() == 0:
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
            report = {"ends": self.ends, "last_loss": last_loss, "peak_bytes": peak}
            Path(job.output).write_text(json.dumps(report))
        torch.distributed.barrier()
        os._exit(0)  # gloo's threads sometimes abort a finalising Python 3.11
