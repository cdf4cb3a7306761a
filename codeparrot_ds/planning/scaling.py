"""Cost model for the duration of an optimizer step on many GPUs: computation, and ZeRO's communication.

It is a calculation, not a measurement: `benchmarks/scaling.py` compares its traffic and times with real hosts.
Collectives are rings, as in NCCL for large messages: each link carries (ranks - 1) / ranks of a tensor's bytes in a
reduce-scatter or an all-gather, and twice that in an all-reduce; the network cards of a host carry as much as one link.
Communication volumes follow ZeRO (Rajbhandari et al., 2020), section 7, and DeepSpeed 0.19.8's `bf16_optimizer.py`,
`stage_1_and_2.py` and `stage3.py`.
"""

import math
from dataclasses import dataclass

from codeparrot_ds.run.sections import Model


@dataclass(frozen=True)
class Cluster:
    """GPUs and their interconnect.

    Attributes:
        gpus: number of ranks.
        host_bytes_per_second: bandwidth of all network cards of a host together, per direction.
        gpus_per_host: maximum per host; a smaller job uses fewer.
        hosts_named: number of hosts, when not every host has `gpus_per_host` GPUs.
        gpu_flops: peak dense FLOP/s per GPU at the precision used.
        mfu: fraction of `gpu_flops` reached by forward and backward passes.
        memory_bytes_per_second: memory bandwidth per GPU, reads and writes together.
        gpu_bytes_per_second: bandwidth between the GPUs of a host, per direction.
        host_hop_seconds: latency per ring hop between hosts.
        gpu_hop_seconds: latency per ring hop between the GPUs of a host.
    """

    gpus: int
    host_bytes_per_second: float
    gpus_per_host: int = 8
    hosts_named: int | None = None
    gpu_flops: float = 989e12
    mfu: float = 0.5
    memory_bytes_per_second: float = 3.35e12
    gpu_bytes_per_second: float = 450e9
    host_hop_seconds: float = 5e-6
    gpu_hop_seconds: float = 1e-6

    @property
    def hosts(self) -> int:
        """Number of hosts: as named, or as many as the GPUs fill."""
        return self.hosts_named or math.ceil(self.gpus / self.gpus_per_host)


@dataclass(frozen=True)
class Traffic:
    """Communication of the ranks in one optimizer step.

    Attributes:
        gathered_bytes: output size of all-gathers, i.e. of the full tensors.
        reduced_bytes: input size of reduce-scatters, i.e. of the full tensors.
        collectives: number of collectives.
    """

    gathered_bytes: float
    reduced_bytes: float
    collectives: int

    def link_bytes(self, ranks: int) -> float:
        """Bytes that each rank sends to its successor in the ring."""
        return (ranks - 1) / ranks * (self.gathered_bytes + self.reduced_bytes)


@dataclass(frozen=True)
class StepTime:
    """Duration of an optimizer step. The actual one is between `overlap_seconds` and `no_overlap_seconds`."""

    compute_seconds: float
    communication_seconds: float

    @property
    def no_overlap_seconds(self) -> float:
        """Seconds when communication does not overlap with computation."""
        return self.compute_seconds + self.communication_seconds

    @property
    def overlap_seconds(self) -> float:
        """Seconds when communication overlaps with computation as far as possible."""
        return max(self.compute_seconds, self.communication_seconds)


def traffic(
    model: Model, zero_stage: int, accumulation: int, item_bytes: int = 2, bucket_elements: float = 5e7
) -> Traffic:
    """Return ZeRO's communication in one optimizer step.

    Stages 0 and 1 all-reduce the gradients once per step: a reduce-scatter and an all-gather. In DeepSpeed 0.19.8 stage
    2 all-reduces them as well, but for every micro-batch; each rank then keeps its partition of the result. Stage 3
    all-gathers the weights for every forward and every backward pass, and reduce-scatters the gradients of every
    micro-batch. Stages 1 and 2 all-gather the weights after the step.

    Args:
        model: whose parameters and gradients are sent.
        zero_stage: 0 to 3.
        accumulation: micro-batches per step.
        item_bytes: bytes per parameter and per gradient when sent.
        bucket_elements: elements per collective.
    """
    whole = float(model.parameters * item_bytes)
    buckets = math.ceil(model.parameters / bucket_elements)
    if zero_stage == 3:
        return Traffic(2 * accumulation * whole, accumulation * whole, 3 * accumulation * buckets)
    reductions = accumulation if zero_stage == 2 else 1
    after_step = 1 if zero_stage else 0
    return Traffic((reductions + after_step) * whole, reductions * whole, (2 * reductions + after_step) * buckets)


def update_bytes(model: Model, zero_stage: int, accumulation: int, ranks: int) -> float:
    """Bytes that a GPU reads and writes per step to accumulate and clip gradients and to update the weights.

    They do not depend on the size of a micro-batch. Adding a bf16 gradient to an fp32 one moves 10 bytes per parameter,
    6 for the first of a step; the norm moves 4, AdamW 32, and casting its weights 6 (counted by
    `tests/integration/test_step.py`). Stages 2 and 3 copy gradients into buckets and keep their own partition.
    """
    share = 1 / max(1, ranks) if zero_stage else 1.0
    a_micro_batch = 10.0 if zero_stage < 2 else 4 + 10 * share
    return model.parameters * (accumulation * a_micro_batch + 38 * share)


def step_time(
    model: Model,
    sent: Traffic,
    cluster: Cluster,
    tokens_per_gpu: int,
    recomputed: float = 0.0,
    updated_bytes: float = 0.0,
) -> StepTime:
    """Return the duration of a step with `tokens_per_gpu` tokens on each GPU.

    Args:
        model: determines the FLOPs.
        sent: ZeRO's communication.
        cluster: GPUs and interconnect.
        tokens_per_gpu: tokens of all micro-batches of a step.
        recomputed: fraction of the forward pass that is recomputed: 1 adds a third to the compute time. MFU does not
            count it.
        updated_bytes: result of `update_bytes`.
    """
    flops = model.flops_per_token * tokens_per_gpu * (3 + recomputed) / 3
    # The slowest link is the bottleneck; a ring leaves and enters each host once.
    slowest = cluster.gpu_bytes_per_second
    if cluster.hosts > 1:
        slowest = min(slowest, cluster.host_bytes_per_second)
    hops = cluster.hosts * cluster.host_hop_seconds if cluster.hosts > 1 else 0.0
    hops += (cluster.gpus - cluster.hosts) * cluster.gpu_hop_seconds
    communication = sent.link_bytes(cluster.gpus) / slowest + sent.collectives * hops
    compute = flops / (cluster.gpu_flops * cluster.mfu) + updated_bytes / cluster.memory_bytes_per_second
    return StepTime(compute, communication if cluster.gpus > 1 else 0.0)
