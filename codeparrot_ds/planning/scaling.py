"""How long an optimizer step takes on many GPUs: a model of what they compute and of what ZeRO has them send.

It is arithmetic, not a measurement: `benchmarks/scaling.py` holds what it says of traffic and time against real hosts.
Collectives are rings, as NCCL's for large messages: of a tensor that all ranks have or need, each link carries
(ranks - 1) / ranks of its bytes in a reduce-scatter or an all-gather, and twice that in an all-reduce; a host's network
cards carry what one link does. Source of what is sent when: ZeRO (Rajbhandari et al., 2020), section 7, and DeepSpeed
0.19.8's `bf16_optimizer.py`, `stage_1_and_2.py` and `stage3.py`.
"""

import math
from dataclasses import dataclass

from codeparrot_ds.run.sections import Model


@dataclass(frozen=True)
class Cluster:
    """GPUs, and what joins them.

    Attributes:
        gpus: ranks.
        host_bytes_per_second: of all network cards of a host together, each way.
        gpus_per_host: the most; fewer where there are fewer in all.
        hosts_named: how many, where not all have so many GPUs.
        gpu_flops: peak FLOP/s of one, dense, at the precision used.
        mfu: share of it that forward and backward passes reach.
        memory_bytes_per_second: of one, read and written.
        gpu_bytes_per_second: between the GPUs of a host, each way.
        host_hop_seconds, gpu_hop_seconds: what passing on to the next rank of a ring takes beside the bytes.
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
        """How many hosts there are, or the GPUs fill."""
        return self.hosts_named or math.ceil(self.gpus / self.gpus_per_host)


@dataclass(frozen=True)
class Traffic:
    """What the ranks of a job exchange in an optimizer step.

    Attributes:
        gathered_bytes: by all-gathers, of the tensors that every rank then has.
        reduced_bytes: by reduce-scatters, of the tensors that every rank put in.
        collectives: how many.
    """

    gathered_bytes: float
    reduced_bytes: float
    collectives: int

    def link_bytes(self, ranks: int) -> float:
        """What each rank sends to the next in a ring."""
        return (ranks - 1) / ranks * (self.gathered_bytes + self.reduced_bytes)


@dataclass(frozen=True)
class StepTime:
    """Of an optimizer step. What is really reached lies between `overlap_seconds` and `no_overlap_seconds`."""

    compute_seconds: float
    communication_seconds: float

    @property
    def no_overlap_seconds(self) -> float:
        """Seconds, when nothing is sent while anything is computed."""
        return self.compute_seconds + self.communication_seconds

    @property
    def overlap_seconds(self) -> float:
        """Seconds, when everything that can be is sent while something is computed."""
        return max(self.compute_seconds, self.communication_seconds)


def traffic(
    model: Model, zero_stage: int, accumulation: int, item_bytes: int = 2, bucket_elements: float = 5e7
) -> Traffic:
    """What ZeRO exchanges in a step.

    Stages 0 and 1 reduce gradients once a step, whole on every rank, which is an all-reduce: a reduce-scatter and an
    all-gather. Stage 2 does so too in DeepSpeed 0.19.8, but for every micro-batch: each rank keeps its part of what it
    then has. Stage 3 gathers the weights for every forward and every backward pass, and scatters the gradients of every
    micro-batch. Stages 1 and 2 gather the weights after the step.

    Args:
        model: its parameters and gradients are sent.
        zero_stage: 0 to 3.
        accumulation: micro-batches a step.
        item_bytes: of a parameter and of a gradient on their way.
        bucket_elements: of a collective.
    """
    whole = float(model.parameters * item_bytes)
    buckets = math.ceil(model.parameters / bucket_elements)
    if zero_stage == 3:
        return Traffic(2 * accumulation * whole, accumulation * whole, 3 * accumulation * buckets)
    reductions = accumulation if zero_stage == 2 else 1
    after_step = 1 if zero_stage else 0
    return Traffic((reductions + after_step) * whole, reductions * whole, (2 * reductions + after_step) * buckets)


def update_bytes(model: Model, zero_stage: int, accumulation: int, ranks: int) -> float:
    """What a GPU reads and writes of its memory in a step to add gradients up, to clip them and to update weights. It
    takes the same time however large a micro-batch is.

    Adding a bf16 gradient to one in fp32 takes 10 bytes a parameter, 6 for the first of a step; the norm takes 4, AdamW
    32, the cast of its weights 6 (counted by `tests/integration/test_step.py`). Stages 2 and 3 copy gradients into
    buckets, and keep a share.
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
    """The time of a step of `tokens_per_gpu` tokens on each GPU.

    Args:
        model: its FLOPs are computed.
        sent: by ZeRO.
        cluster: where.
        tokens_per_gpu: of all micro-batches of a step.
        recomputed: share of the forward pass that is done twice: all of it costs a third more, not counted in MFU.
        updated_bytes: `update_bytes`.
    """
    flops = model.flops_per_token * tokens_per_gpu * (3 + recomputed) / 3
    # The slowest link decides; a ring leaves and enters each host once.
    slowest = cluster.gpu_bytes_per_second
    if cluster.hosts > 1:
        slowest = min(slowest, cluster.host_bytes_per_second)
    hops = cluster.hosts * cluster.host_hop_seconds if cluster.hosts > 1 else 0.0
    hops += (cluster.gpus - cluster.hosts) * cluster.gpu_hop_seconds
    communication = sent.link_bytes(cluster.gpus) / slowest + sent.collectives * hops
    compute = flops / (cluster.gpu_flops * cluster.mfu) + updated_bytes / cluster.memory_bytes_per_second
    return StepTime(compute, communication if cluster.gpus > 1 else 0.0)
