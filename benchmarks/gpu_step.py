"""Our step on one GPU: GPT-2 xl in many configurations, with one engine whose settings are changed in place.

Usage: python gpu_step.py JOB.json. The job names the cells: `first`, `second`, `zero3`, `memory`, `deepspeed` (ZeRO-1
with DeepSpeed's own optimizer step) or `beside` (the reference cells, measured next to the peers). Each cell is
appended to the job's `output` as a JSON line as soon as it is done; cells remaining when the time is up are skipped.

A cell has two warm-up steps, then the measured ones. As in a real run, nothing synchronizes with the device between
steps; times are taken between CUDA events at the ends of steps.
"""

import contextlib
import gc
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.planning.machine import MachineSpec, find_machine
from codeparrot_ds.planning.plan import Choice, predict
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.train import end
from codeparrot_ds.training import attention, zero1
from codeparrot_ds.training.loop import Trainer
from codeparrot_ds.training.memory import DeviceMemory
from codeparrot_ds.training.model import compile_blocks, recompute_activations
from codeparrot_ds.trial import trace_step, trainer_on_random_ids

ROOT = Path(__file__).resolve().parent.parent
TINY = [f"model.{key}" for key in ("n_layer=2", "n_embd=64", "n_head=2", "vocab_size=512", "seq_len=64")]
SECONDS_A_CELL = 6.0  # required to start a cell


@dataclass(frozen=True)
class Cell:
    """A configuration to measure.

    Attributes:
        change: what is disabled or set differently from the reference cell.
        steps: measured steps.
        profile: whether to run one more step under PyTorch's profiler.
    """

    micro_batch: int
    accumulation: int = 4
    compile: bool = False
    recompute: str = "none"
    change: str = ""
    steps: int = 4
    profile: bool = False

    @property
    def name(self) -> str:
        """Micro-batch and accumulation, e.g. "16 x 4"."""
        return f"{self.micro_batch} x {self.accumulation}"


FIRST = (
    Cell(8, profile=True),
    Cell(8, compile=True, profile=True),
    Cell(16),
    Cell(16, compile=True),
    Cell(16, recompute="full", steps=2),
)
# The reference cells come first; each shape of compiled blocks takes seconds to compile.
SECOND = (
    Cell(16),
    Cell(16, compile=True),
    Cell(16, recompute="full", steps=2),
    Cell(16, compile=True, recompute="full", steps=2),
    Cell(16, recompute="selective", steps=2),
    Cell(16, accumulation=1, steps=6),
    Cell(16, change="transformers' own attention", steps=2),
    Cell(16, change="loss in passes", steps=2),
    Cell(16, change="loss of 16,384 tokens at a time", steps=2),
)
MEMORY = (
    Cell(8, accumulation=1, steps=1),
    Cell(8, accumulation=1, recompute="full", steps=1),
    Cell(32, accumulation=1, steps=1),
    Cell(32, accumulation=1, recompute="full", steps=1),
    Cell(32, accumulation=1, recompute="selective", steps=1),
)
ZERO3 = (
    Cell(16, steps=2),
    Cell(16, recompute="full", steps=2),
    Cell(16, steps=2, change="reduction that is ordered, not waited for"),
    Cell(32, accumulation=1, steps=1),
    Cell(16, compile=True, steps=2),
)
CELLS = {
    "first": FIRST,
    "second": SECOND,
    "zero3": ZERO3,
    "deepspeed": (Cell(16),),
    "memory": MEMORY,
    "beside": (Cell(16, compile=True), Cell(16)),
}


