"""Memory that each ZeRO stage holds on a rank, and when, as implemented in DeepSpeed 0.19.8.

Sources: DeepSpeed's `bf16_optimizer.py`, `engine.py` (`allreduce_no_retain`), `zero/stage_1_and_2.py`,
`zero/stage3.py`, `zero/partition_parameters.py` and `zero/partitioned_param_coordinator.py`.
"""

import math
from functools import cached_property

from codeparrot_ds.planning.layout import Layout, Ledger, Tensor

_WHOLE_REDUCTION = 500_000_000  # elements per bucket where all gradients are reduced after the backward pass


def _padded(elements: int, multiple: int) -> int:
    return math.ceil(elements / multiple) * multiple


class Zero:
    """Base class of all stages, and stage 0: every rank holds all state unpartitioned, in fp32.

    The walk through a step calls `use` and `leave` for each module, `begin_backward`, `gradient` for each gradient,
    `end_backward` and `step`.
    """

    def __init__(self, layout: Layout, ledger: Ledger) -> None:
        self.layout, self.ledger = layout, ledger
        self.first = self.last = True  # position of the micro-batch in the step
        self.bucket: list[Tensor] = []
        self.resident()

    @property
    def whole(self) -> list[int]:
        """Elements of each parameter group, padded so that all ranks have partitions of equal size."""
        return [_padded(elements, 2 * self.layout.world_size) for elements in self.layout.groups]

    @property
    def partition(self) -> int:
        """Elements in this rank's partition."""
        return sum(self.whole) // self.layout.world_size

    def resident(self) -> None:
        """Allocate what is held for the whole run."""
        self.ledger.alloc("weights", 4 * sum(self.layout.groups))
        self.ledger.alloc("optimizer", 8 * sum(self.layout.groups))

    def use(self, number: int, forward: bool, leave: bool = True) -> None:
        """Begin module `number` of `layout.modules`; with `leave`, also end it."""

    def leave(self, number: int, forward: bool) -> None:
        """End module `number`: its computation is done."""

    def begin_backward(self, first: bool, last: bool) -> None:
        """Begin the backward pass of a micro-batch, which may be the `first` or the `last` of the step, or both."""
        self.first, self.last = first, last

    def gradient(self, tensor: Tensor) -> None:
        """Account for a gradient that has just been computed and is held under "gradients"."""
        if not self.first:  # accumulated into the existing one
            self.ledger.free("gradients", self.layout.item * tensor.elements)

    def end_backward(self) -> None:
        """End a backward pass. After the last, gradients are copied into buckets and all-reduced."""
        if not self.last:
            return
        bucket: list[int] = []
        for number, tensor in enumerate(self.layout.parameters, start=1):
            bucket.append(tensor.elements)
            if sum(bucket) > _WHOLE_REDUCTION or number == len(self.layout.parameters):
                self.ledger.pass_through("communication", 4 * sum(bucket) if len(bucket) > 1 else 0)
                bucket = []

    def step(self) -> None:
        """Take the optimizer step."""
        self.ledger.free("gradients", self.layout.item * sum(self.layout.groups))

    def gather_weights(self) -> None:
        """All-gather the updated partitions after the step, in place; gloo gathers into a copy."""
        if self.layout.on_cpu and self.layout.world_size > 1:
            self.ledger.pass_through("communication", self.layout.item * max(self.whole))


class _Stage1InBf16(Zero):
    """`training.zero1`: unpartitioned gradients are accumulated in fp32, each as soon as it is computed."""

    def resident(self) -> None:
        self.ledger.alloc("weights", self.layout.item * sum(self.whole))
        self.ledger.alloc("optimizer", 12 * self.partition)
        self.ledger.alloc("gradients in fp32", 4 * sum(self.whole))

    def gradient(self, tensor: Tensor) -> None:
        if not self.first and self.layout.on_cpu:  # the CPU kernel only adds tensors of the same dtype
            self.ledger.pass_through("gradients in fp32", 4 * tensor.elements)
        self.ledger.free("gradients", self.layout.item * tensor.elements)

    def end_backward(self) -> None:
        if self.last and self.layout.world_size > 1:
            bucket = min(int(self.layout.zero.get("reduce_bucket_size", 5e8)), max(self.whole))
            self.ledger.pass_through("communication", self.layout.item * bucket)

    def step(self) -> None:
        self.gather_weights()


