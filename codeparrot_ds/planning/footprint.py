"""Estimate the device memory of a rank in a training step, without training.

The estimate replays a step in the order in which DeepSpeed, PyTorch's autograd and this package's loss allocate and
free memory. It records the peak and its breakdown into parts. No safety factor is applied.
`tests/integration/test_plan.py` verifies the peaks against real steps on CPU ranks, and `benchmarks/gpu.py` against
`torch.cuda.max_memory_allocated`.

Sources: transformers' `modeling_gpt2.py`, this package's `training/model.py`, and the sources of `zero_memory.py`.
"""

from dataclasses import dataclass

from codeparrot_ds.planning.layout import BLOCK, Layout, Ledger
from codeparrot_ds.planning.zero3_memory import zero_of
from codeparrot_ds.planning.zero_memory import Zero


@dataclass
class Footprint:
    """Memory of a rank, in bytes.

    Attributes:
        between_steps: by part, between optimizer steps, from the first step on.
        at_peak: by part, at the peak.
        peak_at: phase of the step in which the peak occurs.
        phases: peak of each phase of a step.
        on_host: by part, offloaded to host memory or NVMe.
    """

    between_steps: dict[str, int]
    at_peak: dict[str, int]
    peak_at: str
    phases: dict[str, int]
    on_host: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """Bytes held at the peak."""
        return sum(self.at_peak.values())


def footprint(layout: Layout) -> Footprint:
    """Replay an optimizer step: the second of a run, when all optimizer state is allocated."""
    ledger = Ledger()
    ledger.begin("between steps")
    zero = zero_of(layout, ledger)
    between_steps = {part: count for part, count in ledger.held.items() if count}
    step = _Step(layout, ledger, zero)
    # The last micro-batch needs at least as much memory as any between the first and itself.
    count = min(2, layout.accumulation)
    for number in range(count):
        step.micro_batch(number, first=number == 0, last=number == count - 1)
    ledger.begin("optimizer")
    zero.step()
    assert {part: count for part, count in ledger.held.items() if count} == between_steps  # everything else is freed
    at_peak = {part: count for part, count in ledger.at_peak.items() if count}
    return Footprint(between_steps, at_peak, ledger.peak_at, ledger.phases, ledger.on_host)


