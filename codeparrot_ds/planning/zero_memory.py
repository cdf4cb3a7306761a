"""What each stage of ZeRO holds in a rank's memory, and when, as DeepSpeed 0.19.8 does it.

Sources: its `bf16_optimizer.py`, `engine.py` (`allreduce_no_retain`), `zero/stage_1_and_2.py`, `zero/stage3.py`,
`zero/partition_parameters.py` and `zero/partitioned_param_coordinator.py`.
"""

import bisect
import itertools
import math
from dataclasses import dataclass
from functools import cached_property

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.planning.layout import BLOCK, Layout, Ledger, Tensor

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
        self.ledger.take("weights", 4 * sum(self.layout.groups))
        self.ledger.take("optimizer", 8 * sum(self.layout.groups))

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
            self.ledger.give("gradients", self.layout.item * tensor.elements)

    def end_backward(self) -> None:
        """After the last gradient of a micro-batch."""
        if self.last:
            self.reduce_whole([tensor.elements for tensor in self.layout.parameters], 4)

    def reduce_whole(self, sizes: list[int], item: int) -> None:
        """All-reduce whole gradients, many together: copied into one tensor, and in another type where that is sent."""
        bucket: list[int] = []
        for number, elements in enumerate(sizes, start=1):
            bucket.append(elements)
            if sum(bucket) > _WHOLE_REDUCTION or number == len(sizes):
                flat = item * sum(bucket) if len(bucket) > 1 else 0
                sent = self.layout.item * sum(bucket) if self.layout.item != item else 0
                self.ledger.pass_through("communication", flat + sent)
                bucket = []

    def step(self) -> None:
        """The optimizer's."""
        self.ledger.give("gradients", self.layout.item * sum(self.layout.groups))

    def gather_weights(self) -> None:
        """All ranks' parts after the step, in place; gloo gathers into a copy."""
        if self.layout.on_cpu and self.layout.world_size > 1:
            self.ledger.pass_through("communication", self.layout.item * max(self.whole))


class _Stage1InBf16(Zero):
    """`BF16_Optimizer`: gradients are whole, those of the micro-batch beside those that are accumulated in fp32."""

    def resident(self) -> None:
        self.ledger.take("weights", self.layout.item * sum(self.whole))
        self.ledger.take("optimizer", 12 * self.partition)
        self.ledger.take("gradients in fp32", 4 * sum(self.whole))

    def end_backward(self) -> None:
        if self.last:
            self.reduce_whole(self.whole, 4)

    def step(self) -> None:
        self.gather_weights()
        super().step()


class _Bucketed(Zero):
    """Gradients leave through buckets as they come."""

    in_bucket = 0  # elements

    def resident(self) -> None:
        """Whole weights, and this rank's part of the optimizer."""
        self.ledger.take("weights", self.layout.item * sum(self.whole))
        self.ledger.take("optimizer", 12 * self.partition)

    @cached_property
    def bucket_elements(self) -> int:
        """Of a bucket. A larger tensor is reduced alone, where it is."""
        return int(self.layout.zero.get("reduce_bucket_size", 5e8))

    def put(self, tensor: Tensor, part: str, item: int) -> None:
        """Copy a gradient of `part` into the bucket, which is reduced before it overflows."""
        if self.bucket and self.in_bucket + tensor.elements > self.bucket_elements:
            self.empty(part, item)
        if tensor.elements <= self.bucket_elements:
            self.ledger.give(part, item * tensor.elements)
        self.bucket.append(tensor)
        self.in_bucket += tensor.elements

    def empty(self, part: str, item: int) -> None:
        """Reduce what is in the bucket, and drop what was too large for it."""
        self.reduce()
        for tensor in self.bucket:
            if tensor.elements > self.bucket_elements:
                self.ledger.give(part, item * tensor.elements)
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
            self.ledger.take("communication", 4 * self.double_buffer)

    def gradient(self, tensor: Tensor) -> None:
        self.ledger.give("gradients", self.layout.item * tensor.elements)
        if self.first:
            self.ledger.take("gradients in fp32", 4 * tensor.elements)
        if self.last:
            self.put(tensor, "gradients in fp32", 4)

    def reduce(self) -> None:
        if not self._kept:
            self.ledger.take("gradients in fp32", 4 * self.partition)
            self._kept = True

    def end_backward(self) -> None:
        if self.last:
            self.empty("gradients in fp32", 4)

    def step(self) -> None:
        self.take_norm()
        self.ledger.pass_through("gradients in fp32", 4 * self.partition)  # put together
        self.ledger.give("communication", 4 * self.double_buffer)
        self.gather_weights()
        self.ledger.give("gradients in fp32", self.ledger.held["gradients in fp32"])