def main() -> None:
    """Measure the cells of the job until its time is up."""
    started = time.monotonic()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    stage = 3 if job["cells"] == "zero3" else 1
    settings = [f"engine.deepspeed={ROOT}/ds_configs/zero{stage}.json", "model.activation_checkpointing=none"]
    settings += [*(TINY if job["tiny"] else []), "batch.global_batch_size=1", "batch.micro_batch_size=1"]
    recipe = load_recipe(ROOT / "launch" / "recipes" / "codeparrot-xl.yaml", settings)
    if job["cells"] == "deepspeed":
        _take_deepspeeds_step()
    with (
        trainer_on_random_ids(recipe, draw_weights=True) as (trainer, memory),
        open(job["output"], "a", encoding="utf-8") as output,
    ):
        bench = Bench(trainer, memory, job)
        print(f"engine ready after {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
        cells: list[Cell] = list(CELLS[job["cells"]])
        if job["cells"] == "memory":
            cells += bench.first_that_does_not_fit()
        for cell in cells:
            if time.monotonic() - started > job["deadline_seconds"] - SECONDS_A_CELL:
                print(f"no time left for {cell}", file=sys.stderr, flush=True)
                continue
            for row in bench.take(cell):
                output.write(json.dumps(row) + "\n")
                output.flush()
                print(json.dumps({k: v for k, v in row.items() if k != "operators"}), file=sys.stderr, flush=True)


def _take_deepspeeds_step() -> None:
    """Use DeepSpeed's optimizer step instead of ours, at ZeRO-1 under bf16."""
    zero1.Engine._configure_bf16_optimizer = zero1.DeepSpeedEngine._configure_bf16_optimizer  # type: ignore[method-assign]


class Bench:
    """An engine and the measurement of its cells."""

    def __init__(self, trainer: Trainer, memory: DeviceMemory, job: dict[str, Any]) -> None:
        self._trainer, self._memory, self._job = trainer, memory, job
        self._recipe = trainer.recipe
        self._machine = find_machine(trainer.recipe, MachineSpec(1, on_cpu=job["on_cpu"]))

    @property
    def _network(self) -> Any:
        return self._trainer.engine.module

    def _shape(self, cell: Cell) -> tuple[int, int]:
        return (
            (min(2, cell.micro_batch), min(2, cell.accumulation))
            if self._job["tiny"]
            else (
                cell.micro_batch,
                cell.accumulation,
            )
        )

    def prediction(self, cell: Cell) -> Any:
        """The prediction of `plan` for a cell, and the recipe it applies to."""
        micro_batch, accumulation = self._shape(cell)
        batch = self._recipe.batch.model_copy(update={"global_batch_size": micro_batch * accumulation})
        engine = self._recipe.engine.model_copy(update={"compile": cell.compile})
        recipe = self._recipe.model_copy(update={"batch": batch, "engine": engine})
        choice = Choice(self._recipe.engine.deepspeed, cell.recompute, micro_batch)
        return choice.applied(recipe), predict(recipe, choice, self._machine)

    def first_that_does_not_fit(self) -> list[Cell]:
        """The smallest micro-batch without recomputation that is predicted not to fit, as a list of one cell."""
        for micro_batch in range(20, 129, 4):
            cell = Cell(micro_batch, accumulation=1, steps=1)
            if not self.prediction(cell)[1].fits:
                return [cell]
        return []

    def take(self, cell: Cell) -> Iterator[dict[str, Any]]:
        """Measure a cell; yields its row, and one with its profile if requested."""
        trainer, memory = self._trainer, self._memory
        micro_batch, accumulation = self._shape(cell)
        trainer.recipe, prediction = self.prediction(cell)
        engine = trainer.engine
        engine.set_train_micro_batch_size(micro_batch)
        engine.set_train_batch_size(micro_batch * accumulation)
        engine.micro_steps = 0
        self._set_up_blocks(cell)
        row: dict[str, Any] = {
            "part": "step",
            "cells": self._job["cells"],
            "cell": cell.name,
            "stage": prediction.layout.stage,
            "micro_batch": micro_batch,
            "accumulation": accumulation,
            "recompute": cell.recompute,
            "compile": cell.compile,
            "change": "DeepSpeed's own optimizer step" if self._job["cells"] == "deepspeed" else cell.change,
            "predicted_peak_bytes": prediction.memory.peak_bytes,
            "fits": prediction.fits,
            "flops_per_token": self._recipe.model.flops_per_token,
            "llmc_flops_per_token": self._recipe.model.flops_per_token - 6 * self._attention_flops(),
            "peak_flops": self._machine.cluster.gpu_flops,
            "device": memory.name,
            "out_of_memory": False,
        }
        gc.collect()
        if not self._job["on_cpu"]:
            torch.cuda.empty_cache()
        try:
            with _changed(trainer, cell.change):
                started = time.perf_counter()
                self._steps(1)
                memory.synchronize()
                row["first_step_seconds"] = time.perf_counter() - started
                row |= self._measure(cell.steps)
        except torch.OutOfMemoryError as error:
            row |= {"out_of_memory": True, "error": str(error).split(". ")[0]}
            engine.optimizer.zero_grad()
        yield row
        if cell.profile and not row["out_of_memory"]:
            yield {"part": "profile", "cell": cell.name, "compile": cell.compile, "operators": trace_step(trainer)}
            trainer.stop_requests.finish_exchange()

    def _attention_flops(self) -> int:
        model = self._recipe.model
        return model.n_layer * model.n_embd * model.seq_len

    def _set_up_blocks(self, cell: Cell) -> None:
        for number, block in enumerate(self._network.transformer.h, start=1):  # as built
            block.__dict__.pop("forward", None)
            if block.attn.__dict__.pop("query_scale", None) is not None:
                block.attn.scaling /= number
        recompute_activations(self._network, cell.recompute)
        if cell.compile:
            compile_blocks(self._network, self._trainer.ranks.device)

    def _steps(self, count: int) -> list[Any]:
        taken = []
        for _ in range(count):
            taken.append(self._trainer.train_step())
            self._trainer.stop_requests.finish_exchange()
            self._trainer.step += 1
        return taken

    def _measure(self, steps: int) -> dict[str, Any]:
        memory = self._memory
        before = self._steps(1)[0]
        memory.reset_peak()
        started = time.perf_counter()
        taken = self._steps(steps)
        on_host = time.perf_counter() - started
        memory.synchronize()
        ends = [before, *taken]
        return {
            "step_seconds": [b.ended.seconds_since(a.ended) for a, b in itertools.pairwise(ends)],
            "host_seconds": on_host / steps,  # until all work was enqueued
            "losses": [float(step.loss) for step in taken],
            "gradient_norm": float(taken[-1].gradient_norm),
            "tokens_per_step": self._trainer.tokens_per_step,
            "between_steps_bytes": memory.held_bytes,
            "peak_bytes": memory.peak_bytes,
            "reserved_bytes": memory.reserved_bytes,
        }


class OrderedStream(torch.cuda.Stream):
    """A stream that the device waits for where the host would."""

    def synchronize(self) -> None:
        """Make work enqueued later on this device wait for this stream."""
        torch.cuda.current_stream(self.device).wait_stream(self)


@contextlib.contextmanager
def _changed(trainer: Trainer, change: str) -> Iterator[None]:
    """Apply one change, and undo it afterwards."""
    network, engine = trainer.engine.module, trainer.engine
    if change.startswith("transformers' own attention"):
        network.config._attn_implementation = "sdpa"
        yield
        network.config._attn_implementation = attention.CAUSAL
    elif change == "loss in passes":
        network.lm_head.fused = False
        yield
        network.lm_head.fused = None
    elif change == "loss of 16,384 tokens at a time":
        usual, network.lm_head.chunk_tokens = network.lm_head.chunk_tokens, 16_384
        yield
        network.lm_head.chunk_tokens = usual
    elif change == "ids from memory that is not pinned":
        usual = trainer._on_device
        trainer._on_device = lambda ids: torch.from_numpy(ids).to(trainer.ranks.device)  # type: ignore[method-assign]
        yield
        trainer._on_device = usual  # type: ignore[method-assign]
    elif change.startswith("reduction that is ordered"):
        usual = engine.optimizer.reduce_and_partition_stream
        if isinstance(usual, torch.cuda.Stream):
            engine.optimizer.reduce_and_partition_stream = OrderedStream(usual.device)
        yield
        engine.optimizer.reduce_and_partition_stream = usual
    elif change == "DeepSpeed's timer":
        timers = engine.tput_timer.config
        timers.enabled = True
        yield
        timers.enabled = False
    else:
        assert not change, change
        yield


if __name__ == "__main__":
    main()
    end(0)
