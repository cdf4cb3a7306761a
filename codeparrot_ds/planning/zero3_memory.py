"""Memory that ZeRO-3 holds on a rank, and the choice of the memory model for a layout."""

import bisect
import itertools
import math
from dataclasses import dataclass
from functools import cached_property

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.planning.layout import BLOCK, Layout, Ledger, Tensor
from codeparrot_ds.planning.zero_memory import Zero, _Bucketed, _Stage1, _Stage1InBf16, _Stage2


@dataclass
class _Gathered:
    """Parameters that are gathered in one all-gather."""

    tensors: list[Tensor]
    copied: bool = False

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)


class _Stage3(_Bucketed):
    """Stage 3: weights are partitioned too, gathered before they are needed (some prefetched) and released after use.

    The weights of a block are gathered together, and its gradients are reduced together once all are computed.
    """

    def __init__(self, layout: Layout, ledger: Ledger) -> None:
        threshold = layout.zero.get("stage3_param_persistence_threshold", 1e5)
        self._persistent = {tensor.name for tensor in layout.parameters if tensor.elements < threshold}
        self._ahead = int(layout.zero.get("stage3_prefetch_bucket_size", 5e7))
        self._most_live = int(layout.zero.get("stage3_max_live_parameters", 1e9))
        self._reuse_distance = int(layout.zero.get("stage3_max_reuse_distance", 1e9))
        self._live = set(self._persistent)
        self._live_elements = sum(tensor.elements for tensor in layout.parameters if tensor.name in self._live)
        self._on_the_way: dict[str, _Gathered] = {}
        self._place = self._queue = 0  # positions in the trace
        self._stays: dict[str, int] = {}  # parameter -> position in the trace before which it is not released
        self._of_block: list[Tensor] = []  # gradients waiting for the rest of their block
        super().__init__(layout, ledger)

    @property
    def partition(self) -> int:
        return sum(math.ceil(tensor.elements / self.layout.world_size) for tensor in self.layout.parameters)

    @property
    def _copies(self) -> bool:
        """Whether a gathered weight is a separate tensor from this rank's partition of it."""
        return self.layout.world_size > 1 or bool(self.layout.offloads("param"))

    def resident(self) -> None:
        item, layout = self.layout.item, self.layout
        offloaded = layout.offloads("optimizer")
        self.ledger.alloc("weights", item * self.partition, on_host=bool(layout.offloads("param")))
        if self._copies:
            self.ledger.alloc("gathered weights", item * self._live_elements)
        if offloaded != "nvme":
            self.ledger.alloc("optimizer", 12 * self.partition, on_host=bool(offloaded))
        self.ledger.alloc("gradients in fp32", 4 * self.partition, on_host=bool(offloaded))
        if offloaded == "cpu":  # the accumulated gradients, and those that the optimizer reads
            self.ledger.alloc("gradients in fp32", 4 * self.partition, on_host=True)
        self.ledger.alloc("communication", item * self.bucket_elements)

    @cached_property
    def _trace(self) -> list[list[Tensor]]:
        """The parameters of each module, in the order in which a micro-batch uses them."""
        layout = self.layout
        last, block = len(layout.modules) - 1, len(BLOCK)
        blocks = [2 + i * block for i in range(layout.model.n_layer)]
        order = [0, 1, *blocks, last - 1, last, last, last - 1]
        for i, first in reversed(list(enumerate(blocks))):
            order += [first] * (2 if layout.recomputes(i) else 1)
        return [self._together(number)[0] for number in (*order, 1, 0)]

    def _together(self, number: int) -> tuple[list[Tensor], int, int]:
        """Return the parameters gathered together with those of a module, and the first and last of their modules."""
        blocks = range(2, 2 + self.layout.model.n_layer * len(BLOCK))
        if number not in blocks:
            return self.layout.modules[number], number, number
        first = number - (number - 2) % len(BLOCK)
        last = first + len(BLOCK) - 1
        return [tensor for module in self.layout.modules[first : last + 1] for tensor in module], first, last

    @cached_property
    def _uses(self) -> dict[str, list[int]]:
        """Positions in the trace at which each parameter is used."""
        uses: dict[str, list[int]] = {}
        for place, tensors in enumerate(self._trace):
            for tensor in tensors:
                uses.setdefault(tensor.name, []).append(place)
        return uses

    @cached_property
    def _passed(self) -> list[int]:
        """Total elements of the trace before each of its positions."""
        return list(
            itertools.accumulate((sum(each.elements for each in tensors) for tensors in self._trace), initial=0)
        )

    def use(self, number: int, forward: bool, leave: bool = True) -> None:
        tensors, first, last = self._together(number)
        if number == (first if forward else last):
            self._enter(tensors)
        if leave:
            self.leave(number, forward)

    def _enter(self, tensors: list[Tensor]) -> None:
        self._gather([tensor for tensor in tensors if tensor.name not in self._live])
        for tensor in tensors:
            self._wait(tensor)
        self._place += 1
        self._gather(self._next())

    def _next(self) -> list[Tensor]:
        """Return the parameters to prefetch. The queue is scanned once: parameters already gathered when they are
        reached stay gathered until their use."""
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
        """Start gathering parameters into one buffer."""
        if not tensors:
            return
        gathered = _Gathered(tensors)
        self._live.update(tensor.name for tensor in tensors)
        self._live_elements += gathered.elements
        if self._copies:
            self.ledger.alloc("gathered weights", self.layout.item * gathered.elements)
            self._on_the_way.update(dict.fromkeys((tensor.name for tensor in tensors), gathered))

    def _wait(self, tensor: Tensor) -> None:
        """Wait for a gathered parameter.

        Parameters gathered together are copied out of their buffer when the first of them is needed, and the buffer is
        freed after the last has been. A parameter gathered alone is not copied.
        """
        gathered = self._on_the_way.pop(tensor.name, None)
        if gathered is None or len(gathered.tensors) == 1:
            return
        count = self.layout.item * gathered.elements
        if not gathered.copied:
            self.ledger.alloc("gathered weights", count)
            gathered.copied = True
        if all(self._on_the_way.get(each.name) is not gathered for each in gathered.tensors):
            self.ledger.free("gathered weights", count)

    def leave(self, number: int, forward: bool) -> None:
        tensors, first, last = self._together(number)
        if number != (last if forward else first):
            return
        if not forward:
            for tensor in sorted(self._of_block, key=lambda tensor: not tensor.matrix):
                self.put(tensor, "gradients", self.layout.item)
            self._of_block = []
        for tensor in tensors:
            if tensor.name in self._persistent or tensor.name not in self._live:
                continue
            if self._stays.get(tensor.name, -1) >= self._place:
                continue
            uses = self._uses[tensor.name]
            later = bisect.bisect_left(uses, self._place)
            # Keep it if it is used again within the reuse distance.
            if later < len(uses) and self._passed[uses[later]] - self._passed[self._place] < self._reuse_distance:
                continue
            self._drop(tensor)

    def _drop(self, tensor: Tensor) -> None:
        self._live.remove(tensor.name)
        self._live_elements -= tensor.elements
        if self._copies:
            self.ledger.free("gathered weights", self.layout.item * tensor.elements)

    def gradient(self, tensor: Tensor) -> None:
        if tensor.name.startswith("h."):
            self._of_block.append(tensor)
        else:
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
        if not self.layout.offloads("optimizer"):  # concatenated, one group at a time
            groups = (math.ceil(elements / self.layout.world_size) for elements in self.layout.groups)
            self.ledger.pass_through("gradients in fp32", 4 * min(max(groups), int(self._sub_group)))

    @property
    def _sub_group(self) -> float:
        return float(self.layout.zero.get("sub_group_size", 1e9))


def zero_of(layout: Layout, ledger: Ledger) -> Zero:
    """Return the memory model of a layout's ZeRO stage, with its resident state allocated in `ledger`.

    Raises:
        ConfigError: for offload below stage 3.
    """
    if layout.stage < 3 and (layout.offloads("optimizer") or layout.offloads("param")):
        raise ConfigError(f"offload can be estimated at ZeRO-3 only, but zero_optimization.stage is {layout.stage}.")
    if layout.stage == 1:
        return (_Stage1InBf16 if layout.precision == "bf16" else _Stage1)(layout, ledger)
    return {0: Zero, 2: _Stage2, 3: _Stage3}[layout.stage](layout, ledger)
