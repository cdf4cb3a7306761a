"""What a run reports: one log file a rank, metrics.jsonl and TensorBoard from rank 0, plain lines for the user."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.metrics import read_metrics
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.system.files import digest_json, write_atomically
from codeparrot_ds.system.gpus import peak_flops_of
from codeparrot_ds.system.memory import peak_resident_bytes

if TYPE_CHECKING:
    import torch

    from codeparrot_ds.training.ranks import Ranks

_SHOWN_CHARACTERS = 200  # of what a sample was given

log = logging.getLogger("codeparrot_ds")


def open_log(run: RunDirectory, rank: int) -> None:
    """Send this rank's log to its own file, and rank 0's to the user as well."""
    run.logs.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.INFO)
    log.propagate = False
    file = logging.FileHandler(run.log(rank))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    user = logging.StreamHandler(sys.stderr)
    user.setFormatter(logging.Formatter("%(message)s"))
    user.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.addHandler(user)


@dataclass
class Step:
    """One optimizer step as this rank saw it; summed over ranks only when it is logged."""

    step: int
    loss: "torch.Tensor"  # [] mean over this rank's tokens, on the device: reading it would wait for the device
    digest: int  # of the ids this rank fed
    learning_rate: float
    gradient_norm: Any
    skipped_steps: Any  # so far, by the engine, for gradients that are not finite
    started: "Instant"
    ended: "Instant"
    data_seconds: float  # of them, until the batch was there
    skipped: bool = False  # this one, once that has been looked at

    @property
    def seconds(self) -> float:
        """That the step took on the device. To be read when the device has done it."""
        return self.ended.seconds_since(self.started)


class Instant:
    """When the device comes to this point of what it was given to do; on CPU ranks, now."""

    def __init__(self, device: "torch.device") -> None:
        self._event: Any = None
        self._now = time.perf_counter()
        if device.type == "cuda":
            import torch

            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def seconds_since(self, earlier: "Instant") -> float:
        """Between two that the device has come to."""
        if self._event is None:
            return self._now - earlier._now
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def read_tensors(values: Sequence[Any]) -> list[Any]:
    """`values` with every [] tensor among them read, all in one wait for the device."""
    import torch

    tensors = [value.detach().reshape(()).double() for value in values if isinstance(value, torch.Tensor)]
    read = iter(torch.stack([each.to(tensors[0].device) for each in tensors]).tolist() if tensors else [])
    return [next(read) if isinstance(value, torch.Tensor) else value for value in values]


class Metrics:
    """Writes rows to metrics.jsonl, TensorBoard, Weights & Biases and the log. Only rank 0 has one."""

    def __init__(self, run: RunDirectory, recipe: Recipe, first_step: int) -> None:
        """Append to what is there, after dropping the rows of steps that will be taken again. Raises ConfigError."""
        self._run, self._recipe = run, recipe
        self._peak_flops: float | None = None
        self._open(first_step)
        self._wandb: Any = _start_wandb(run, recipe) if recipe.logging.wandb else None

    def _open(self, first_step: int) -> None:
        _drop_rows_from(self._run.metrics, first_step)
        self._file: TextIO = open(self._run.metrics, "a")  # noqa: SIM115 (closed in close)
        self._board: Any = None
        if self._recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._run.tensorboard), purge_step=first_step)
            self._board.add_text("recipe", f"```yaml\n{self._recipe.to_yaml()}```")

    def go_back(self, step: int) -> None:
        """The run goes back to `step`: the rows of steps that will be taken again go."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        self._open(step)

    def losses(self) -> list[float]:
        """Loss of each step so far that has one and was not skipped."""
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
        """Rows of optimizer steps, in order, and a line about the last of them.

        Args:
            steps: as this rank saw them.
            losses: of each, the mean over ranks.
            digests: of the ids of each, summed over ranks, modulo 2^64.
            memory: most bytes that any rank has held so far.
            ranks: all of them.
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
        log.info(
            "step %d of %d: loss %.4f, learning rate %.2e, %s tokens/s",
            steps[-1].step + 1,
            self._recipe.schedule.last_step,
            losses[-1],
            steps[-1].learning_rate,
            f"{len(steps) * tokens_per_step / sum(step.seconds for step in steps):,.0f}",
        )

    def evaluation(self, step: int, loss_valid: float, perplexity_valid: float) -> None:
        """One evaluation of the weights after `step` optimizer steps."""
        row = {"step": step, "loss_valid": loss_valid, "perplexity_valid": perplexity_valid}
        self._write({"kind": "valid", **row}, step)
        log.info("step %d: validation loss %.4f, perplexity %.1f", step, loss_valid, perplexity_valid)

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """What the model has written: (what it was given, how it went on)."""
        for number, (given, written) in enumerate(texts):
            log.info("step %d: sample %d: %s[...]%s", step, number, given[-_SHOWN_CHARACTERS:], written)
            if self._board is not None:
                # Four spaces make a block of code in Markdown, whatever the text holds.
                block = "".join(f"    {line}\n" for line in f"{given}[...]{written}".splitlines())
                self._board.add_text(f"sample/{number}", block, step)

    def mfu(self, flops_per_second: float, ranks: "Ranks") -> float | None:
        """Model FLOPs utilisation: the share of the devices' peak; None where that is not known."""
        if self._peak_flops is None:
            given = self._recipe.logging.peak_tflops
            self._peak_flops = given * 1e12 if given else known_peak_flops(ranks.device, self._recipe.engine.precision)
        return flops_per_second / (self._peak_flops * ranks.world_size) if self._peak_flops else None

    def _write(self, row: dict[str, Any], step: int) -> None:
        # JSON has no infinity: a perplexity that overflows is null.
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
        """Flush and close the files, and file the run under its hyperparameters."""
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


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"n_layer": 2}} as {"model.n_layer": 2}."""
    flat = {}
    for key, each in value.items():
        flat.update(_flatten(each, f"{prefix}{key}.") if isinstance(each, dict) else {f"{prefix}{key}": each})
    return flat


def _start_wandb(run: RunDirectory, recipe: Recipe) -> Any:
    """A Weights & Biases run, which a resumed run goes on with. Its settings come from the environment (WANDB_*)."""
    try:
        import wandb  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError("logging.wandb needs wandb. Install it: pip install 'codeparrot-ds[wandb]'") from None
    started = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "codeparrot-ds"),
        name=recipe.name,
        id=digest_json(str(run.path.resolve()))[:16],
        resume="allow",
        dir=str(run.path),
        config=recipe.model_dump(mode="json"),
        settings=wandb.Settings(console="off", silent=True),  # our own lines say all that it would
    )
    started.define_metric("*", step_metric="step")  # steps taken again are written again
    return started


def known_peak_flops(device: "torch.device", precision: str) -> float | None:
    """Peak FLOP/s of one device in half precision; None for others, and for fp32, where tensor cores may take part."""
    if device.type != "cuda" or precision == "fp32":
        return None
    import torch

    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_memory_bytes(device: "torch.device") -> int:
    """Most memory that this rank has held so far: on its device, or resident in the host's where it computes there."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident_bytes()


def _drop_rows_from(path: Path, first_step: int) -> None:
    """Keep what happened before the weights of `first_step`: those steps will be taken again."""
    kept = [
        row
        for row in read_metrics(path)
        if row["step"] < first_step or (row["kind"] == "valid" and row["step"] == first_step > 0)
    ]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
