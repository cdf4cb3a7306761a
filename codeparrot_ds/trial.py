"""Run a few optimizer steps of a recipe on random token ids and measure their time and memory. Runs on every rank.

`deepspeed --module codeparrot_ds.trial RECIPE --output FILE.json [--steps N] [--set key=value …]`

The steps are identical to training: same model, engine and `Trainer.train_step`. Neither shards nor a run directory
are needed, so a configuration can be tried before any data exist.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codeparrot_ds.errors import EXIT_USER_ERROR, UserError
from codeparrot_ds.hosts.lifeline import Lifeline
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.ds_config import load_ds_config, nvme_path, resolve
from codeparrot_ds.run.recipe import Recipe, load_recipe
from codeparrot_ds.shards.order import Order
from codeparrot_ds.system.files import write_json
from codeparrot_ds.system.processes import interrupt_imports
from codeparrot_ds.training.preflight import check_compiler, check_precision
from codeparrot_ds.training.swap import check_locked_memory, hold_swap_directory

if TYPE_CHECKING:
    from codeparrot_ds.training.loop import Trainer
    from codeparrot_ds.training.memory import DeviceMemory

_SEQUENCES = 1 << 20


class RandomSequences:
    """Sequences of uniformly random token ids; each is a function of its index."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self._vocab_size, self._seq_len = vocab_size, seq_len

    def batch(self, numbers: np.ndarray) -> np.ndarray:
        """Sequences with the indices `numbers`, [n], as [n, seq_len + 1] int64."""
        rows = [np.random.default_rng(int(i)).integers(self._vocab_size, size=self._seq_len + 1) for i in numbers]
        return np.stack(rows)


class RandomDataset:
    """Stand-in for the `Dataset` of shards."""

    def __init__(self, recipe: Recipe) -> None:
        self.train = self.valid = RandomSequences(recipe.model.vocab_size, recipe.model.seq_len)

    def order(self, seed: int) -> Order:
        """Order of 2^20 sequences."""
        return Order(_SEQUENCES, seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a trial on this rank and return the exit code."""
    interrupt_imports()
    parser = argparse.ArgumentParser(prog="codeparrot_ds.trial", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="JSON file, written by rank 0")
    parser.add_argument("--local_rank", type=int, default=0, help="set by deepspeed")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.set)
        result = run(recipe, options.steps)
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(options.output, result)
    return 0


def run(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Build the engine and take `steps` optimizer steps. Collective: all ranks must call.

    Returns:
        The measurements, memory as the maximum over ranks: `between_steps_bytes` is held by tensors after the last
        step, `peak_bytes` is the peak over all steps but the first, `first_peak_bytes` the peak up to the end of the
        first step. On a GPU `reserved_bytes` is what PyTorch's allocator has reserved. `step_seconds` and `losses` have
        one entry per step.
    """
    from codeparrot_ds.training import ranks as rank_module

    with trainer_on_random_ids(recipe) as (trainer, memory):
        first = take_steps(trainer, memory, 1)
        found = take_steps(trainer, memory, steps - 1)
    rank_module.leave()
    return {
        **found,
        "parameters": trainer.parameters,
        "world_size": trainer.ranks.world_size,
        "device": memory.name,
        "total_bytes": memory.total_bytes,
        "first_peak_bytes": first["peak_bytes"],
        "step_seconds": [*first["step_seconds"], *found["step_seconds"]],
        "losses": [*first["losses"], *found["losses"]],
    }


@contextlib.contextmanager
def trainer_on_random_ids(recipe: Recipe, *, draw_weights: bool = False) -> Iterator[tuple["Trainer", "DeviceMemory"]]:
    """Yield the trainer of a recipe on random data, and its device's memory counters. Collective: all ranks must call.

    Args:
        recipe: to run, without its data and run directory.
        draw_weights: initialize the weights on the device, which is fast; otherwise they equal those of training.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Keeps the NVMe swap directory apart from that of a real run.
    recipe = recipe.model_copy(update={"name": f"{recipe.name}-trial"})
    ds_config = resolve(load_ds_config(recipe.engine.deepspeed), recipe, int(os.environ.get("WORLD_SIZE", "1")))
    check_compiler(ds_config)

    from codeparrot_ds.training import ranks as rank_module

    rank_module.die_with_launcher()
    ranks = rank_module.join()
    check_precision(recipe.engine.precision)
    from codeparrot_ds.training.engine import build_engine
    from codeparrot_ds.training.guards import StopRequests, Watchdog
    from codeparrot_ds.training.loop import Trainer
    from codeparrot_ds.training.memory import device_memory
    from codeparrot_ds.training.model import build_model

    memory = device_memory(ranks.device)
    network = build_model(
        recipe.model,
        0,
        recipe.seed,
        ds_config,
        loss_chunk_tokens=recipe.engine.loss_chunk_tokens,
        draw_on=ranks.device if draw_weights else None,
    )
    sizes = [getattr(p, "ds_numel", p.numel()) for p in network.parameters()]
    parameters, swap = sum(sizes), nvme_path(ds_config)
    check_locked_memory(ds_config, parameters // ranks.world_size, max(sizes) // ranks.world_size)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        devnull = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        if swap is not None and ranks.local_rank == 0:
            stack.enter_context(hold_swap_directory(swap))
        ranks.gather(None)  # no rank writes to the swap directory until it is empty
        run_directory = RunDirectory(Path(directory))
        yield (
            Trainer(
                recipe=recipe,
                ranks=ranks,
                engine=build_engine(network, recipe, ds_config),
                data=RandomDataset(recipe),  # type: ignore[arg-type]
                parameters=parameters,
                run=run_directory,
                metrics=None,
                watchdog=Watchdog(None, devnull, lambda message: None),
                stop_requests=StopRequests(run_directory.stop_file, ranks, Lifeline(None, ranks.rank)),
            ),
            memory,
        )


def take_steps(trainer: "Trainer", memory: "DeviceMemory", steps: int) -> dict[str, Any]:
    """Take `steps` optimizer steps and return their measurements. Collective: all ranks must call."""
    seconds, losses = [], []
    for _ in range(steps):
        memory.synchronize()
        started = time.perf_counter()
        loss = trainer.train_step().loss
        memory.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
        trainer.stop_requests.finish_exchange()
        trainer.step += 1
    held, peak, reserved = trainer.ranks.begin_max([memory.held_bytes, memory.peak_bytes, memory.reserved_bytes])()
    memory.reset_peak()  # the first call also covers building the engine
    return {
        "between_steps_bytes": held,
        "peak_bytes": peak,
        "reserved_bytes": reserved,
        "step_seconds": seconds,
        "losses": losses,
        "tokens_per_step": trainer.tokens_per_step,
    }


def trace_step(trainer: "Trainer") -> list[dict[str, Any]]:
    """Take a step under PyTorch's profiler and return this rank's time per operator, slowest first."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = trainer.ranks.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        trainer.train_step()
        if on_gpu:
            torch.cuda.synchronize()
    key, rows = "self_cpu_time_total", profiler.key_averages()
    if on_gpu:  # kernels only: the operators that launch them report the same time again
        key = "self_device_time_total"
        rows = [row for row in rows if row.device_type == DeviceType.CUDA and not row.is_user_annotation]
    found = [{"name": row.key, "calls": row.count, "microseconds": getattr(row, key)} for row in rows]
    return sorted(found, key=lambda row: -row["microseconds"])


if __name__ == "__main__":
    from codeparrot_ds.train import end

    end(main())
