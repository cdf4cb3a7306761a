"""Estimate the memory, time, cost and disk space of a run before it is started, and find a faster way to run it.

Everything here is computed from the recipe: no GPU is used and PyTorch is not imported. `footprint.py` estimates
memory, `scaling.py` time at a given MFU. `plan --measure` and `tune` compare the estimates with real steps.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.planning.footprint import Footprint, footprint
from codeparrot_ds.planning.layout import Layout
from codeparrot_ds.planning.machine import Machine
from codeparrot_ds.planning.scaling import StepTime, step_time, traffic, update_bytes
from codeparrot_ds.run.ds_config import (
    checkpoint_bytes,
    load_ds_config,
    offload_device,
    resolve,
    swap_buffer_bytes,
    swap_bytes_per_parameter,
)
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.run.shipped import name_of_ds_config
from codeparrot_ds.shards.format import dtype_for

RECOMPUTED = {"none": 0.0, "selective": 0.5, "full": 1.0}  # model.activation_checkpointing -> fraction of blocks
_TOKENS_THAT_FILL_A_GPU = 16_384  # per micro-batch: on an H200, xl reaches 47 % MFU with 8,192 and 51 % with 16,384
_MAX_SEQUENCES = 64  # largest micro-batch that is tried
_PROCESS_BYTES = 800_000_000  # resident memory of a rank with a small model on CPU cores: Python, PyTorch, DeepSpeed


@dataclass(frozen=True)
class Choice:
    """Execution options of a recipe that do not change what is trained."""

    deepspeed: Path
    recompute: str
    micro_batch_size: int

    def overrides(self) -> list[str]:
        """Return the `--set` arguments that select these options."""
        return [
            f"engine.deepspeed={name_of_ds_config(self.deepspeed)}",
            f"model.activation_checkpointing={self.recompute}",
            f"batch.micro_batch_size={self.micro_batch_size}",
        ]

    def applied(self, recipe: Recipe) -> Recipe:
        """Return the recipe with these options."""
        return recipe.model_copy(
            update={
                "engine": recipe.engine.model_copy(update={"deepspeed": self.deepspeed}),
                "model": recipe.model.model_copy(update={"activation_checkpointing": self.recompute}),
                "batch": recipe.batch.model_copy(update={"micro_batch_size": self.micro_batch_size}),
            }
        )


@dataclass(frozen=True)
class Prediction:
    """Estimated resources of a choice.

    Attributes:
        choice: the options estimated for.
        layout: what determines the memory under these options.
        memory: device memory per rank.
        time: per optimizer step.
        host_bytes: memory per host, by part.
        nvme_bytes: NVMe space per host for offloaded state.
        machine: the hardware estimated for.
    """

    choice: Choice
    layout: Layout
    memory: Footprint
    time: StepTime
    host_bytes: dict[str, int]
    nvme_bytes: int
    machine: Machine

    @property
    def fits(self) -> bool:
        """Whether the run fits in the memory of the GPUs and of the hosts."""
        return not self.too_large

    @property
    def offloads(self) -> bool:
        """Whether any state is offloaded from the GPUs; `time` does not include the transfers."""
        return bool(self.layout.offloads("optimizer") or self.layout.offloads("param"))

    @property
    def too_large(self) -> list[str]:
        """Return one message for each kind of memory that is too small."""
        machine, found = self.machine, []
        if self.memory.peak_bytes > machine.gpu_memory_bytes:
            what = "a rank" if machine.on_cpu else "a GPU"
            found.append(
                f"{what} needs {gigabytes(self.memory.peak_bytes)} at the peak (in the {self.memory.peak_at}) "
                f"but has {gigabytes(machine.gpu_memory_bytes)}"
            )
        host, needed = machine.host_memory_bytes, sum(self.host_bytes.values())
        if host is not None and not machine.on_cpu and needed > host:
            found.append(f"a host needs {gigabytes(needed)} of memory but has {gigabytes(host)}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON, in bytes and seconds."""
        return {
            "deepspeed": str(self.choice.deepspeed),
            "zero_stage": self.layout.stage,
            "activation_checkpointing": self.choice.recompute,
            "micro_batch_size": self.choice.micro_batch_size,
            "accumulation": self.layout.accumulation,
            "fits": self.fits,
            "peak_bytes": self.memory.peak_bytes,
            "peak_at": self.memory.peak_at,
            "at_peak": self.memory.at_peak,
            "between_steps": self.memory.between_steps,
            "host_bytes": self.host_bytes,
            "nvme_bytes": self.nvme_bytes,
            "step_seconds": None if self.machine.on_cpu else [self.time.overlap_seconds, self.time.no_overlap_seconds],
        }


