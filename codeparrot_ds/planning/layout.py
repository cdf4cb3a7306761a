"""What decides the memory of a rank, and the ledger in which it is counted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.run.sections import Model

# Of a block, in order: module, and rows and columns of its weight in widths of the model; 0 rows make it a vector.
BLOCK = (
    ("ln_1", 0, 1),
    ("attn.c_attn", 1, 3),
    ("attn.c_proj", 1, 1),
    ("ln_2", 0, 1),
    ("mlp.c_fc", 1, 4),
    ("mlp.c_proj", 4, 1),
)


@dataclass(frozen=True)
class Tensor:
    """A parameter: its elements, and whether it has two dimensions."""

    name: str
    elements: int
    matrix: bool


@dataclass(frozen=True)
class Layout:
    """All that decides what a rank holds.

    Attributes:
        model: its shape, and which of its activations are computed again.
        zero: DeepSpeed's `zero_optimization` section, resolved.
        precision: of forward and backward: bf16, fp16 or fp32.
        world_size: ranks.
        micro_batch_size: sequences of a forward.
        accumulation: micro-batches a step.
        loss_chunk_tokens: tokens whose logits are there at once.
        on_cpu: ranks compute on CPU cores, where gloo and some kernels copy what NCCL and CUDA's do not.
        compiled: blocks are compiled by torch.compile.
    """

    model: Model
    zero: Mapping[str, Any]
    precision: str
    world_size: int
    micro_batch_size: int
    accumulation: int
    loss_chunk_tokens: int = 4096
    on_cpu: bool = False
    compiled: bool = False

    @classmethod
    def of(cls, recipe: Recipe, ds_config: Mapping[str, Any], on_cpu: bool = False) -> "Layout":
        """That of a recipe with its resolved DeepSpeed configuration."""
        micro, accumulation = (
            int(ds_config[key]) for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        )
        return cls(
            recipe.model,
            ds_config["zero_optimization"],
            recipe.engine.precision,
            recipe.batch.global_batch_size // (micro * accumulation),
            micro,
            accumulation,
            recipe.engine.loss_chunk_tokens,
            on_cpu,
            recipe.engine.compile,
        )

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return int(self.zero["stage"])

    @property
    def item(self) -> int:
        """Bytes of a number in forward and backward."""
        return 4 if self.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch_size * self.model.seq_len

    def offloads(self, what: str) -> str:
        """Where "optimizer" or "param" lies, if not on the device: "cpu", "nvme", or nothing."""
        device = str((self.zero.get(f"offload_{what}") or {}).get("device", "none"))
        return "" if device == "none" else device

    def recomputes(self, block: int) -> bool:
        """Whether the backward pass makes this block's activations again."""
        mode = self.model.activation_checkpointing
        return mode == "full" or (mode == "selective" and block % 2 == 0)

    @property
    def modules(self) -> list[list[Tensor]]:
        """The parameters of each module, in the order of the forward pass; the last is the head, tied to the first."""
        return _modules(self.model.vocab_size, self.model.seq_len, self.model.n_layer, self.model.n_embd)

    @cached_property
    def parameters(self) -> list[Tensor]:
        """Each once."""
        return [tensor for module in self.modules[:-1] for tensor in module]

    @cached_property
    def groups(self) -> list[int]:
        """Elements of the optimizer's two groups: with weight decay, and without."""
        matrices = sum(tensor.elements for tensor in self.parameters if tensor.matrix)
        return [matrices, sum(tensor.elements for tensor in self.parameters) - matrices]


@lru_cache(maxsize=16)
def _modules(vocab_size: int, seq_len: int, n_layer: int, width: int) -> list[list[Tensor]]:
    found = []
    tokens = Tensor("wte", vocab_size * width, True)
    for i in range(n_layer):
        for name, rows, columns in BLOCK:
            elements = columns * width * (rows * width if rows else 1)
            weight = Tensor(f"h.{i}.{name}.weight", elements, rows > 0)
            found.append([weight, Tensor(f"h.{i}.{name}.bias", columns * width, False)])
    final = [Tensor("ln_f.weight", width, False), Tensor("ln_f.bias", width, False)]
    return [[tokens], [Tensor("wpe", seq_len * width, True)], *found, final, [tokens]]


@dataclass
class Ledger:
    """What is held, in bytes, part by part; remembers the most.

    Attributes:
        held: now, on the device.
        at_peak, peak_at: when the most was held, and in which phase.
        phases: the most in each.
        on_host: what lies in the host's memory instead, or on its NVMe.
    """

    held: dict[str, int] = field(default_factory=dict)
    total: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    peak: int = -1
    peak_at: str = ""
    phase: str = ""
    phases: dict[str, int] = field(default_factory=dict)
    on_host: dict[str, int] = field(default_factory=dict)

    def begin(self, phase: str) -> None:
        """What follows is part of `phase`."""
        self.phase = phase
        self.phases[phase] = self.total

    def alloc(self, part: str, count: float, on_host: bool = False) -> None:
        """Count so many bytes more as `part` on the device, or for good on its host."""
        if on_host:
            self.on_host[part] = self.on_host.get(part, 0) + int(count)
            return
        self.held[part] = self.held.get(part, 0) + int(count)
        self.total += int(count)
        if self.total > self.phases[self.phase]:
            self.phases[self.phase] = self.total
            if self.total > self.peak:
                self.peak, self.peak_at, self.at_peak = self.total, self.phase, dict(self.held)

    def free(self, part: str, count: float) -> None:
        """Count so many bytes less."""
        self.alloc(part, -int(count))

    def pass_through(self, part: str, count: float) -> None:
        """Allocated and freed at once."""
        self.alloc(part, count)
        self.free(part, count)
