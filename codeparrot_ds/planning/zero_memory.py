"""What each stage of ZeRO holds in a rank's memory, and when, as DeepSpeed 0.19.8 does it.

Sources: its `bf16_optimizer.py`, `engine.py` (`allreduce_no_retain`), `zero/stage_1_and_2.py`, `zero/stage3.py`,
`zero/partition_parameters.py` and `zero/partitioned_param_coordinator.py`.
"""

import math
from functools import cached_property

from codeparrot_ds.planning.layout import Layout, Ledger, Tensor

_WHOLE_REDUCTION = 500_000_000  # elements of a bucket where whole gradients are reduced after a backward pass


def _padded(elements: int, multiple: int) -> int:
    return math.ceil(elements / multiple) * multiple


class Zero:
    """What is common to all stages, and stage 0: everything is whole, on every rank, in fp32.

    A step tells it what happens: `use` and `leave` a module, `begin_backward`, each `gradient`, `end_backward`, `step`.
    """

    def __init__(self, layout: Layout, ledger: Ledger) -> None:
        self.layout, self.ledger = layout, ledger
        self.first = self.last = True  # micro-batch of the step
        self.bucket: list[Tensor] = []
        self.resident()

    @property
    def whole(self) -> list[int]:
        """Elements of the optimizer's groups, padded so that ranks have equal parts."""
        return [_padded(elements, 2 * self.layout.world_size) for elements in self.layout.groups]

    @property
    def partition(self) -> int:
        """Elements of this rank's part."""
        return sum(self.whole) // self.layout.world_size

    def resident(self) -> None:
        """Take what is there all the time."""
        self.ledger.alloc("weights", 4 * sum(self.layout.groups))
        self.ledger.alloc("optimizer", 8 * sum(self.layout.groups))

    def use(self, number: int, forward: bool, leave: bool = True) -> None:
        """Module `number` of `layout.modules` computes, and has then computed unless `leave` is called later."""

    def leave(self, number: int, forward: bool) -> None:
        """It has computed."""

    def begin_backward(self, first: bool, last: bool) -> None:
        """Of the `first`, the `last` micro-batch of a step, or one between."""
        self.first, self.last = first, last

    def gradient(self, tensor: Tensor) -> None:
        """A gradient has been computed, and is held as one of "gradients"."""
        if not self.first:  # added to what is there
            self.ledger.free("gradients", self.layout.item * tensor.elements)

    def end_backward(self) -> None:
        """After the last gradient of a micro-batch: all are all-reduced, many together, copied into one tensor."""
        if not self.last:
            return
        bucket: list[int] = []
        for number, tensor in enumerate(self.layout.parameters, start=1):
            bucket.append(tensor.elements)
            if sum(bucket) > _WHOLE_REDUCTION or number == len(self.layout.parameters):
                self.ledger.pass_through("communication", 4 * sum(bucket) if len(bucket) > 1 else 0)
                bucket = []

    def step(self) -> None:
        """The optimizer's."""
        self.ledger.free("gradients", self.layout.item * sum(self.layout.groups))

    def gather_weights(self) -> None:
        """All ranks' parts after the step, in place; gloo gathers into a copy."""
        if self.layout.on_cpu and self.layout.world_size > 1:
            self.ledger.pass_through("communication", self.layout.item * max(self.whole))


class _Stage1InBf16(Zero):
    """`training.zero1`: gradients are accumulated whole, in fp32, each as soon as it is there."""

    def resident(self) -> None:
        self.ledger.alloc("weights", self.layout.item * sum(self.whole))
        self.ledger.alloc("optimizer", 12 * self.partition)
        self.ledger.alloc("gradients in fp32", 4 * sum(self.whole))

    def gradient(self, tensor: Tensor) -> None:
        if not self.first and self.layout.on_cpu:  # whose kernel adds tensors of one type only
            self.ledger.pass_through("gradients in fp32", 4 * tensor.elements)
        self.ledger.free("gradients", self.layout.item * tensor.elements)

    def end_backward(self) -> None:
        if self.last and self.layout.world_size > 1:
            bucket = min(int(self.layout.zero.get("reduce_bucket_size", 5e8)), max(self.whole))
            self.ledger.pass_through("communication", self.layout.item * bucket)

    def step(self) -> None:
        self.gather_weights()