class _Stage2(_Bucketed):
    """Gradients are partitioned as they come, and accumulated in fp32."""

    _kept = False  # this rank's part of the micro-batch's gradients, or of all

    def begin_backward(self, first: bool, last: bool) -> None:
        super().begin_backward(first, last)
        self._kept = not first and self.layout.item == 2
        self.ledger.take("communication", self.layout.item * self.double_buffer)

    def gradient(self, tensor: Tensor) -> None:
        self.put(tensor, "gradients", self.layout.item)

    def reduce(self) -> None:
        if not self._kept:  # in fp32, those of a micro-batch are added to the others when all of them are there
            self.ledger.take("gradients in fp32", 4 * self.partition)
            self._kept = True
        if self.layout.item == 2:  # cut into pieces for this rank's gradients in fp32, and put together again
            self.ledger.pass_through("communication", self.layout.item * self.in_bucket)

    def end_backward(self) -> None:
        self.empty("gradients", self.layout.item)
        self.ledger.give("communication", self.layout.item * self.double_buffer)
        if not self.first and self.layout.item == 4:
            self.ledger.give("gradients in fp32", 4 * self.partition)

    def step(self) -> None:
        self.take_norm()
        if self.layout.item == 4:  # put together
            self.ledger.pass_through("gradients in fp32", 4 * self.partition)
        self.ledger.give("gradients in fp32", 4 * self.partition)
        self.gather_weights()


@dataclass
class _Gathered:
    """Parameters that are gathered together."""

    tensors: list[Tensor]
    copied: bool = False

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)


