"""The training loop. Read `Trainer.fit` first, then `train_step`."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from codeparrot_ds.recipe import Recipe
from codeparrot_ds.run_directory import Checkpoint, RunDirectory
from codeparrot_ds.shards.order import BlendedOrder, Order
from codeparrot_ds.shards.sequences import Dataset, batch_digest
from codeparrot_ds.shards.validation import perplexity, validation_sequences
from codeparrot_ds.training import checkpoint as checkpoints
from codeparrot_ds.training.engine import learning_rate
from codeparrot_ds.training.metrics import Metrics, log
from codeparrot_ds.training.model import next_token_loss
from codeparrot_ds.training.ranks import Ranks


@dataclass
class Step:
    """One optimizer step as this rank saw it; summed over ranks only when it is logged."""

    step: int
    loss: torch.Tensor  # [] mean over this rank's tokens, on the device: reading it would wait for the device
    digest: int  # of the ids this rank fed
    learning_rate: float
    gradient_norm: Any
    skipped_steps: int  # so far, by the engine, for overflow
    seconds: float


@dataclass
class Trainer:
    """A run under way. `step` and `samples_seen` are its whole position.

    Attributes:
        engine: DeepSpeed's.
        data: its digest goes into checkpoints, so that a resumed run is held to the same data.
        metrics: on rank 0 only.
        step: optimizer steps taken.
    """

    recipe: Recipe
    ranks: Ranks
    engine: Any
    data: Dataset
    parameters: int
    run: RunDirectory
    metrics: Metrics | None
    step: int = 0
    loss_valid: float | None = None
    _unlogged: list[Step] = field(default_factory=list)

    @property
    def samples_seen(self) -> int:
        """Sequences taken from the order so far: the position in the data."""
        return self.step * self.recipe.batch.global_batch_size

    def fit(self) -> None:
        """Train to the recipe's last step, evaluating, logging and saving on the way."""
        recipe, last = self.recipe, self.recipe.schedule.steps
        order = self.data.order(recipe.seed)
        if self.step == 0:
            self.evaluate()
        while self.step < last:
            self._unlogged.append(self.train_step(order))
            self.step += 1
            done = self.step == last
            if self.step % recipe.logging.every_steps == 0 or done:
                self.write_log()
            if self.step % recipe.evaluation.every_steps == 0 or done:
                self.write_log()
                self.evaluate()
            if self.step % recipe.checkpoints.every_steps == 0 or done:
                self.write_log()
                self.save()

    def train_step(self, order: Order | BlendedOrder) -> Step:
        """One optimizer step over the global batch, of which this rank takes its slice."""
        started = time.perf_counter()
        engine, batch = self.engine, self.recipe.batch
        rate = learning_rate(self.recipe.schedule, self.recipe.optimizer.learning_rate, self.step)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        if self.recipe.model.dropout:  # a function of the position, so that a resumed run draws the same
            words = np.random.SeedSequence([self.recipe.seed, self.step, self.ranks.rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(words[0]) >> 1)
        micro, accumulation = batch.micro_batch_and_accumulation(self.ranks.world_size)
        numbers = order.take(self.samples_seen, batch.global_batch_size)
        mine = self.data.train.batch(numbers[self.ranks.slice(micro * accumulation)])
        loss = torch.zeros((), device=self.ranks.device)
        for ids in mine.reshape(accumulation, micro, -1):
            micro_loss = self.loss(torch.from_numpy(ids))
            engine.backward(micro_loss)  # divides by the accumulation steps itself
            engine.step()  # acts on the last micro-batch only
            loss += micro_loss.detach() / accumulation
        norm = engine.get_global_grad_norm()
        seconds = time.perf_counter() - started
        return Step(self.step, loss, batch_digest(mine), rate, norm, engine.skipped_steps, seconds)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of a micro-batch, nats per token. ids: [sequences, seq_len + 1] int64."""
        ids = ids.to(self.ranks.device, non_blocking=True)
        logits = self.engine(input_ids=ids[:, :-1]).logits
        return next_token_loss(logits, ids[:, 1:])

    def write_log(self) -> None:
        """Sum the steps not yet logged over ranks and write a row each. All ranks must call."""
        steps, self._unlogged = self._unlogged, []
        if not steps:
            return
        losses = self.ranks.sum(torch.stack([step.loss for step in steps]).double()) / self.ranks.world_size
        signed = [step.digest - (1 << 64) if step.digest >> 63 else step.digest for step in steps]
        digests = self.ranks.sum(torch.tensor(signed, device=self.ranks.device))
        if self.metrics is None:
            return
        batch_size = self.recipe.batch.global_batch_size
        tokens_per_step = batch_size * self.recipe.model.seq_len
        for step, loss, digest in zip(steps, losses.tolist(), digests.tolist(), strict=True):
            self.metrics.step(
                {
                    "step": step.step,
                    "loss": loss,
                    "learning_rate": step.learning_rate,
                    "gradient_norm": None if step.gradient_norm is None else float(step.gradient_norm),
                    "step_seconds": step.seconds,
                    "tokens_per_second": tokens_per_step / step.seconds,
                    "samples_seen": (step.step + 1) * batch_size,
                    "tokens_seen": (step.step + 1) * tokens_per_step,
                    "skipped_steps": step.skipped_steps,
                    "batch_digest": f"{digest & 0xFFFF_FFFF_FFFF_FFFF:016x}",
                }
            )
        seconds = sum(step.seconds for step in steps)
        log.info(
            "step %d of %d: loss %.4f, learning rate %.2e, %s tokens/s",
            self.step,
            self.recipe.schedule.steps,
            losses[-1].item(),
            steps[-1].learning_rate,
            f"{len(steps) * tokens_per_step / seconds:,.0f}",
        )

    def evaluate(self) -> None:
        """Validation loss over the fixed validation sequences, the same at any world size. All ranks must call."""
        numbers = validation_sequences(len(self.data.valid), self.recipe.evaluation.sequences)
        micro, _ = self.recipe.batch.micro_batch_and_accumulation(self.ranks.world_size)
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)  # sum of losses, sequences
        self.engine.eval()
        with torch.no_grad():
            for start in range(0, len(numbers), micro * self.ranks.world_size):
                # Every rank must take part in every ZeRO-3 forward: one without a share repeats a sequence, unweighted.
                block = numbers[start : start + micro * self.ranks.world_size]
                mine = block[self.ranks.rank :: self.ranks.world_size]
                loss = self.loss(torch.from_numpy(self.data.valid.batch(mine if len(mine) else block[:1])))
                total += torch.stack([loss.double() * len(mine), torch.tensor(float(len(mine))).to(loss)])
        self.engine.train()
        loss_sum, sequences = self.ranks.sum(total).tolist()
        self.loss_valid = loss_sum / sequences
        if self.metrics is not None:
            self.metrics.evaluation(self.step, self.loss_valid, perplexity(self.loss_valid))

    def save(self) -> None:
        """Publish a checkpoint of this step. All ranks must call."""
        evaluated = self.step % self.recipe.evaluation.every_steps == 0 or self.step == self.recipe.schedule.steps
        checkpoint = Checkpoint(
            path=self.run.checkpoint(self.step),
            step=self.step,
            samples_seen=self.samples_seen,
            parameters=self.parameters,
            zero_stage=self.engine.zero_optimization_stage(),
            world_size=self.ranks.world_size,
            precision=self.recipe.engine.precision,
            identity=self.recipe.identity(self.data.digest),
            files={},
            loss_valid=self.loss_valid if evaluated else None,
        )
        checkpoints.save(self.engine, self.run, checkpoint, self.recipe.checkpoints.keep_last, self.ranks)
        log.info("step %d: checkpoint %s", self.step, checkpoint.path)
