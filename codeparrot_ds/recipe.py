"""The run as one validated YAML file plus dotted overrides (`--set optimizer.learning_rate=1e-4`).

A recipe says what a run is; the DeepSpeed JSON that it names says how the engine runs. Unknown keys are refused,
and all problems are reported at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from codeparrot_ds.errors import ConfigError, list_problems

Positive = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Section):
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
    activation_checkpointing: Literal["none", "full"] = "none"

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Model":
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        return self

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


class Data(_Section):
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


class Batch(_Section):
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


class Optimizer(_Section):
    """AdamW; weight decay reaches matrices and embeddings only."""

    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    gradient_clipping: float = Field(1.0, gt=0)


class Schedule(_Section):
    """Learning rate over optimizer steps: linear warm-up, then half a cosine down to `min_ratio` of the peak."""

    name: Literal["cosine"] = "cosine"
    steps: Positive
    warmup_steps: int = Field(0, ge=0)
    min_ratio: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _warmup_is_shorter(self) -> "Schedule":
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self


class Engine(_Section):
    """How it runs: a DeepSpeed JSON, and the precision of forward and backward."""

    deepspeed: Path
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"


class Evaluation(_Section):
    """Validation loss over the same fixed sequences, every so many steps, at the start and at the end."""

    every_steps: Positive = 1000
    sequences: Positive = 512


class Checkpoints(_Section):
    """How often to save, and how many of the newest to keep."""

    every_steps: Positive = 1000
    keep_last: Positive = 3


class Logging(_Section):
    """Steps between lines of the log, and whether TensorBoard is written."""

    every_steps: Positive = 10
    tensorboard: bool = True


class Recipe(_Section):
    """All that a run is."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(1, ge=0)
    runs: Path = Path("runs")
    model: Model
    data: Data
    batch: Batch
    optimizer: Optimizer
    schedule: Schedule
    engine: Engine
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    logging: Logging = Logging()

    @property
    def run_directory(self) -> Path:
        """Where everything of this run goes."""
        return self.runs / self.name

    def identity(self, shards_digest: str) -> dict[str, Any]:
        """What must not change while a run goes on from its checkpoints, by the name a user knows it under."""
        return {
            "model": self.model.model_dump(mode="json", exclude={"activation_checkpointing"}),
            "seed": self.seed,
            "batch.global_batch_size": self.batch.global_batch_size,
            "digest of data.shards": shards_digest,
        }

    def to_yaml(self) -> str:
        """The recipe as YAML, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def resolved(self, ds_config: Path) -> "Recipe":
        """This recipe with absolute paths, naming the resolved DeepSpeed JSON `ds_config`: it holds from anywhere."""
        return self.model_copy(
            update={
                "runs": self.runs.resolve(),
                "data": Data(
                    shards={path.resolve(): weight for path, weight in self.data.shards.items()}
                    if isinstance(self.data.shards, dict)
                    else self.data.shards.resolve()
                ),
                "engine": self.engine.model_copy(update={"deepspeed": ds_config.resolve()}),
            }
        )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a YAML file.
        overrides: "dotted.key=value" each, the value in YAML; they win over the file.

    Raises:
        ConfigError: lists every unknown key and every wrong value.
    """
    try:
        body = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe. Those shipped are in launch/recipes/.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections (model, data, batch, …).")
    for override in overrides:
        _override(body, override)
    try:
        return Recipe.model_validate(body)
    except ValidationError as error:
        raise ConfigError(list_problems(str(path), _explain(error))) from None


def _override(body: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as section.key=value, e.g. schedule.steps=100.")
    *sections, last = key.split(".")
    target = body
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section.")
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: {value!r} is not a YAML value.") from None


def _explain(error: ValidationError) -> list[str]:
    """A sentence a key. A key that may be one of several types fails once for each: their reasons are joined."""
    reasons: dict[str, list[str]] = {}
    for detail in error.errors():
        # The branch of a union follows its key ("micro_batch_size", "constrained-int"): pydantic's word, not ours.
        loc = [part for part in detail["loc"] if part != "constrained-int" and not str(part).startswith("literal[")]
        key = ".".join(map(str, loc))
        if detail["type"] == "extra_forbidden":
            reason = "unknown key. Remove it, or correct its spelling."
        elif detail["type"] == "missing":
            reason = "missing."
        else:
            reason = detail["msg"].removeprefix("Value error, ")
            if not isinstance(detail["input"], dict):
                reason += f" (got {detail['input']!r})"
        reasons.setdefault(key, []).append(reason)
    return [f"{key}: {'; or '.join(found)}" if key else "; ".join(found) for key, found in reasons.items()]
