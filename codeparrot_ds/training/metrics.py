"""Reporting of a run: a log file per rank, and metrics.jsonl, TensorBoard and console output from rank 0."""

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.events import record_event
from codeparrot_ds.run.metrics import read_metrics
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.system.files import write_atomically
from codeparrot_ds.system.gpus import peak_flops_of
from codeparrot_ds.system.memory import peak_resident_bytes
from codeparrot_ds.training.wandb_run import start_wandb

if TYPE_CHECKING:
    import torch

    from codeparrot_ds.training.ranks import Ranks

_SHOWN_CHARACTERS = 200  # of a sample's prompt
_SILENT_SECONDS = 60  # after which a first log line is announced

log = logging.getLogger("codeparrot_ds")


def open_log(run: RunDirectory, rank: int) -> None:
    """Write this rank's log to its own file; rank 0 also logs to stderr, other ranks only their errors."""
    run.logs.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.INFO)
    log.propagate = False
    file = logging.FileHandler(run.log(rank), encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    user = logging.StreamHandler(sys.stderr)
    user.setFormatter(logging.Formatter("%(message)s"))
    user.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.addHandler(user)


@dataclass
class Step:
    """Measurements of one optimizer step on this rank; reduced over ranks only when logged."""

    step: int
    loss: "torch.Tensor"  # [] mean over this rank's tokens, on the device: reading it would synchronize
    digest: int  # of this rank's token ids
    learning_rate: float
    gradient_norm: Any
    skipped_steps: Any  # total so far, by the engine, because of non-finite gradients
    started: "Instant"
    ended: "Instant"
    data_seconds: float  # of the step, until the batch was loaded
    skipped: bool = False  # whether this step was skipped, once known

    @property
    def seconds(self) -> float:
        """Seconds that the step took on the device. Read it only after the device has finished the step."""
        return self.ended.seconds_since(self.started)


class Instant:
    """Time at which the device reaches this point of its queue; on CPU ranks, the current time."""

    def __init__(self, device: "torch.device") -> None:
        self._event: Any = None
        self._now = time.perf_counter()
        if device.type == "cuda":
            import torch

            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def seconds_since(self, earlier: "Instant") -> float:
        """Seconds since `earlier`; the device must have reached both."""
        if self._event is None:
            return self._now - earlier._now
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def read_tensors(values: Sequence[Any]) -> list[Any]:
    """Return `values` with every [] tensor among them as a float, read with a single device synchronization."""
    import torch

    tensors = [value.detach().reshape(()).double() for value in values if isinstance(value, torch.Tensor)]
    read = iter(torch.stack([each.to(tensors[0].device) for each in tensors]).tolist() if tensors else [])
    return [next(read) if isinstance(value, torch.Tensor) else value for value in values]


class Metrics:
    """Writes metrics to metrics.jsonl, TensorBoard, Weights & Biases and the log. Exists on rank 0 only."""

    def __init__(self, run: RunDirectory, recipe: Recipe, first_step: int) -> None:
        """Append to existing files, after dropping the rows of steps that will be repeated."""
        self._run, self._recipe = run, recipe
        self._peak_flops: float | None = None
        self._announced = False
        self._open(first_step)
        self._wandb: Any = None
        if recipe.logging.wandb:
            self._wandb, problem = start_wandb(run, recipe)
            if problem:
                log.warning("Weights & Biases: %s", problem)

    def _open(self, first_step: int) -> None:
        _drop_rows_from(self._run.metrics, first_step)
        if self._run.samples.exists():
            _drop_rows_from(self._run.samples, first_step)
        self._file: TextIO = open(self._run.metrics, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._board: Any = None
        if self._recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._run.tensorboard), purge_step=first_step)
            self._board.add_text("recipe", f"```yaml\n{self._recipe.to_yaml()}```")

    def go_back(self, step: int, reason: str) -> None:
        """Rewind to `step`: drop the rows of steps that will be repeated."""
        self.event("go back", step, reason)
        self._file.close()
        if self._board is not None:
            self._board.close()
        self._open(step)

    def event(self, event: str, step: int, reason: str) -> None:
        """Record that something unusual happened at `step`."""
        record_event(self._run.events, event, step=step, reason=reason)

    def losses(self) -> list[float]:
        """Return the losses of all steps so far, except skipped ones and those without a finite loss."""
        found, skipped_before = [], 0
        for row in read_metrics(self._run.metrics):
            if row["kind"] == "train":
                if row["loss"] is not None and row["skipped_steps"] == skipped_before:
                    found.append(row["loss"])
                skipped_before = row["skipped_steps"]
        return found

    def steps(
        self, steps: Sequence[Step], losses: Sequence[float], digests: Sequence[int], memory: int, ranks: "Ranks"
    ) -> None:
        """Write one row per optimizer step, and log a line about the last.

        Args:
            steps: this rank's measurements, in order.
            losses: mean over ranks, per step.
            digests: of the token ids, summed over ranks modulo 2^64, per step.
            memory: peak bytes held by any rank so far.
            ranks: of the run.
        """
        batch_size, model = self._recipe.batch.global_batch_size, self._recipe.model
        tokens_per_step = batch_size * model.seq_len
        flops_per_step = tokens_per_step * model.flops_per_token
        for step, loss, digest in zip(steps, losses, digests, strict=True):
            row = {
                "step": step.step,
                "loss": loss,
                "learning_rate": step.learning_rate,
                "gradient_norm": step.gradient_norm,
                "step_seconds": step.seconds,
                "data_seconds": step.data_seconds,
                "tokens_per_second": tokens_per_step / step.seconds,
                "mfu": self.mfu(flops_per_step / step.seconds, ranks),
                "peak_memory_bytes": memory,
                "samples_seen": (step.step + 1) * batch_size,
                "tokens_seen": (step.step + 1 - step.skipped_steps) * tokens_per_step,
                "skipped_steps": step.skipped_steps,
                "batch_digest": f"{digest & 0xFFFF_FFFF_FFFF_FFFF:016x}",
            }
            self._write({"kind": "train", **row}, step.step)
        if skipped := [step.step for step in steps if step.skipped]:
            self.event("skipped", skipped[0], f"non-finite gradients at step {', '.join(map(str, skipped))}")
        log.info(
            "step %d of %d: loss %.4f, learning rate %.2e, %s tokens/s",
            steps[-1].step + 1,
            self._recipe.schedule.last_step,
            losses[-1],
            steps[-1].learning_rate,
            f"{len(steps) * tokens_per_step / sum(step.seconds for step in steps):,.0f}",
        )

    def first_micro_batch(self, step: int, accumulation: int, seconds: float, device: "torch.device") -> None:
        """Say how long the run will take, if its first log line is more than a minute away. On CPU ranks only.

        Args:
            step: optimizer step in progress; only the first of this process is considered.
            accumulation: micro-batches per optimizer step.
            seconds: of the first micro-batch. On a GPU they would be those of queueing it.
            device: of this rank.
        """
        if self._announced or device.type != "cpu" or self._recipe.engine.compile:
            return
        self._announced = True
        every, last = self._recipe.logging.every_steps, self._recipe.schedule.last_step
        steps = min(every - step % every, last - step)
        of_step = seconds * accumulation
        if steps * of_step > _SILENT_SECONDS:
            log.info(
                "the first of %d micro-batches took %s: about %s to the next log line, %s to the last step. A smaller "
                "model, batch.global_batch_size or logging.every_steps shortens this.",
                accumulation,
                _duration(seconds),
                _duration(steps * of_step),
                _duration((last - step) * of_step),
            )

    def evaluation(self, step: int, loss_valid: float, perplexity_valid: float) -> None:
        """Write an evaluation of the weights after `step` optimizer steps."""
        row = {"step": step, "loss_valid": loss_valid, "perplexity_valid": perplexity_valid}
        self._write({"kind": "valid", **row}, step)
        log.info("step %d: validation loss %.4f, perplexity %.1f", step, loss_valid, perplexity_valid)

    def checkpoint(self, step: int, seconds: float, waited_seconds: float) -> None:
        """Record a published checkpoint: seconds until it was on disk, and those for which training waited."""
        record_event(self._run.events, "checkpoint", step=step, seconds=seconds, waited_seconds=waited_seconds)

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Log and record (prompt, completion) pairs generated by the model."""
        with open(self._run.samples, "a", encoding="utf-8") as file:
            for number, (given, written) in enumerate(texts):
                row = {"kind": "sample", "step": step, "number": number, "prompt": given, "completion": written}
                file.write(json.dumps(row) + "\n")
        for number, (given, written) in enumerate(texts):
            log.info("step %d: sample %d: %s[...]%s", step, number, given[-_SHOWN_CHARACTERS:], written)
            if self._board is not None:
                # Indenting by four spaces makes a Markdown code block for any text.
                block = "".join(f"    {line}\n" for line in f"{given}[...]{written}".splitlines())
                self._board.add_text(f"sample/{number}", block, step)

    def mfu(self, flops_per_second: float, ranks: "Ranks") -> float | None:
        """Return the model FLOPs utilization, the fraction of the devices' peak; None where the peak is not known."""
        if self._peak_flops is None:
            given = self._recipe.logging.peak_tflops
            self._peak_flops = given * 1e12 if given else known_peak_flops(ranks.device, self._recipe.engine.precision)
        return flops_per_second / (self._peak_flops * ranks.world_size) if self._peak_flops else None

    def _write(self, row: dict[str, Any], step: int) -> None:
        # JSON has no infinity: an overflowed perplexity becomes null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        numbers = {
            f"{row['kind']}/{key}": value
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float)
        }
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": step})

    def close(self) -> None:
        """Close all outputs, and record the run's hyperparameters in TensorBoard."""
        rows = [row for row in read_metrics(self._run.metrics) if row["kind"] == "valid"]
        self._file.close()
        if self._board is not None:
            flat = {
                key: value if isinstance(value, int | float | bool) else str(value)
                for key, value in _flatten(self._recipe.model_dump(mode="json")).items()
            }
            last = rows[-1]["loss_valid"] if rows else None
            self._board.add_hparams(flat, {"final/loss_valid": math.nan if last is None else last}, run_name=".")
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _duration(seconds: float) -> str:
    """In the largest of seconds, minutes, hours and days of which there are two."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten {"model": {"n_layer": 2}} to {"model.n_layer": 2}."""
    flat = {}
    for key, each in value.items():
        flat.update(_flatten(each, f"{prefix}{key}.") if isinstance(each, dict) else {f"{prefix}{key}": each})
    return flat


def known_peak_flops(device: "torch.device", precision: str) -> float | None:
    """Return a GPU's peak half-precision FLOP/s; None for other devices, and for fp32, which may use tensor cores."""
    if device.type != "cuda" or precision == "fp32":
        return None
    import torch

    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_memory_bytes(device: "torch.device") -> int:
    """Return the peak memory of this rank so far: allocated on its GPU, or resident on the host for CPU ranks."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident_bytes()


def _drop_rows_from(path: Path, first_step: int) -> None:
    """Drop the rows of `first_step` and later steps, which will be repeated; keep what evaluated its weights."""
    kept = [
        row
        for row in read_metrics(path)
        if row["step"] < first_step or (row["kind"] != "train" and row["step"] == first_step > 0)
    ]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