def predict(recipe: Recipe, choice: Choice, machine: Machine) -> Prediction:
    """Estimate the resources of a recipe with these options. Raises ConfigError for an invalid combination."""
    recipe, ranks = choice.applied(recipe), machine.cluster.gpus
    ds_config = resolve(load_ds_config(choice.deepspeed), recipe, ranks)
    layout = Layout.of(recipe, ds_config, machine.on_cpu)
    memory = footprint(layout)
    model, zero = recipe.model, layout.zero
    sent = traffic(model, layout.stage, layout.accumulation, layout.item, float(zero.get("reduce_bucket_size", 5e8)))
    tokens = layout.tokens * layout.accumulation
    updated = update_bytes(model, layout.stage, layout.accumulation, ranks)
    time = step_time(model, sent, machine.cluster, tokens, RECOMPUTED[choice.recompute], updated)
    ranks_here = min(ranks, machine.cluster.gpus_per_host)
    share = sum(layout.groups) * ranks_here // ranks
    nvme = share * swap_bytes_per_parameter(ds_config)
    host = {"processes": ranks_here * _PROCESS_BYTES}
    if recipe.checkpoints.background and offload_device(ds_config) != "nvme":
        partitions, rank_0s = checkpoint_bytes(sum(layout.groups), layout.stage, layout.precision)
        host["checkpoint copy"] = partitions * ranks_here // ranks + rank_0s
    if memory.on_host:
        host["offloaded"] = ranks_here * sum(memory.on_host.values())
    if nvme:
        largest = max(tensor.elements for tensor in layout.parameters) // ranks
        host["NVMe buffers"] = ranks_here * swap_buffer_bytes(ds_config, share // ranks_here, largest)
    if layout.stage < 3:  # each rank builds the model in host memory, in fp32
        building = 4 * sum(layout.groups) * ranks_here
        host["building the model"] = max(0, building - sum(host.values()) + host["processes"])
    return Prediction(choice, layout, memory, time, host, nvme, machine)


@dataclass(frozen=True)
class Plan:
    """Estimates of a recipe on given hardware.

    Attributes:
        recipe: the recipe planned for.
        machine: the hardware planned for.
        own: estimate for the recipe's own options.
        others: estimates for all other options, whether or not they fit.
    """

    recipe: Recipe
    machine: Machine
    own: Prediction
    others: list[Prediction]

    @cached_property
    def advised(self) -> Prediction | None:
        """The fastest choice that fits, preferring larger micro-batches among equals; None when none fits."""
        fitting = [each for each in (self.own, *self.others) if each.fits]
        return min(fitting, key=self._slowness, default=None)

    @staticmethod
    def _slowness(each: Prediction) -> tuple[bool, float, int, int]:
        # Three significant digits: smaller differences depend on kernels, which run faster with larger micro-batches.
        seconds = float(f"{each.time.no_overlap_seconds:.3g}")
        tokens = each.choice.micro_batch_size * each.layout.model.seq_len
        return (each.offloads, seconds, -min(tokens, _TOKENS_THAT_FILL_A_GPU), each.memory.peak_bytes)

    @cached_property
    def smallest_change(self) -> Prediction | None:
        """The choice that fits with the fewest changed keys, then the fastest; None when none fits."""
        own = self.own.choice
        return min(
            (each for each in self.others if each.fits),
            key=lambda each: (len(changes(own, each.choice)), *self._slowness(each)),
            default=None,
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.recipe.schedule.last_step

    @property
    def tokens(self) -> int:
        """Tokens trained on in the run."""
        return self.steps * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all ranks."""
        return self.recipe.batch.global_batch_size * self.recipe.model.seq_len

    @property
    def checkpoint_bytes(self) -> int:
        """Total size of the files of one checkpoint."""
        layout = self.own.layout
        return sum(checkpoint_bytes(self.recipe.model.parameters, layout.stage, layout.precision))

    @property
    def checkpoints_kept(self) -> int:
        """Maximum number of checkpoints on disk, including the one being written."""
        keep = self.recipe.checkpoints
        for_good = self.steps // keep.keep_every_steps if keep.keep_every_steps else 0
        return min(keep.keep_last + 1, -(-self.steps // keep.every_steps)) + for_good

    @property
    def token_bytes(self) -> int:
        """Bytes per token in the shards."""
        return dtype_for(self.recipe.model.vocab_size).itemsize

    def hours(self, each: Prediction) -> tuple[float, float]:
        """Hours of the run with full and with no overlap of communication; excludes evaluations and checkpoints."""
        return self.steps * each.time.overlap_seconds / 3600, self.steps * each.time.no_overlap_seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON."""
        price = self.machine.price_per_hour
        hours = self.hours(self.own)
        return {
            "parameters": self.recipe.model.parameters,
            "gpus": self.machine.cluster.gpus,
            "hosts": self.machine.cluster.hosts,
            "gpu_memory_bytes": self.machine.gpu_memory_bytes,
            "mfu": None if self.machine.on_cpu else self.machine.cluster.mfu,
            "recipe": self.own.to_dict(),
            "hours": None if self.machine.on_cpu else hours,
            "cost": None
            if price is None or self.machine.on_cpu
            else [price * each * self.machine.cluster.gpus for each in hours],
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoints_kept": self.checkpoints_kept,
            "shards_bytes": self.tokens * self.token_bytes,
            "advised": None if self.advised is None else self.advised.to_dict(),
            "all": [each.to_dict() for each in self.others],
        }


def changes(one: Choice, other: Choice) -> list[str]:
    """Return the `--set` arguments that turn the first choice into the second."""
    return [new for old, new in zip(one.overrides(), other.overrides(), strict=True) if old != new]


def make_plan(recipe: Recipe, machine: Machine) -> Plan:
    """Estimate a recipe on a machine with its own and all other options. Raises ConfigError if its own are invalid."""
    ranks = machine.cluster.gpus
    micro, _ = recipe.batch.micro_batch_and_accumulation(ranks)
    own = Choice(recipe.engine.deepspeed, recipe.model.activation_checkpointing, micro)
    others = []
    for each in choices(recipe, ranks):
        if each != own:
            with contextlib.suppress(ConfigError):  # a DeepSpeed JSON that does not suit this recipe
                others.append(predict(recipe, each, machine))
    return Plan(recipe, machine, predict(recipe, own, machine), others)


def choices(recipe: Recipe, ranks: int) -> Iterator[Choice]:
    """Yield every ZeRO stage, recomputation and micro-batch, from the recipe's DeepSpeed JSON and those next to it."""
    share = recipe.batch.global_batch_size // ranks
    micros = [size for size in range(1, min(share, _MAX_SEQUENCES) + 1) if share % size == 0 and _round(size)]
    for deepspeed in _ds_configs(recipe):
        for recompute in RECOMPUTED:
            for micro in micros:
                yield Choice(deepspeed, recompute, micro)


def _round(size: int) -> bool:
    """Whether a size is worth trying: 1, 2, 3, 4, 6, 8, 12, 16, …"""
    while size % 2 == 0:
        size //= 2
    return size in (1, 3)


def _ds_configs(recipe: Recipe) -> list[Path]:
    own = recipe.engine.deepspeed
    names = ["zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"]
    if recipe.engine.nvme is not None:
        names.append("zero3_nvme.json")
    beside = [own.parent / name for name in names]
    return list(dict.fromkeys([own, *(path for path in beside if path.exists())]))


def more_gpus(plan: Plan) -> int | None:
    """Return the number of GPUs on which the recipe fits unchanged; None if it does not fit on up to 4,096."""
    cluster = plan.machine.cluster
    gpus = cluster.gpus * 2
    while gpus <= 4096 and plan.recipe.batch.global_batch_size % gpus == 0:
        machine = replace(plan.machine, cluster=replace(cluster, gpus=gpus))
        share = plan.recipe.batch.global_batch_size // gpus
        choice = replace(plan.own.choice, micro_batch_size=math.gcd(plan.own.choice.micro_batch_size, share))
        if predict(plan.recipe, choice, machine).fits:
            return gpus
        gpus *= 2
    return None


def require_fit(plan: Plan) -> None:
    """Raise ConfigError, naming the smallest change that would make it fit, unless the recipe fits unchanged."""
    if plan.own.fits:
        return
    problem = f"does not fit: {' and '.join(plan.own.too_large)}"
    if plan.smallest_change is not None:
        change = plan.smallest_change
        arguments = " ".join(f"--set {each}" for each in changes(plan.own.choice, change.choice))
        fix = f"The smallest change that fits: {arguments} ({gigabytes(change.memory.peak_bytes)})."
    else:
        gpus, least = more_gpus(plan), min(each.memory.peak_bytes for each in (plan.own, *plan.others))
        fix = f"No other ZeRO stage, recomputation or micro-batch fits either: the smallest needs {gigabytes(least)}."
        if gpus is not None:
            fix += f" It would fit on {gpus} of these GPUs."
    raise ConfigError(f"{plan.recipe.name} {problem}. {fix}")


def compare_with(measured: dict[str, Any], predicted: Prediction) -> Sequence[tuple[str, int, int]]:
    """Return (label, predicted bytes, measured bytes) rows for a trial of `predicted`."""
    memory = predicted.memory
    return [
        ("between steps", sum(memory.between_steps.values()), int(measured["between_steps_bytes"])),
        ("at the peak", memory.peak_bytes, int(measured["peak_bytes"])),
    ]


def gigabytes(count: float) -> str:
    """Format a byte count in GB, or in MB when small."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 or count == 0 else f"{count / 1e6:,.2f} MB"
