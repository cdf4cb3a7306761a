"""The sections of a recipe: every key, its default and its validation."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.run.shipped import find_ds_config
from codeparrot_ds.system.typed_yaml import Section, UserPath

Positive = Annotated[int, Field(gt=0)]


class Model(Section):
    """Shape of the GPT-2 model. The defaults are those of GPT-2 small.

    Attributes:
        vocab_size: number of token ids; must equal the tokenizer's vocabulary size.
        seq_len: sequence length (tokens).
        n_layer: number of transformer blocks.
        n_head: attention heads per block; must divide `n_embd`.
        n_embd: hidden size (width of a token's vector).
        dropout: probability, of residuals, embeddings and attention. 0 by default: a single pass over the data needs
            little regularisation, and without dropout a step has no randomness.
        scale_attn_by_inverse_layer_idx: divide the attention scores of layer i (from 0) by i + 1.
        init_std: standard deviation of the random weights of matrices and embeddings, where they are not loaded.
            GPT-2's 0.02 suits widths from 768 on; a width of 128 learns faster with 0.05.
        activation_checkpointing: what is recomputed in the backward pass. none: nothing. full: every block, of which
            only the input is kept. selective: every second block.
        init_from: Hugging Face GPT-2 directory of the same shape whose weights to start from; null for random weights.
    """

    vocab_size: Positive
    seq_len: Positive = 1024
    n_layer: Positive = 12
    n_head: Positive = 12
    n_embd: Positive = 768
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    scale_attn_by_inverse_layer_idx: bool = True
    init_std: float = Field(0.02, gt=0, le=1)
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    init_from: UserPath | None = None

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Model":
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        return self

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones counted once: embeddings, and 12 n_embd² + 13 n_embd per block."""
        width = self.n_embd
        return (self.vocab_size + self.seq_len) * width + self.n_layer * (12 * width**2 + 13 * width) + 2 * width

    @property
    def flops_per_token(self) -> float:
        """FLOPs per token of forward and backward, without recomputation.

        6 per parameter in a matrix multiplication, plus attention. Source: PaLM (Chowdhery et al., 2022), appendix B.
        """
        positions = self.seq_len * self.n_embd  # only looked up; the token embedding is also the output head
        return 6.0 * (self.parameters - positions) + 12.0 * self.n_layer * self.n_embd * self.seq_len

    def hugging_face_config(self, eos_id: int) -> dict[str, Any]:
        """Arguments of `transformers.GPT2Config`, shared by training and the converted model."""
        return {
            "vocab_size": self.vocab_size,
            "n_positions": self.seq_len,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "resid_pdrop": self.dropout,
            "embd_pdrop": self.dropout,
            "attn_pdrop": self.dropout,
            "initializer_range": self.init_std,
            "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
            "bos_token_id": eos_id,
            "eos_token_id": eos_id,
        }


class Data(Section):
    """Training and validation data.

    Attributes:
        shards: a shard directory, or several directories with their weights: `{DIRECTORY: 0.7, OTHER: 0.3}`.
    """

    shards: UserPath | dict[UserPath, Annotated[float, Field(gt=0)]]

    @property
    def sources(self) -> dict[Path, float]:
        """The shard directories and their weights."""
        return self.shards if isinstance(self.shards, dict) else {self.shards: 1.0}

    @field_validator("shards")
    @classmethod
    def _some(cls, shards: Path | dict[Path, float]) -> Path | dict[Path, float]:
        if not shards:
            raise ValueError("must name at least one directory")
        return shards


class Batch(Section):
    """Batch sizes (sequences). Gradient accumulation steps follow from them and the world size.

    Attributes:
        global_batch_size: sequences per optimizer step, over all ranks.
        micro_batch_size: sequences per rank and forward pass; auto: a rank's whole share of the global batch.
    """

    global_batch_size: Positive
    micro_batch_size: Positive | Literal["auto"] = "auto"

    def micro_batch_and_accumulation(self, world_size: int) -> tuple[int, int]:
        """(micro_batch_size, gradient_accumulation_steps) on `world_size` ranks. Raises ConfigError."""
        if self.global_batch_size % world_size:
            raise ConfigError(
                f"batch.global_batch_size: {self.global_batch_size} sequences cannot be divided evenly among "
                f"{world_size} ranks. Use a multiple of {world_size}, or another number of ranks."
            )
        share = self.global_batch_size // world_size
        micro = share if self.micro_batch_size == "auto" else self.micro_batch_size
        if share % micro:
            raise ConfigError(
                f"batch.micro_batch_size: {share} sequences per rank (global batch {self.global_batch_size} / "
                f"{world_size} ranks) is not a multiple of {micro}. Use a divisor of {share}."
            )
        return micro, share // micro


class Optimizer(Section):
    """AdamW.

    Attributes:
        name: the optimizer; only adamw.
        learning_rate: at the peak of the schedule.
        betas: decay rates of the first and second moment.
        eps: added to the denominator of the update.
        weight_decay: applied to matrices and embeddings only.
        gradient_clipping: maximum L2 norm of all gradients together; larger ones are scaled down to it.
    """

    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    gradient_clipping: float = Field(1.0, gt=0)


class Schedule(Section):
    """Learning rate schedule: linear warm-up to the peak, then decay to `min_ratio` of the peak as `name` selects.

    Each length is given either in optimizer steps or in tokens; tokens are converted to steps, rounded up.

    Attributes:
        name: cosine: half a cosine period. linear: linear decay. constant: no decay. wsd (warm-up, stable, decay):
            constant at the peak, then linear decay over the last `decay_steps`.
        steps, tokens: length of the run, in optimizer steps or in tokens; one of them is required.
        warmup_steps, warmup_tokens: length of the warm-up, in optimizer steps or in tokens; 0 by default.
        decay_steps, decay_tokens: length of the decay, in optimizer steps or in tokens; required for wsd, not allowed
            otherwise.
        min_ratio: learning rate at the end of the decay, as a fraction of the peak.
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
                raise ValueError(f"set {name} or {name.replace('steps', 'tokens')}, not both")
        if self.steps is None and self.tokens is None:
            raise ValueError("set steps or tokens")
        decay = self.decay_steps is not None or self.decay_tokens is not None
        if decay != (self.name == "wsd"):
            raise ValueError("decay_steps (or decay_tokens) is required with name: wsd, and not allowed otherwise")
        if self.tokens is None and self.warmup_tokens is None and self.decay_tokens is None:
            self._check_lengths()
        return self

    def in_steps(self, tokens_per_step: int) -> "Schedule":
        """This schedule with every length in steps. Raises ValueError when warm-up and decay exceed the run."""

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
        """Optimizer steps of the run. Requires a schedule in steps, which every loaded recipe has."""
        assert self.steps is not None
        return self.steps

    @property
    def warmup(self) -> int:
        """Optimizer steps of the warm-up."""
        return self.warmup_steps or 0

    def ratio(self, step: int) -> float:
        """Learning rate at optimizer step `step` (from 0), as a fraction of the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "constant":
            return 1.0
        first = self.warmup if self.decay_steps is None else self.last_step - self.decay_steps
        done = min(1.0, max(0.0, (step - first) / max(1, self.last_step - first)))
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.name == "cosine" else 1 - done
        return self.min_ratio + (1 - self.min_ratio) * left


class Engine(Section):
    """Execution engine.

    Attributes:
        deepspeed: path of the DeepSpeed JSON, or the name of one in `ds_configs/`, e.g. zero3.
        precision: type of the weights and activations in forward and backward.
        float32_matmul_precision: precision of matrix products in training where `precision` is fp32; as in
            torch.set_float32_matmul_precision. highest: fp32. high: TF32 on GPUs. medium: TF32 on GPUs, and bfloat16 on
            CPUs that have instructions for it. Evaluation always uses fp32.
        nvme: directory on a fast local disk of every host; required if the DeepSpeed JSON offloads to NVMe.
        loss_chunk_tokens: compute the logits and the loss for this many tokens at a time, to limit memory.
        compile: apply torch.compile to the model's blocks.
        allow_untested: dotted keys of the DeepSpeed JSON to accept although they are not tested with this package.
    """

    deepspeed: Annotated[UserPath, AfterValidator(find_ds_config)]
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    nvme: UserPath | None = None
    loss_chunk_tokens: Positive = 4096
    compile: bool = False
    allow_untested: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _matmul_precision_is_of_fp32(self) -> Self:
        if self.float32_matmul_precision != "highest" and self.precision != "fp32":
            raise ValueError(
                f"float32_matmul_precision {self.float32_matmul_precision} has no effect with precision "
                f"{self.precision}: remove it, or set precision: fp32"
            )
        return self


class Evaluation(Section):
    """Validation loss over a fixed set of sequences, at the start, every `every_steps` steps, and at the end.

    Attributes:
        every_steps: optimizer steps between evaluations.
        sequences: number of validation sequences, the same ones at every evaluation; 0 for no evaluation.
        samples: number of texts to generate for log and report at each evaluation, at temperature 0; 0 for none.
        sample_tokens: length of each generated text (tokens).
        humaneval: samples per problem of HumanEval, at temperature 0.2, to score each export with; 0 for none. Uses one
            core of rank 0's host and its sandbox.
    """

    every_steps: Positive = 1000
    sequences: int = Field(512, ge=0)
    samples: int = Field(0, ge=0)
    sample_tokens: Positive = 64
    humaneval: int = Field(0, ge=0)

    @property
    def sequences_afterwards(self) -> int:
        """`sequences`, or its default if training does not evaluate: for checks of the finished model."""
        return self.sequences or 512

    @model_validator(mode="after")
    def _samples_need_sequences(self) -> Self:
        if self.samples and not self.sequences:
            raise ValueError("samples continue validation sequences: set sequences above 0, or samples to 0")
        return self


class Checkpoints(Section):
    """When to save checkpoints, and which to keep.

    Attributes:
        every_steps: optimizer steps between checkpoints.
        every_minutes: also save when the last checkpoint is this many minutes old; null to disable.
        keep_last: number of newest checkpoints to keep.
        keep_every_steps: keep checkpoints at multiples of this many steps permanently; null for none.
        background: copy the state to host memory and write it while training continues. Training waits for the disk if
            host memory has no room for the copy, or if the optimizer state is on NVMe.
        shared_disk: true if all hosts share the run directory; false if each host keeps its ranks' files on its own
            disk.
    """

    every_steps: Positive = 1000
    every_minutes: float | None = Field(None, gt=0)
    keep_last: Positive = 3
    keep_every_steps: Positive | None = None
    background: bool = True
    shared_disk: bool = True


class Export(Section):
    """Conversion of checkpoints to Hugging Face format during training.

    Attributes:
        every_steps: export checkpoints at multiples of this many steps; null for none.
        dtype: type of the exported weights.
        sequences: validation sequences to verify each export on, using one core of rank 0's host; null for the
            default of `codeparrot-ds convert`.
        keep_last: number of newest exports to keep.
        hub: OWNER/NAME of a Hub repository to push each export to, on a branch named after the run; null for none.
        private: whether a repository that the run creates is private.
    """

    every_steps: Positive | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    sequences: int | None = Field(1, ge=0)
    keep_last: Positive = 2
    hub: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")
    private: bool = True


class Guards(Section):
    """Detection of hangs, loss spikes and diverging replicas.

    Attributes:
        hang_seconds: terminate the job if a step takes longer (seconds), and write every rank's stacks to its log;
            null for never. Start-up (which compiles and allocates), saves and evaluations may take three times as long.
        max_skipped_steps: number of consecutive steps that may be skipped for non-finite gradients; one more stops the
            run.
        spike: action on a loss spike. ignore: none. warn: log the samples of the step. stop: warn, and stop without
            saving. go_back: resume from the newest checkpoint before the spike, and skip the samples of its steps.
        spike_threshold: a spike is a loss this far (nats) above the median of the last 64 losses.
        replica_check_steps: steps between comparisons of state that must be equal on all ranks (weights below ZeRO-3);
            null for never.
    """

    hang_seconds: float | None = Field(1800.0, gt=0)
    max_skipped_steps: Positive = 20
    spike: Literal["ignore", "warn", "stop", "go_back"] = "warn"
    spike_threshold: float = Field(2.0, gt=0)
    replica_check_steps: Positive | None = 100


class Logging(Section):
    """Logging. Metrics are always written to metrics.jsonl.

    Attributes:
        every_steps: optimizer steps between log lines.
        tensorboard: also write TensorBoard event files.
        wandb: also log to Weights & Biases.
        peak_tflops: peak TFLOP/s of one device at the recipe's precision, for MFU; null to use the known value of
            common GPUs.
    """

    every_steps: Positive = 10
    tensorboard: bool = True
    wandb: bool = False
    peak_tflops: float | None = Field(None, gt=0)