class _Bucketed(Zero):
    """Gradients leave through buckets as they come."""

    in_bucket = 0  # elements

    def resident(self) -> None:
        """Whole weights, and this rank's part of the optimizer."""
        self.ledger.alloc("weights", self.layout.item * sum(self.whole))
        self.ledger.alloc("optimizer", 12 * self.partition)

    @cached_property
    def bucket_elements(self) -> int:
        """Of a bucket. A larger tensor is reduced alone, where it is."""
        return int(self.layout.zero.get("reduce_bucket_size", 5e8))

    def put(self, tensor: Tensor, part: str, item: int) -> None:
        """Copy a gradient of `part` into the bucket, which is reduced before it overflows."""
        if self.bucket and self.in_bucket + tensor.elements > self.bucket_elements:
            self.empty(part, item)
        if tensor.elements <= self.bucket_elements:
            self.ledger.free(part, item * tensor.elements)
        self.bucket.append(tensor)
        self.in_bucket += tensor.elements

    def empty(self, part: str, item: int) -> None:
        """Reduce what is in the bucket, and drop what was too large for it."""
        self.reduce()
        for tensor in self.bucket:
            if tensor.elements > self.bucket_elements:
                self.ledger.free(part, item * tensor.elements)
        self.bucket, self.in_bucket = [], 0

    def reduce(self) -> None:
        """Average the bucket over ranks; this rank keeps its part."""
        raise NotImplementedError

    @property
    def double_buffer(self) -> int:
        """Elements of the buffers at stages 1 and 2."""
        return self.bucket_elements * (2 if self.layout.zero.get("overlap_comm") else 1)

    def take_norm(self) -> None:
        """The norm of the gradients: one by one, in fp64."""
        largest = max(tensor.elements for tensor in self.layout.parameters)
        self.ledger.pass_through("norm of the gradients", 8 * min(largest, self.partition))


class _Stage1(_Bucketed):
    """Stage 1 in fp16 and fp32: gradients are accumulated whole, in fp32, and reduced with the last micro-batch's."""

    _kept = False  # this rank's part, for the optimizer

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
        self.ledger.pass_through("gradients in fp32", 4 * self.partition)  # put together
        self.ledger.free("communication", 4 * self.double_buffer)
        self.gather_weights()
        self.ledger.free("gradients in fp32", self.ledger.held["gradients in fp32"])


class _Stage2(_Bucketed):
    """Gradients are partitioned as they come, and accumulated in fp32."""

    _kept = False  # this rank's part of the micro-batch's gradients, or of all

    def begin_backward(self, first: bool, last: bool) -> None:
        super().begin_backward(first, last)
        self._kept = not first and self.layout.item == 2
        self.ledger.alloc("communication", self.layout.item * self.double_buffer)

    def gradient(self, tensor: Tensor) -> None:
        self.put(tensor, "gradients", self.layout.item)

    def reduce(self) -> None:
        if not self._kept:  # in fp32, those of a micro-batch are added to the others when all of them are there
            self.ledger.alloc("gradients in fp32", 4 * self.partition)
            self._kept = True
        if self.layout.item == 2:  # cut into pieces for this rank's gradients in fp32, and put together again
            self.ledger.pass_through("communication", self.layout.item * self.in_bucket)

    def end_backward(self) -> None:
        self.empty("gradients", self.layout.item)
        self.ledger.free("communication", self.layout.item * self.double_buffer)
        if not self.first and self.layout.item == 4:
            self.ledger.free("gradients in fp32", 4 * self.partition)

    def step(self) -> None:
        self.take_norm()
        if self.layout.item == 4:  # put together
            self.ledger.pass_through("gradients in fp32", 4 * self.partition)
        self.ledger.free("gradients in fp32", 4 * self.partition)
        self.gather_weights()
