"""The parameters that determine the memory of a rank, and the ledger that accounts for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.run.sections import Model

# Modules of a block in order: name, then rows and columns of the weight in units of n_embd; 0 rows denote a vector.
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
    """A parameter: its name, number of elements, and whether it is a matrix."""

    name: str
    elements: int
    matrix: bool


@dataclass(frozen=True)
class Layout:
    """The settings that determine what a rank holds in memory.

    Attributes:
        model: its shape, and which activations are recomputed.
        zero: DeepSpeed's `zero_optimization` section, resolved.
        precision: of the forward and backward pass: bf16, fp16 or fp32.
        world_size: number of ranks.
        micro_batch_size: sequences per forward pass.
        accumulation: micro-batches per step.
        loss_chunk_tokens: tokens whose logits are in memory at the same time.
        on_cpu: ranks compute on CPU cores, where gloo and some kernels make copies that NCCL and CUDA kernels do not.
        compiled: blocks are compiled with torch.compile.
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
        """Return the layout of a recipe with its resolved DeepSpeed configuration."""
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
        """ZeRO stage."""
        return int(self.zero["stage"])

    @property
    def item(self) -> int:
        """Bytes per element in the forward and backward pass."""
        return 4 if self.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch on a rank."""
        return self.micro_batch_size * self.model.seq_len

    def offloads(self, what: str) -> str:
        """Return where "optimizer" or "param" is offloaded to: "cpu" or "nvme"; empty when it stays on the device."""
        device = str((self.zero.get(f"offload_{what}") or {}).get("device", "none"))
        return "" if device == "none" else device

    def recomputes(self, block: int) -> bool:
        """Whether the backward pass recomputes the activations of this block."""
        mode = self.model.activation_checkpointing
        return mode == "full" or (mode == "selective" and block % 2 == 0)

    @property
    def modules(self) -> list[list[Tensor]]:
        """The parameters of each module, in the order of the forward pass; the last is the head, tied to the first."""
        return _modules(self.model.vocab_size, self.model.seq_len, self.model.n_layer, self.model.n_embd)

    @cached_property
    def parameters(self) -> list[Tensor]:
        """All parameters, tied ones once."""
        return [tensor for module in self.modules[:-1] for tensor in module]

    @cached_property
    def groups(self) -> list[int]:
        """Elements of the optimizer's two parameter groups: with and without weight decay."""
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
    """Bytes held by each part, and their peak.

    Attributes:
        held: bytes per part currently on the device.
        total: sum of `held`.
        at_peak: `held` at the peak.
        peak: bytes held at the peak.
        peak_at: phase of the peak.
        phase: current phase.
        phases: peak of each phase.
        on_host: bytes per part in host memory or on NVMe.
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
        """Start `phase`."""
        self.phase = phase
        self.phases[phase] = self.total

    def alloc(self, part: str, count: float, on_host: bool = False) -> None:
        """Add `count` bytes to `part` on the device, or permanently on its host."""
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
        """Subtract `count` bytes from `part` on the device."""
        self.alloc(part, -int(count))

    def pass_through(self, part: str, count: float) -> None:
        """Allocate `count` bytes of `part` and free them immediately."""
        self.alloc(part, count)
        self.free(part, count)