class _Bucketed(Zero):
    """Base of the stages that reduce gradients in buckets during the backward pass."""

    in_bucket = 0  # elements

    def resident(self) -> None:
        """Allocate the unpartitioned weights and this rank's partition of the optimizer state."""
        self.ledger.alloc("weights", self.layout.item * sum(self.whole))
        self.ledger.alloc("optimizer", 12 * self.partition)

    @cached_property
    def bucket_elements(self) -> int:
        """Capacity of a bucket in elements. A larger tensor is reduced on its own, without a copy."""
        return int(self.layout.zero.get("reduce_bucket_size", 5e8))

    def put(self, tensor: Tensor, part: str, item: int) -> None:
        """Copy a gradient (held under `part`, `item` bytes per element) into the bucket, reducing it first if full."""
        if self.bucket and self.in_bucket + tensor.elements > self.bucket_elements:
            self.empty(part, item)
        if tensor.elements <= self.bucket_elements:
            self.ledger.free(part, item * tensor.elements)
        self.bucket.append(tensor)
        self.in_bucket += tensor.elements

    def empty(self, part: str, item: int) -> None:
        """Reduce the bucket, and free the gradients that were too large to be copied into it."""
        self.reduce()
        for tensor in self.bucket:
            if tensor.elements > self.bucket_elements:
                self.ledger.free(part, item * tensor.elements)
        self.bucket, self.in_bucket = [], 0

    def reduce(self) -> None:
        """Average the bucket over ranks; this rank keeps its partition."""
        raise NotImplementedError

    @property
    def double_buffer(self) -> int:
        """Elements of the communication buffers at stages 1 and 2: doubled with `overlap_comm`."""
        return self.bucket_elements * (2 if self.layout.zero.get("overlap_comm") else 1)

    def take_norm(self) -> None:
        """Compute the gradient norm, one tensor at a time, in fp64."""
        largest = max(tensor.elements for tensor in self.layout.parameters)
        self.ledger.pass_through("norm of the gradients", 8 * min(largest, self.partition))


class _Stage1(_Bucketed):
    """Stage 1 in fp16 and fp32: accumulate unpartitioned gradients in fp32, reduce them in the last backward pass."""

    _kept = False  # whether this rank's partition is allocated, for the optimizer

    def begin_backward(self, first: bool, last: bool) -> None:
        super().begin_backward(first, last)
        if first:
            self.ledger.alloc("communication", 4 * self.double_buffer)

    def gradient(self, tensor: Tensor) -> None:
        self.ledger.free("gradients", self.layout.item * tensor.elements)
        if self.first:
            self.ledger.alloc("gradients in fp32", 4 * tensor.elements)
        if self.last:
            self.put(tensor, "gradients in fp32", 4)

    def reduce(self) -> None:
        if not self._kept:
            self.ledger.alloc("gradients in fp32", 4 * self.partition)
            self._kept = True

    def end_backward(self) -> None:
        if self.last:
            self.empty("gradients in fp32", 4)

    def step(self) -> None:
        self.take_norm()
        self.ledger.pass_through("gradients in fp32", 4 * self.partition)  # concatenated
        self.ledger.free("communication", 4 * self.double_buffer)
        self.gather_weights()
        self.ledger.free("gradients in fp32", self.ledger.held["gradients in fp32"])


class _Stage2(_Bucketed):
    """Stage 2: gradients are partitioned as they are computed, and accumulated in fp32."""

    _kept = False  # whether the partition of the micro-batch's gradients, or of the accumulated ones, is allocated

    def begin_backward(self, first: bool, last: bool) -> None:
        super().begin_backward(first, last)
        self._kept = not first and self.layout.item == 2
        self.ledger.alloc("communication", self.layout.item * self.double_buffer)

    def gradient(self, tensor: Tensor) -> None:
        self.put(tensor, "gradients", self.layout.item)

    def reduce(self) -> None:
        if not self._kept:  # in fp32, a micro-batch's gradients are accumulated once all of them are computed
            self.ledger.alloc("gradients in fp32", 4 * self.partition)
            self._kept = True
        if self.layout.item == 2:  # sliced for this rank's fp32 gradients, and concatenated again
            self.ledger.pass_through("communication", self.layout.item * self.in_bucket)

    def end_backward(self) -> None:
        self.empty("gradients", self.layout.item)
        self.ledger.free("communication", self.layout.item * self.double_buffer)
        if not self.first and self.layout.item == 4:
            self.ledger.free("gradients in fp32", 4 * self.partition)

    def step(self) -> None:
        self.take_norm()
        if self.layout.item == 4:  # concatenated
            self.ledger.pass_through("gradients in fp32", 4 * self.partition)
        self.ledger.free("gradients in fp32", 4 * self.partition)
        self.gather_weights()
