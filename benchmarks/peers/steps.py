"""Shared by the drivers of the step benchmark: their job, its batches, and their report.

A driver trains GPT-2 on preloaded batches, on every rank that `deepspeed` starts or on one without a launcher, and
records when each optimizer step ended. Nothing in it is ours except the DeepSpeed JSON.
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from standalone import Report, become_one_rank
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Job:
    """Settings of a driver run, written by benchmarks/step.py; the first four keys and `output` suffice.

    Attributes:
        model: arguments of GPT2Config; or {"vocab_size", "seq_len", "n_layer", "n_embd", "n_head"}, without dropout.
        steps: optimizer steps, warm-up included.
        micro_batch: sequences per rank, replaces `auto` in the DeepSpeed JSON.
        accumulation: micro-batches per step, likewise.
        output: file for the report of rank 0, see standalone.py, with `last_loss`.
        ds_config: DeepSpeed JSON, the resolved one of our run, or one with `auto`; default ZeRO-1.
        batches: file of all ids, [steps, global_batch_size, seq_len + 1] int64, in the order of our run; default
            random.
        log_every: in steps; default once at the end.
    """

    model: dict[str, Any]
    steps: int
    output: str
    micro_batch: int = 1
    accumulation: int = 1
    activation_checkpointing: bool = False
    ds_config: str = str(ROOT / "ds_configs" / "zero1.json")
    batches: str | None = None
    log_every: int = 0
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0
    precision: str = "bf16"
    seed: int = 0

    @property
    def engine(self) -> dict[str, Any]:
        """The DeepSpeed JSON with every `auto` replaced."""
        config = json.loads(Path(self.ds_config).read_text(encoding="utf-8"))
        values = {
            "train_batch_size": self.micro_batch * self.accumulation * int(os.environ["WORLD_SIZE"]),
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.gradient_clipping,
        }
        config |= {key: value for key, value in values.items() if config.get(key) == "auto"}
        for precision in ("bf16", "fp16"):
            if config.get(precision, {}).get("enabled") == "auto":
                config[precision]["enabled"] = self.precision == precision
        return config

    @property
    def shape(self) -> dict[str, Any]:
        """Arguments of GPT2Config."""
        if "seq_len" not in self.model:
            return self.model
        kept = ("vocab_size", "n_layer", "n_embd", "n_head", "scale_attn_by_inverse_layer_idx")
        return {
            "n_positions": self.model["seq_len"],
            **{key: self.model[key] for key in kept if key in self.model},
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }

    def ids(self) -> torch.Tensor:
        """Load all ids into memory, [steps, global_batch_size, seq_len + 1] int64."""
        if self.batches is not None:
            return torch.from_numpy(np.load(self.batches))
        size = (self.steps, self.engine["train_batch_size"], self.shape["n_positions"] + 1)
        return torch.from_numpy(np.random.default_rng(self.seed).integers(self.shape["vocab_size"], size=size))

    def network(self) -> GPT2LMHeadModel:
        """Build the model with Hugging Face's initial weights, on this rank's GPU if there is one."""
        torch.manual_seed(self.seed)
        with torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"):
            network = GPT2LMHeadModel(GPT2Config(**self.shape, use_cache=False, attn_implementation="sdpa"))
        if self.activation_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        return network

    def optimizer(self, network: torch.nn.Module) -> torch.optim.AdamW:
        """Build torch's fused AdamW, with weight decay for matrices and embeddings only."""
        decayed = [parameter for parameter in network.parameters() if parameter.dim() >= 2]
        plain = [parameter for parameter in network.parameters() if parameter.dim() < 2]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True)


def read_job() -> Job:
    """Read the job named on the command line, and skip DeepSpeed's operator build for CPU ranks.

    Without a launcher this process becomes the only rank.
    """
    become_one_rank()
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("--local_rank", type=int, help="set by deepspeed")
    body = json.loads(parser.parse_args().job.read_text())
    import deepspeed

    # DeepSpeed would compile an inference operator for CPU ranks at the start: 100 s, not used in a step.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return Job(**body)


def tell_accelerate_the_backend() -> None:
    """Create Accelerate's state with a backend; otherwise it treats each CPU rank as a separate run."""
    if torch.cuda.is_available():
        return
    from accelerate import PartialState  # type: ignore[import-not-found, unused-ignore]

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


class Stopwatch:
    """The report of a driver, and the losses of this rank's micro-batches as unread tensors."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.report = Report(job.output)
        self.losses: list[torch.Tensor] = []

    def tick(self) -> None:
        """Record the end of an optimizer step, after the GPU has finished it."""
        self.report.step_ended()

    def finish(self, last_loss: float | None = None) -> None:
        """Write the report on rank 0, and end all ranks without Python's finalization.

        Args:
            last_loss: mean over the last `log_every` steps of all ranks, if the loop has already computed it.
        """
        if last_loss is None:
            each = torch.stack(self.losses)
            last = each[-self._job.log_every * len(each) // self._job.steps :].mean()
            torch.distributed.all_reduce(last)
            last_loss = last.item() / torch.distributed.get_world_size()
        self.report.write(last_loss=last_loss)
        torch.distributed.barrier()
        os._exit(0)  # gloo's threads sometimes abort a finalising Python 3.11
