"""The sections of a recipe: every key, its default and its check."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from codeparrot_ds.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """Unknown keys are refused, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """GPT-2's shape. The defaults are GPT-2 small's.

    dropout is 0 by default: in one pass over the data there is little to regularise, and nothing random is left
    in a step.
    """

    vocab_size: Positive
    seq_len: Positive = 1024  # tokens
    n_layer: Positive = 12
    n_head: Positive = 12
    n_embd: Positive = 768
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    scale_attn_by_inverse_layer_idx: bool = True
    # none; full: only the input of each block is kept; selective: every second block in full.
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    init_from: Path | None = None  # a Hugging Face GPT-2 directory of this shape, to start from its weights

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Model":
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        return self

    @property
    def parameters(self) -> int:
        """Of the whole model, tied ones once: embeddings, and a block's 12 n_embd² weights and 13 n_embd others."""
        width = self.n_embd
        return (self.vocab_size + self.seq_len) * width + self.n_layer * (12 * width**2 + 13 * width) + 2 * width

    @property
    def flops_per_token(self) -> float:
        """FLOPs of forward and backward for a token, recomputation not counted: 6 for each parameter that multiplies,
        and attention. Source: PaLM (Chowdhery et al., 2022), appendix B."""
        positions = self.seq_len * self.n_embd  # are looked up, and multiply nothing; the token embedding is the head
        return 6.0 * (self.parameters - positions) + 12.0 * self.n_layer * self.n_embd * self.seq_len

    def hugging_face_config(self, eos_id: int) -> dict[str, Any]:
        """Arguments of `transformers.GPT2Config`, the same for training and for the converted model."""
        return {
            "vocab_size": self.vocab_size,
            "n_positions": self.seq_len,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "resid_pdrop": self.dropout,
            "embd_pdrop": self.dropout,
            "attn_pdrop": self.dropout,
            "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
            "bos_token_id": eos_id,
            "eos_token_id": eos_id,
        }


class Data(Section):
    """Where the tokens come from: a shard directory, or several with their weights, `{DIRECTORY: 0.7, OTHER: 0.3}`."""

    shards: Path | dict[Path, Annotated[float, Field(gt=0)]]

    @property
    def sources(self) -> dict[Path, float]:
        """The shard directories and their weights."""
        return self.shards if isinstance(self.shards, dict) else {self.shards: 1.0}

    @field_validator("shards")
    @classmethod
    def _some(cls, shards: Path | dict[Path, float]) -> Path | dict[Path, float]:
        if not shards:
            raise ValueError("names no directory")
        return shards


class Batch(Section):
    """Sequences per optimizer step and per forward; accumulation follows from them and the world size.

    `micro_batch_size: auto` takes a rank's whole share of the global batch in one forward.
    """

    global_batch_size: Positive
    micro_batch_size: Positive | Literal["auto"] = "auto"

    def micro_batch_and_accumulation(self, world_size: int) -> tuple[int, int]:
        """(micro_batch_size, gradient_accumulation_steps) on `world_size` ranks. Raises ConfigError."""
        if self.global_batch_size % world_size:
            raise ConfigError(
                f"batch.global_batch_size: {self.global_batch_size} sequences cannot be dealt evenly to {world_size} "
                f"ranks. Use a multiple of {world_size}, or another number of ranks."
            )
        share = self.global_batch_size // world_size
        micro = share if self.micro_batch_size == "auto" else self.micro_batch_size
        if share % micro:
            raise ConfigError(
                f"batch.micro_batch_size: a rank's share of {share} sequences (global batch "
                f"{self.global_batch_size} / {world_size} ranks) is not a multiple of {micro}. "
                f"Use a divisor of {share}."
            )
        return micro, share // micro


class Optimizer(Section):
    """AdamW; weight decay reaches matrices and embeddings only."""

    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    gradient_clipping: float = Field(1.0, gt=0)