class _Stage3(_Bucketed):
    """Weights are partitioned too: gathered before each module needs them, some ahead, and dropped behind it."""

    def __init__(self, layout: Layout, ledger: Ledger) -> None:
        threshold = layout.zero.get("stage3_param_persistence_threshold", 1e5)
        self._persistent = {tensor.name for tensor in layout.parameters if tensor.elements < threshold}
        self._ahead = int(layout.zero.get("stage3_prefetch_bucket_size", 5e7))
        self._most_live = int(layout.zero.get("stage3_max_live_parameters", 1e9))
        self._reuse_distance = int(layout.zero.get("stage3_max_reuse_distance", 1e9))
        self._live = set(self._persistent)
        self._live_elements = sum(tensor.elements for tensor in layout.parameters if tensor.name in self._live)
        self._on_the_way: dict[str, _Gathered] = {}
        self._place = self._queue = 0  # in the trace
        self._stays: dict[str, int] = {}  # parameter -> place of the trace before which it is not dropped
        super().__init__(layout, ledger)

    @property
    def partition(self) -> int:
        return sum(math.ceil(tensor.elements / self.layout.world_size) for tensor in self.layout.parameters)

    @property
    def _copies(self) -> bool:
        """Whether a gathered weight is another tensor than this rank's part of it."""
        return self.layout.world_size > 1 or bool(self.layout.offloads("param"))

    def resident(self) -> None:
        item, layout = self.layout.item, self.layout
        offloaded = layout.offloads("optimizer")
        self.ledger.take("weights", item * self.partition, on_host=bool(layout.offloads("param")))
        if self._copies:
            self.ledger.take("gathered weights", item * self._live_elements)
        if offloaded != "nvme":
            self.ledger.take("optimizer", 12 * self.partition, on_host=bool(offloaded))
        self.ledger.take("gradients in fp32", 4 * self.partition, on_host=bool(offloaded))
        if offloaded == "cpu":  # accumulated ones, and those that the optimizer reads
            self.ledger.take("gradients in fp32", 4 * self.partition, on_host=True)
        self.ledger.take("communication", item * self.bucket_elements)

    @cached_property
    def _trace(self) -> list[list[Tensor]]:
        """The parameters of each module in the order in which a micro-batch needs them."""
        layout = self.layout
        last, block = len(layout.modules) - 1, len(BLOCK)
        order = [*range(last + 1), last, last - 1]
        for i in reversed(range(layout.model.n_layer)):
            mine = range(2 + i * block, 2 + (i + 1) * block)
            order += mine if layout.recomputes(i) else []
            order += reversed(mine)
        return [layout.modules[number] for number in (*order, 1, 0)]

    @cached_property
    def _uses(self) -> dict[str, list[int]]:
        """Where in the trace each parameter is needed."""
        uses: dict[str, list[int]] = {}
        for place, tensors in enumerate(self._trace):
            for tensor in tensors:
                uses.setdefault(tensor.name, []).append(place)
        return uses

    @cached_property
    def _passed(self) -> list[int]:
        """Elements of all that comes before each place of the trace."""
        return list(
            itertools.accumulate((sum(each.elements for each in tensors) for tensors in self._trace), initial=0)
        )

    def use(self, number: int, forward: bool, leave: bool = True) -> None:
        tensors = self.layout.modules[number]
        self._gather([tensor for tensor in tensors if tensor.name not in self._live])
        for tensor in tensors:
            self._wait(tensor)
        self._place += 1
        self._gather(self._next())
        if leave:
            self.leave(number, forward)

    def _next(self) -> list[Tensor]:
        """What to gather ahead. The queue is looked through once: what was there when its turn came stays till then."""
        room = min(self._most_live - self._live_elements, self._ahead)
        self._queue = max(self._queue, self._place)
        wanted: list[Tensor] = []
        while room > 0 and self._queue < len(self._trace):
            for tensor in self._trace[self._queue]:
                self._stays[tensor.name] = self._queue
                if tensor.name not in self._live and tensor not in wanted:
                    wanted.append(tensor)
                    room -= tensor.elements
            self._queue += 1
        return wanted

    def _gather(self, tensors: list[Tensor]) -> None:
        """Begin to gather parameters into one buffer."""
        if not tensors:
            return
        gathered = _Gathered(tensors)
        self._live.update(tensor.name for tensor in tensors)
        self._live_elements += gathered.elements
        if self._copies:
            self.ledger.take("gathered weights", self.layout.item * gathered.elements)
            self._on_the_way.update(dict.fromkeys((tensor.name for tensor in tensors), gathered))

    def _wait(self, tensor: Tensor) -> None:
        """All that came together is copied out of its buffer when the first of it is needed; the buffer goes when the
        last of it has been. What came alone is not copied."""
        gathered = self._on_the_way.pop(tensor.name, None)
        if gathered is None or len(gathered.tensors) == 1:
            return
        count = self.layout.item * gathered.elements
        if not gathered.copied:
            self.ledger.take("gathered weights", count)
            gathered.copied = True
        if all(self._on_the_way.get(each.name) is not gathered for each in gathered.tensors):
            self.ledger.give("gathered weights", count)

    def leave(self, number: int, forward: bool) -> None:
        for tensor in self.layout.modules[number]:
            if tensor.name in self._persistent or tensor.name not in self._live:
                continue
            if self._stays.get(tensor.name, -1) >= self._place:
                continue
            uses = self._uses[tensor.name]
            later = bisect.bisect_left(uses, self._place)
            # Needed again before so many other parameters have passed?
            if later < len(uses) and self._passed[uses[later]] - self._passed[self._place] < self._reuse_distance:
                continue
            self._drop(tensor)

    def _drop(self, tensor: Tensor) -> None:
        self._live.remove(tensor.name)
        self._live_elements -= tensor.elements
        if self._copies:
            self.ledger.give("gathered weights", self.layout.item * tensor.elements)

    def gradient(self, tensor: Tensor) -> None:
        self.put(tensor, "gradients", self.layout.item)

    def reduce(self) -> None:
        item, world_size = self.layout.item, self.layout.world_size
        mine = sum(math.ceil(tensor.elements / world_size) for tensor in self.bucket)
        alone = len(self.bucket) == 1 and self.bucket[0].elements % world_size == 0
        copies = (0 if alone else 1) + (1 if self.layout.on_cpu and world_size > 1 else 0)  # gloo reduces a copy
        self.ledger.pass_through("communication", copies * item * mine * world_size + (4 * mine if item == 2 else 0))

    def end_backward(self) -> None:
        self.empty("gradients", self.layout.item)
        self._place = self._queue = 0
        self._stays = {}
        for tensor in self.layout.parameters:
            if tensor.name in self._live and tensor.name not in self._persistent:
                self._drop(tensor)

    def step(self) -> None:
        if not self.layout.offloads("optimizer"):  # one group after the other, put together
            groups = (math.ceil(elements / self.layout.world_size) for elements in self.layout.groups)
            self.ledger.pass_through("gradients in fp32", 4 * min(max(groups), int(self._sub_group)))

    @property
    def _sub_group(self) -> float:
        return float(self.layout.zero.get("sub_group_size", 1e9))


def zero_of(layout: Layout, ledger: Ledger) -> Zero:
    """The stage of a layout, with what is there all the time taken. Raises ConfigError for offload below stage 3."""
    if layout.stage < 3 and (layout.offloads("optimizer") or layout.offloads("param")):
        raise ConfigError(f"offload is reckoned at ZeRO-3 only, and zero_optimization.stage is {layout.stage}.")
    if layout.stage == 1:
        return (_Stage1InBf16 if layout.precision == "bf16" else _Stage1)(layout, ledger)
    return {0: Zero, 2: _Stage2, 3: _Stage3}[layout.stage](layout, ledger)
