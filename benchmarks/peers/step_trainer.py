"""Hugging Face's Trainer with a DeepSpeed JSON. Usage: deepspeed step_trainer.py JOB.json, or python for one rank

Uses the Trainer's data loader, collator, logging and clipping; no evaluation, checkpoints or TensorBoard. Its NaN
filter is disabled, because it reads each micro-batch's loss on the host. The Trainer still reads the gradient norm at
every step, and logs a step after its end was recorded, so a log line counts towards the next step. Labels are the
inputs, which GPT-2 shifts itself: one target fewer per sequence than ours.
"""

import os
import tempfile
from typing import Any

import torch
from standalone import memory_may_run_out
from steps import Job, Stopwatch, read_job, tell_accelerate_the_backend
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments


class Sequences(Dataset):
    """A dataset of rows of ids in memory, [sequences, seq_len + 1]."""

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[i, :-1], "labels": self._ids[i, :-1]}


class Watch(TrainerCallback):
    """Records the end of each optimizer step."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer."""
        self.stopwatch.report.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer."""
        self.stopwatch.tick()


def main() -> None:
    """Train on the job's batches."""
    job = read_job()
    stopwatch = Stopwatch(job)
    with memory_may_run_out(stopwatch.report):
        stopwatch.finish(train(job, stopwatch))
    os._exit(0)  # out of memory: do not wait for other ranks or buffers


def train(job: Job, stopwatch: Stopwatch) -> float:
    """Train on the job's batches and return the last logged loss."""
    tell_accelerate_the_backend()
    engine = job.engine
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        deepspeed=engine,
        accelerator_config={"use_configured_state": not torch.cuda.is_available()},
        max_steps=job.steps,
        per_device_train_batch_size=engine["train_micro_batch_size_per_gpu"],
        gradient_accumulation_steps=engine["gradient_accumulation_steps"],
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
        learning_rate=job.learning_rate,
        adam_beta1=job.betas[0],
        adam_beta2=job.betas[1],
        adam_epsilon=job.eps,
        weight_decay=job.weight_decay,
        max_grad_norm=job.gradient_clipping,
        lr_scheduler_type="constant",
        bf16=job.precision == "bf16",
        use_cpu=job.precision == "bf16" and not torch.cuda.is_available(),
        gradient_checkpointing=job.activation_checkpointing,
        logging_steps=job.log_every or job.steps,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        seed=job.seed,
    )
    ids = job.ids().flatten(0, 1)
    trainer = Trainer(job.network(), arguments, train_dataset=Sequences(ids), callbacks=[Watch(stopwatch)])
    trainer.train()
    losses: list[float] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses[-1]


if __name__ == "__main__":
    main()