class Schedule(Section):
    """Learning rate over optimizer steps: linear warm-up, then by `name` down to `min_ratio` of the peak.

    cosine: half a cosine. linear: a line. constant: stays at the peak. wsd (warm-up, stable, decay): at the peak,
    then a line over the last `decay_steps`. Each length may be given in tokens instead; steps are rounded up.
    """

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    steps: Positive | None = None
    tokens: Positive | None = None
    warmup_steps: int | None = Field(None, ge=0)
    warmup_tokens: int | None = Field(None, ge=0)
    decay_steps: Positive | None = None
    decay_tokens: Positive | None = None
    min_ratio: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _each_length_once(self) -> "Schedule":
        for name in ("steps", "warmup_steps", "decay_steps"):
            if getattr(self, name) is not None and getattr(self, name.replace("steps", "tokens")) is not None:
                raise ValueError(f"give {name} or {name.replace('steps', 'tokens')}, not both")
        if self.steps is None and self.tokens is None:
            raise ValueError("give steps, or tokens")
        decay = self.decay_steps is not None or self.decay_tokens is not None
        if decay != (self.name == "wsd"):
            raise ValueError("decay_steps (or decay_tokens) belongs to name: wsd, and only there")
        if self.tokens is None and self.warmup_tokens is None and self.decay_tokens is None:
            self._check_lengths()
        return self

    def in_steps(self, tokens_per_step: int) -> "Schedule":
        """This schedule with every length in steps. Raises ValueError when they do not fit into one another."""

        def steps(name: str, default: int | None) -> int | None:
            tokens = getattr(self, name.replace("steps", "tokens"))
            given = getattr(self, name) if tokens is None else -(-tokens // tokens_per_step)
            return default if given is None else given

        resolved = self.model_copy(
            update={
                "steps": steps("steps", None),
                "warmup_steps": steps("warmup_steps", 0),
                "decay_steps": steps("decay_steps", None),
                "tokens": None,
                "warmup_tokens": None,
                "decay_tokens": None,
            }
        )
        resolved._check_lengths()
        return resolved

    def _check_lengths(self) -> None:
        if self.warmup >= self.last_step:
            raise ValueError(f"warmup_steps {self.warmup} must be below steps {self.last_step}")
        if self.decay_steps is not None and self.warmup + self.decay_steps > self.last_step:
            raise ValueError(
                f"warmup_steps {self.warmup} and decay_steps {self.decay_steps} exceed steps {self.last_step}"
            )

    @property
    def last_step(self) -> int:
        """Optimizer steps of the run. For a schedule in steps, as every loaded recipe's is."""
        assert self.steps is not None
        return self.steps

    @property
    def warmup(self) -> int:
        """Optimizer steps of the warm-up."""
        return self.warmup_steps or 0

    def ratio(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0, as a share of the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "constant":
            return 1.0
        first = self.warmup if self.decay_steps is None else self.last_step - self.decay_steps
        done = min(1.0, max(0.0, (step - first) / max(1, self.last_step - first)))
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.name == "cosine" else 1 - done
        return self.min_ratio + (1 - self.min_ratio) * left


class Engine(Section):
    """How it runs: a DeepSpeed JSON, and the precision of forward and backward.

    Attributes:
        nvme: a directory on a fast local disk of every host, for a DeepSpeed JSON that offloads to NVMe.
        loss_chunk_tokens: logits are made for so many tokens at a time, never for all.
        compile: torch.compile for the model's blocks.
    """

    deepspeed: Path
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    nvme: Path | None = None
    loss_chunk_tokens: Positive = 4096
    compile: bool = False


class Evaluation(Section):
    """Validation loss over the same fixed sequences, every so many steps, at the start and at the end.

    Attributes:
        samples: texts that the model writes for the log at each evaluation, at temperature 0; 0 for none.
        sample_tokens: length of each.
    """

    every_steps: Positive = 1000
    sequences: Positive = 512
    samples: int = Field(0, ge=0)
    sample_tokens: Positive = 64


class Checkpoints(Section):
    """How often to save, and what to keep.

    Attributes:
        every_steps: between checkpoints.
        every_minutes: save as well when the last checkpoint is so old; null for never.
        keep_last: of the newest.
        keep_every_steps: those of a multiple of so many steps are kept for good; null for none.
        background: copy what is to be saved to host memory and write it while training goes on. Without room for the
            copy, and with the optimizer on NVMe, training waits for the disk.
        shared_disk: all hosts see one run directory. If false, each host keeps what its ranks write on its own disk.
    """

    every_steps: Positive = 1000
    every_minutes: float | None = Field(None, gt=0)
    keep_last: Positive = 3
    keep_every_steps: Positive | None = None
    background: bool = True
    shared_disk: bool = True


class Export(Section):
    """Converting checkpoints while training goes on.

    Attributes:
        every_steps: checkpoints of a multiple of so many steps are exported; null for none.
        dtype: of the weights.
        sequences: validation sequences that an export is proved on, on one core of rank 0's host.
        keep_last: of the exported directories.
        hub: OWNER/NAME of a repository to push each to, on a branch named after the run; null for none.
        private: whether it is for its owner alone, if it is made by the run.
    """

    every_steps: Positive | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    sequences: int | None = Field(1, ge=0)
    keep_last: Positive = 2
    hub: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")
    private: bool = True


class Guards(Section):
    """What happens when a run goes wrong.

    Attributes:
        hang_seconds: a step (or a save, or an evaluation) that takes longer ends the job, with every rank's stack in
            its log; null for never. The first of a process may take three times as long: it compiles and allocates.
        max_skipped_steps: in a row, for gradients that are not finite; one more stops the run.
        spike: what to do about a loss spike. warn: name the step's samples. stop: that, and stop without saving.
            go_back: to the newest checkpoint from before it, and leave out the samples of its steps.
        spike_threshold: a spike is a loss so much (nats) above the median of the last 64.
        replica_check_steps: between comparisons of what must be equal on all ranks (weights below ZeRO-3).
    """

    hang_seconds: float | None = Field(1800.0, gt=0)
    max_skipped_steps: Positive = 20
    spike: Literal["ignore", "warn", "stop", "go_back"] = "warn"
    spike_threshold: float = Field(2.0, gt=0)
    replica_check_steps: Positive | None = 100


class Logging(Section):
    """Steps between lines of the log, and where metrics go beside metrics.jsonl.

    Attributes:
        peak_tflops: of one device at the recipe's precision, for MFU; known for common GPUs.
    """

    every_steps: Positive = 10
    tensorboard: bool = True
    wandb: bool = False
    peak_tflops: float | None = Field(None, gt=0)