class _Step:
    """Forward and backward passes of micro-batches: activations, logits and gradients."""

    def __init__(self, layout: Layout, ledger: Ledger, zero: Zero) -> None:
        self._layout, self._ledger, self._zero = layout, ledger, zero
        model = layout.model
        self._unit = layout.tokens * model.n_embd * layout.item  # bytes of a [tokens, n_embd] tensor
        self._logsumexp = 4 * layout.micro_batch_size * model.n_head * model.seq_len  # kept by attention
        self._moments = 2 * layout.tokens * (layout.item if layout.on_cpu else 4)  # mean and rstd of a LayerNorm
        self._positions = model.seq_len * model.n_embd * layout.item
        # Compiled blocks apply the scale of their layer to the queries, which makes a separate tensor.
        self._queries = self._unit if layout.compiled and model.scale_attn_by_inverse_layer_idx else 0

    def micro_batch(self, number: int, first: bool, last: bool) -> None:
        """Replay the forward and backward pass of a micro-batch."""
        self._ledger.begin(f"forward of micro-batch {number + 1}")
        self._forward()
        self._ledger.begin(f"backward of micro-batch {number + 1}")
        self._zero.begin_backward(first, last)
        self._backward()
        self._zero.end_backward()

    def _forward(self) -> None:
        ledger, unit, modules = self._ledger, self._unit, self._layout.modules
        for number, count in enumerate((unit, self._positions)):
            self._zero.use(number, forward=True)
            ledger.alloc("activations", count)
        ledger.alloc("activations", unit)  # their sum, kept by the first block
        for block in range(self._layout.model.n_layer):
            if self._layout.recomputes(block):
                self._forward_without_keeping(block)
            else:
                self._forward_block(block)
        self._zero.use(len(modules) - 2, forward=True)
        ledger.alloc("activations", unit + self._moments)
        ledger.free("activations", unit + self._positions)  # the embeddings, which transformers holds until here
        self._zero.use(len(modules) - 1, forward=True)
        self._logits()
        ledger.free("activations", unit)  # output of the final LayerNorm

    def _forward_block(self, block: int, again: bool = False) -> None:
        """Replay the forward pass of a block that keeps its activations.

        In units of [tokens, n_embd]: norm 1, attention 3 + 1, sum 1, norm 1, MLP 4 + 4, sum 1, and two outputs that are
        freed once they are added to the residual stream: 18, of which 16 are kept. A recomputed forward (`again`) ends
        at the last projection.
        """
        ledger, unit = self._ledger, self._unit
        first = 2 + block * len(BLOCK)
        attention = 3 * unit + self._queries + unit + self._logsumexp
        counts = (unit + self._moments, attention, 2 * unit, unit + self._moments, 8 * unit)
        for module, count in enumerate(counts):
            self._zero.use(first + module, forward=True)
            ledger.alloc("activations", count)
        self._zero.use(first + 5, forward=True, leave=not again)
        if again:
            ledger.free("activations", unit)
            return
        ledger.alloc("activations", 2 * unit)
        ledger.free("activations", 2 * unit)

    def _forward_without_keeping(self, block: int) -> None:
        ledger, unit = self._ledger, self._unit
        first = 2 + block * len(BLOCK)
        takes = (1, 4, 2, 1, 8, 2)
        gives = (0, 0, 5, 0, 4, 8)  # norm and attention outputs; input of the MLP's activation function; the rest
        for module, (taken, given) in enumerate(zip(takes, gives, strict=True)):
            self._zero.use(first + module, forward=True)
            ledger.alloc("activations", taken * unit)
            ledger.free("activations", given * unit)

    def _logits(self) -> None:
        """`training.model.LossHead`, chunk by chunk."""
        layout, ledger = self._layout, self._ledger
        width, vocabulary, item = layout.model.n_embd, layout.model.vocab_size, layout.item
        head = width * vocabulary
        ledger.alloc("activations", self._unit)  # the gradient of the final LayerNorm's output
        left, first = layout.tokens, True
        while left > 0:
            count = min(layout.loss_chunk_tokens, left) * vocabulary
            if layout.on_cpu:
                cast = 4 * count if item == 2 else 0
                ledger.alloc("logits", item * count + cast + 4 * count)
                ledger.free("logits", item * count + cast)
                kept, rounded = 4 * count, item * count if item == 2 else 0
                ledger.alloc("logits", rounded)
            else:  # `training.kernels`: the logits, then also their gradient
                ledger.alloc("logits", 2 * item * count)
                kept, rounded = 0, item * count
                ledger.free("logits", rounded)
            product = item * head if item == 2 else 0
            if product:
                ledger.pass_through("logits", product + (4 * head if first else 0))
            if first:
                ledger.alloc("gradient of the head", 4 * head)
            ledger.free("logits", rounded + kept)
            left, first = left - layout.loss_chunk_tokens, False

    def _backward(self) -> None:
        layout, ledger, unit, zero = self._layout, self._ledger, self._unit, self._zero
        last = len(layout.modules) - 1
        head = layout.modules[0][0].elements
        zero.use(last, forward=False)
        ledger.alloc("activations", unit)
        ledger.alloc("gradient of the head", 4 * head)
        if layout.item == 2:
            ledger.alloc("gradient of the head", 2 * head)
            ledger.free("gradient of the head", 4 * head)
        ledger.free("activations", unit)
        ledger.free("gradient of the head", 4 * head)
        zero.use(last - 1, forward=False)
        ledger.alloc("activations", unit)
        ledger.free("activations", 2 * unit + self._moments)
        self._gradients(last - 1)
        for block in reversed(range(layout.model.n_layer)):
            if self._layout.recomputes(block):
                self._forward_block(block, again=True)
            self._backward_block(block)
        # The gradient of wpe is summed over sequences; that of wte is added to the head's, which is tied to it.
        zero.use(1, forward=False)
        ledger.pass_through("activations", self._positions)
        self._gradients(1)
        zero.use(0, forward=False)
        if layout.on_cpu and layout.precision == "bf16":  # summed in fp32
            ledger.pass_through("gradient of the head", 4 * layout.tokens * layout.model.n_embd + 4 * head)
            ledger.pass_through("gradient of the head", 4 * head + layout.item * head)
        ledger.alloc("gradient of the head", layout.item * head)
        ledger.free("gradient of the head", 2 * layout.item * head)
        self._gradients(0)
        ledger.free("activations", unit)

    def _backward_block(self, block: int) -> None:
        """Replay the backward pass of a block: per module, allocate the gradients of input and weights, then free the
        kept activations. The gradient of the residual stream, one unit, is held throughout."""
        first = 2 + block * len(BLOCK)
        self._backward_module(first + 5, taken=4, kept=4)
        self._ledger.pass_through("activations", 4 * self._unit)  # gradient of the activation function
        self._ledger.free("activations", 4 * self._unit)
        self._backward_module(first + 4, taken=1, kept=1, consumed=4)
        self._backward_module(first + 3, taken=1, kept=1, consumed=2, moments=True)
        self._backward_module(first + 2, taken=1, kept=0)
        layout, unit = self._layout, self._unit
        if not layout.on_cpu:  # flash attention accumulates the queries' gradient in fp32
            self._ledger.pass_through("activations", 3 * unit + 4 * layout.tokens * layout.model.n_embd)
        self._ledger.alloc("activations", 3 * unit)
        self._ledger.free("activations", 2 * unit + 3 * unit + self._queries + self._logsumexp)
        self._ledger.pass_through("activations", 3 * unit)  # gradients of query, key and value, concatenated
        self._backward_module(first + 1, taken=1, kept=1, consumed=3)
        self._backward_module(first, taken=1, kept=1, consumed=2, moments=True)

    def _backward_module(self, number: int, taken: int, kept: int, consumed: int = 0, moments: bool = False) -> None:
        self._zero.use(number, forward=False, leave=False)
        self._ledger.alloc("activations", taken * self._unit)
        self._gradients(number)
        self._ledger.free("activations", (kept + consumed) * self._unit + (self._moments if moments else 0))
        self._zero.leave(number, forward=False)

    def _gradients(self, number: int) -> None:
        tensors = self._layout.modules[number]
        for tensor in tensors:
            self._ledger.alloc("gradients", self._layout.item * tensor.elements)
        for tensor in tensors:
            self._zero.gradient(tensor)
