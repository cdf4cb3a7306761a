"""The training loop. Read `Trainer.fit` first, then `train_step`."""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from codeparrot_ds.errors import CheckpointError, TrainingError
from codeparrot_ds.run.directory import Checkpoint, RunDirectory
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.shards.inspect import describe_sequences
from codeparrot_ds.shards.order import BlendedOrder, Order, positions_of_step
from codeparrot_ds.shards.sequences import Dataset, batch_digest
from codeparrot_ds.shards.validation import perplexity, validation_sequences
from codeparrot_ds.system.files import write_json
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.training import checkpoint as checkpoints
from codeparrot_ds.training.engine import exact_matmul, forget_trace
from codeparrot_ds.training.guards import (
    SkippedSteps,
    SpikeDetector,
    StopRequests,
    Watchdog,
    replicas_differ,
)
from codeparrot_ds.training.metrics import Instant, Metrics, Step, log, peak_memory_bytes, read_tensors
from codeparrot_ds.training.ranks import Ranks
from codeparrot_ds.training.resume import find_resume_point
from codeparrot_ds.training.settings import record_changes

_GO_BACK_STEPS = 8  # steps up to a spike whose samples may have caused it
_MAX_GO_BACKS = 5


@dataclass
class Trainer:
    """State of a run in progress. Its position is determined by `step` alone.

    Attributes:
        engine: the DeepSpeed engine.
        data: the shards. Their digest is stored in checkpoints, so that a run can only resume on the same data.
        parameters: number of model parameters.
        metrics: on rank 0 only.
        offload: location of the optimizer state: "none", "cpu" or "nvme".
        step: optimizer steps taken.
        skipped_ranges: ranges of the sample order that are not trained on.
        on_published: called with the step of each published checkpoint; on rank 0 only.
        settings: of the run, stored in its checkpoints; see changes.py.
        loss_valid: latest validation loss, nats per token; None before the first evaluation.
    """

    recipe: Recipe
    ranks: Ranks
    engine: Any
    data: Dataset
    parameters: int
    run: RunDirectory
    metrics: Metrics | None
    watchdog: Watchdog
    stop_requests: StopRequests
    offload: str = "none"
    step: int = 0
    skipped_ranges: list[tuple[int, int]] = field(default_factory=list)
    on_published: Callable[[int], None] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    loss_valid: float | None = None
    _unlogged: list[Step] = field(default_factory=list)
    _go_backs: int = 0
    _saving: checkpoints.Saving | None = None
    _stalled_seconds: float = 0.0

    def __post_init__(self) -> None:
        guards = self.recipe.guards
        self._skipped = SkippedSteps(guards.max_skipped_steps, self.engine.skipped_steps)
        self._spikes = SpikeDetector(guards.spike_threshold)
        self._saved_at, self._saved_step = time.monotonic(), self.step
        self._order: Order | BlendedOrder = self.data.order(self.recipe.seed)

    @property
    def samples_seen(self) -> int:
        """Number of sequences trained on: the position in the order, not counting skipped ranges."""
        return self.step * self.recipe.batch.global_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all ranks."""
        return self.recipe.batch.global_batch_size * self.recipe.model.seq_len

    def fit(self) -> bool:
        """Train to the recipe's last step, with evaluation, logging and checkpoints. False when stopped on request."""
        recipe, last = self.recipe, self.recipe.schedule.last_step
        if self.step == 0:
            self.evaluate()
            forget_trace(self.engine)
        while self.step < last:
            self._unlogged.append(self.train_step())
            self.step += 1
            done = self.step == last
            stop, save_now, writing = self.stop_requests.finish_exchange()
            if not writing:
                self.publish()
            save_now = save_now or stop or done or self.step % recipe.checkpoints.every_steps == 0
            evaluate = done or self.step % recipe.evaluation.every_steps == 0
            if save_now or evaluate or self.step % recipe.logging.every_steps == 0:
                spike = self.write_log()
                if spike is not None and self.handle_spike(*spike):
                    continue
            if evaluate:
                self.evaluate()
            if save_now:
                self.save(last=done or stop)
            if stop and not done:
                log.warning("step %d: saved and stopped. Reason: %s", self.step, self.stop_requests.reason)
                return False
        return True

    def train_step(self) -> Step:
        """Take one optimizer step on this rank's slice of the global batch."""
        started, started_on_host = Instant(self.ranks.device), time.perf_counter()
        self.watchdog.beat(f"step {self.step}")
        engine, batch = self.engine, self.recipe.batch
        rate = self.recipe.optimizer.learning_rate * self.recipe.schedule.ratio(self.step)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        if self.recipe.model.dropout:  # seeded by position, so that a resumed run draws the same masks
            words = np.random.SeedSequence([self.recipe.seed, self.step, self.ranks.rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(words[0]) >> 1)
        micro, accumulation = batch.micro_batch_and_accumulation(self.ranks.world_size)
        mine = self.data.train.batch(self.sequences(self.step)[self.ranks.slice(micro * accumulation)])
        digest = batch_digest(mine)
        data_seconds = time.perf_counter() - started_on_host
        loss = torch.zeros((), device=self.ranks.device)
        for number, ids in enumerate(self._on_device(mine).view(accumulation, micro, -1), start=1):
            micro_loss = self.loss(ids)
            engine.backward(micro_loss)  # divides by the number of accumulation steps itself
            loss += micro_loss.detach() / accumulation
            if number == 1 and self.metrics is not None:
                elapsed = time.perf_counter() - started_on_host
                self.metrics.first_micro_batch(self.step, accumulation, elapsed, self.ranks.device)
            if number == accumulation:
                self._check_replicas()
                writing = self._saving is not None and self._saving.busy
                self.stop_requests.begin_exchange(self._checkpoint_is_old(), writing)
            engine.step()  # updates the weights only after the last micro-batch
        norm, skipped = engine.get_global_grad_norm(), engine.skipped_so_far()
        return Step(self.step, loss, digest, rate, norm, skipped, started, Instant(self.ranks.device), data_seconds)

    def _on_device(self, ids: np.ndarray) -> torch.Tensor:
        """Copy `ids` to the device. On a GPU the copy is asynchronous, from pinned memory."""
        on_host = torch.from_numpy(ids)
        if self.ranks.device.type == "cuda":
            on_host = on_host.pin_memory()
        return on_host.to(self.ranks.device, non_blocking=True)

    def sequences(self, step: int) -> np.ndarray:
        """Return the indices of the training sequences of optimizer step `step`, [global_batch_size] int64."""
        return self._order.at(self._positions(step))

    def _positions(self, step: int) -> np.ndarray:
        return positions_of_step(step, self.recipe.batch.global_batch_size, self.skipped_ranges)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a micro-batch, nats per token. ids: [sequences, seq_len + 1] int64, on the device."""
        loss: torch.Tensor = self.engine(input_ids=ids[:, :-1], targets=ids[:, 1:])
        return loss

    def write_log(self) -> tuple[int, float, float] | None:
        """Reduce the steps not yet logged over ranks, and write one row per step. Collective: all ranks must call.

        Returns step, loss and median of the first loss spike among them, the same on all ranks. Raises TrainingError
        when too many steps in a row were skipped, after listing their samples.
        """
        steps, self._unlogged = self._unlogged, []
        if not steps:
            return None
        summed = self.ranks.sum(torch.stack([step.loss for step in steps]).double())
        # The only synchronization with the device: everything needed from these steps is read in one transfer.
        read = read_tensors([*summed, *(s.gradient_norm for s in steps), *(s.skipped_steps for s in steps)])
        losses = [value / self.ranks.world_size for value in read[: len(steps)]]
        for step, norm, skipped in zip(steps, read[len(steps) : 2 * len(steps)], read[2 * len(steps) :], strict=True):
            step.gradient_norm, step.skipped_steps = norm, int(skipped)
        too_many = self._mark_skipped(steps)
        signed = [step.digest - (1 << 64) if step.digest >> 63 else step.digest for step in steps]
        digests = self.ranks.sum_on_host(signed)
        memory = self.ranks.begin_max([peak_memory_bytes(self.ranks.device)])()[0]
        spike = None
        if self.recipe.guards.spike != "ignore":
            for step, loss in zip(steps, losses, strict=True):
                if step.skipped:  # it changed no weights
                    continue
                median = self._spikes.check(loss)
                if median is not None and spike is None:
                    spike = (step.step, loss, median)
        if self.metrics is not None:
            self.metrics.steps(steps, losses, digests, memory, self.ranks)
            skipped = [step.step for step in steps if step.skipped]
            if skipped and self.recipe.engine.precision != "fp16":  # where skips come from the loss scale search
                self._list_samples(skipped, "skipped: non-finite gradients")
        if too_many is not None:
            raise too_many
        return spike

    def _mark_skipped(self, steps: Sequence[Step]) -> TrainingError | None:
        """Mark the skipped steps. Returns the error that ends the run when too many in a row were skipped."""
        too_many = None
        for step in steps:
            try:
                step.skipped = self._skipped.check(step.step, step.skipped_steps)
            except TrainingError as error:
                step.skipped, too_many = True, too_many or error
        return too_many

    def handle_spike(self, step: int, loss: float, median: float) -> bool:
        """List the samples of a loss spike and apply `guards.spike`. Collective: all ranks must call.

        Returns whether the run went back to an earlier checkpoint. Raises TrainingError when the run must stop.
        """
        policy = self.recipe.guards.spike
        first = max(0, step - _GO_BACK_STEPS + 1)
        message = f"step {step}: loss {loss:.4f} is {loss - median:.2f} above the median of the preceding steps"
        log.warning("%s; its samples are listed in %s", message, self.run.incidents)
        suspects = range(first, step + 1)
        if self.metrics is not None:
            self._list_samples(suspects, f"loss {loss:.4f} at step {step}")
            self.metrics.event("loss spike", step, message)
        if policy == "warn":
            return False
        listed = f"The samples of steps {first} to {step} are listed in {self.run.incidents}."
        if policy == "stop":
            raise TrainingError(
                f"{message}. Stopped without saving, as set by guards.spike; a rerun would stop here again. {listed} "
                "To continue, set guards.spike=go_back, which skips them, or guards.spike=warn."
            )
        self.publish()
        checkpoint = self._newest_checkpoint_up_to(first)
        self._go_backs += 1
        if checkpoint is None or self._go_backs > _MAX_GO_BACKS:
            why = "there is no earlier checkpoint" if checkpoint is None else f"this is spike number {self._go_backs}"
            raise TrainingError(f"{message}. Cannot go back: {why}. {listed}")
        places = np.concatenate([self._positions(each) for each in suspects])
        self.skipped_ranges = [*self.skipped_ranges, (int(places.min()), int(places.max()) + 1)]
        if self.ranks.is_fs_leader:
            checkpoints.abandon_after(self.run, checkpoint.path)
        self.ranks.gather(None)  # no rank may resume from a removed checkpoint once the list is written
        if self.ranks.is_fs_leader:
            write_json(self.run.skipped_ranges_file, self.skipped_ranges)
        if self.metrics is not None:
            self.metrics.go_back(checkpoint.step, message)
        log.warning("going back to step %d, skipping the samples of steps %d to %d", checkpoint.step, first, step)
        self.load(checkpoint)
        return True

    def _newest_checkpoint_up_to(self, step: int) -> Checkpoint | None:
        """Return the newest undamaged checkpoint of at most `step` steps, or None. Collective: all ranks must call."""
        try:
            return find_resume_point(self.run, self.ranks, step)
        except CheckpointError:
            return None

    def _list_samples(self, steps: Iterable[int], reason: str) -> None:
        """Record the source documents of the samples of `steps` in the run directory. Rank 0 only."""
        numbers = {step: self.sequences(step).tolist() for step in steps}
        described = describe_sequences(self.data, itertools.chain.from_iterable(numbers.values()))
        with open(self.run.incidents, "a", encoding="utf-8") as file:
            for step, of_step in numbers.items():
                samples = [{"sequence": number, "documents": described[number]} for number in of_step]
                file.write(json.dumps({"step": step, "reason": reason, "samples": samples}) + "\n")

    def load(self, checkpoint: Checkpoint) -> None:
        """Resume from `checkpoint`. Collective: all ranks must call."""
        self.watchdog.beat(f"loading {checkpoint.path.name}", 10.0)
        checkpoints.load_checkpoint(self.engine, checkpoint, self.checkpoint(), self.ranks)
        self.ranks.call(record_changes, self.run, self.ranks, checkpoint, self.settings)
        self.step = self._saved_step = checkpoint.step
        self._skipped = SkippedSteps(self.recipe.guards.max_skipped_steps, self.engine.skipped_steps)
        self._spikes = SpikeDetector(self.recipe.guards.spike_threshold)
        for loss in self.ranks.gather(None if self.metrics is None else self.metrics.losses())[0]:
            self._spikes.check(loss)  # as if the run had not been interrupted

    def evaluate(self) -> None:
        """Evaluate the fixed validation sequences, the same at any world size. Collective: all ranks must call."""
        if not self.recipe.evaluation.sequences:
            return
        numbers = validation_sequences(len(self.data.valid), self.recipe.evaluation.sequences)
        micro, _ = self.recipe.batch.micro_batch_and_accumulation(self.ranks.world_size)
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)  # sum of losses, sequences
        self.engine.eval()
        with torch.no_grad(), exact_matmul():
            for start in range(0, len(numbers), micro * self.ranks.world_size):
                self.watchdog.beat(f"the evaluation after step {self.step}", 3.0)
                # Every rank must join every ZeRO-3 forward: one without a share repeats a sequence with weight 0.
                block = numbers[start : start + micro * self.ranks.world_size]
                mine = block[self.ranks.rank :: self.ranks.world_size]
                loss = self.loss(self._on_device(self.data.valid.batch(mine if len(mine) else block[:1])))
                total[0] += loss.double() * len(mine)
                total[1] += len(mine)
            with torch.compiler.set_stance("force_eager"):  # every length would compile another graph
                samples = [self.sample(int(number)) for number in numbers[: self.recipe.evaluation.samples]]
        self.engine.train()
        loss_sum, sequences = self.ranks.sum(total).tolist()
        self.loss_valid = loss_sum / sequences
        if self.metrics is not None:
            self.metrics.evaluation(self.step, self.loss_valid, perplexity(self.loss_valid))
            if samples:
                decode = Encoder(self.run.tokenizer).decode
                texts = [(decode(ids[:start]), decode(ids[start:])) for start, ids in samples]
                self.metrics.samples(self.step, texts)

    def sample(self, number: int) -> tuple[int, np.ndarray]:
        """Complete the first half of a validation sequence by greedy decoding.

        Collective: all ranks must call and take the same steps, which ZeRO-3 requires. Returns the length of the
        prompt, and the ids of prompt and completion, [tokens] int64.
        """
        seq_len, wanted = self.recipe.model.seq_len, self.recipe.evaluation.sample_tokens
        given = max(1, min(seq_len // 2, seq_len - wanted))
        ids = torch.from_numpy(self.data.valid.batch(np.array([number])))[:, :given].to(self.ranks.device)
        for _ in range(min(wanted, seq_len - given)):
            self.watchdog.beat(f"the samples after step {self.step}")
            logits = self.engine(input_ids=ids).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return given, ids[0].cpu().numpy()

    def _check_replicas(self) -> None:
        every, stage = self.recipe.guards.replica_check_steps, self.engine.zero_optimization_stage()
        if every is None or stage == 3 or self.ranks.world_size == 1 or (self.step + 1) % every:
            return
        if different := replicas_differ(self.engine.module, self.ranks):
            numbers = ", ".join(map(str, different))
            from_whom = "those on the other ranks"
            if len(different) == self.ranks.world_size:
                from_whom = "one another, with no majority to tell which are correct"
            raise TrainingError(
                f"step {self.step}: the weights on rank {numbers} differ from {from_whom}. The memory or a "
                "link of that device is probably faulty. Remove its host, and run the same command again to resume "
                "from the newest checkpoint."
            )

    def _checkpoint_is_old(self) -> bool:
        minutes = self.recipe.checkpoints.every_minutes
        return minutes is not None and self.ranks.rank == 0 and time.monotonic() - self._saved_at > 60 * minutes

    def checkpoint(self) -> Checkpoint:
        """Return the manifest of a checkpoint of this step, without files."""
        evaluated = self.step % self.recipe.evaluation.every_steps == 0 or self.step == self.recipe.schedule.last_step
        return Checkpoint(
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
            offload=self.offload,
            settings=self.settings,
        )

    def save(self, last: bool = False) -> None:
        """Save a checkpoint of this step, unless it is saved already. Collective: all ranks must call.

        Training waits only for a copy to host memory, unless no copy can be made. With `last`, it waits for the disk,
        and the engine must not train afterwards.
        """
        self.publish()  # only one checkpoint is written at a time
        if self._saved_step == self.step and self.step > 0:
            return
        self.watchdog.beat(f"saving after step {self.step}", 3.0)
        self._saved_at, self._saved_step = time.monotonic(), self.step
        background = self.recipe.checkpoints.background and not last and self.offload != "nvme"
        self._saving = checkpoints.Saving.begin(
            self.engine, self.run, self.checkpoint(), self.ranks, background=background, last=last
        )
        self._stalled_seconds = time.monotonic() - self._saved_at
        if not background:
            self.publish()

    def publish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and publish it. Collective: all ranks must call."""
        if self._saving is None:
            return
        started, keep, step = time.monotonic(), self.recipe.checkpoints, self._saving.checkpoint.step
        self.watchdog.beat(f"publishing the checkpoint of step {step}", 3.0)
        saving, self._saving = self._saving, None
        saving.publish(keep.keep_last, keep.keep_every_steps)
        now = time.monotonic()
        stalled = self._stalled_seconds + now - started
        where = self.run.checkpoint(step)
        log.info("step %d: checkpoint %s (%.1f s, training waited %.1f s)", step, where, now - self._saved_at, stalled)
        if self.metrics is not None:
            self.metrics.checkpoint(step, now - self._saved_at, stalled)
        if self.on_published is not None:
            self.on_published(step)
