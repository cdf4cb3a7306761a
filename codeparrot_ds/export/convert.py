"""Convert ZeRO checkpoints to a Hugging Face directory that is verified before it is published."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.checkpoint.zero import FP32, OPTIMIZER_STATE, SavedState, open_state
from codeparrot_ds.errors import CheckpointError, ConfigError, DataError
from codeparrot_ds.export.certificate import (
    CERTIFICATE,
    DTYPES,
    WrittenWeights,
    check_tensors,
    read_certificate,
    versions,
)
from codeparrot_ds.export.forward import Comparison, activation_bytes_per_token, compare, largest_weight_bytes
from codeparrot_ds.export.write import BLOCK_ELEMENTS, Weights, write_weights
from codeparrot_ds.run.directory import Checkpoint, RunDirectory
from codeparrot_ds.run.recipe import Recipe, load_recipe
from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.shards.validation import validation_sequences
from codeparrot_ds.system import memory
from codeparrot_ds.system.files import (
    FORMAT_VERSION,
    digest_file,
    make_directory,
    publish_directory,
    require_free_space,
    write_json,
)
from codeparrot_ds.system.jobs import progress, say
from codeparrot_ds.tokenizer.encode import Encoder, copy_tokenizer

DEFAULT_MEMORY_CAP_BYTES = 1_500_000_000
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Nats per token, for the engine's precision and for weights written in a coarser type.
_LOSS_TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 2e-2}
_SAME_WEIGHTS_TOLERANCE = 1e-5  # without rounding; on a CPU the results are bit-equal
_CPU_OPERATIONS = 2e13  # FLOPs that take a few minutes


def convert(
    checkpoints: Sequence[Checkpoint],
    output: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    memory_cap_bytes: int = DEFAULT_MEMORY_CAP_BYTES,
    sequences: int | None = None,
) -> dict[str, Any]:
    """Convert a published checkpoint, or the mean of several of one run, and return the certificate.

    Args:
        checkpoints: checkpoints of one run; files that hold weights are verified first.
        output: must not exist; it is written atomically. A directory made from the same checkpoints is kept.
        dtype: "float32", "bfloat16" or "float16".
        max_shard_bytes: maximum size of a safetensors file.
        memory_cap_bytes: memory limit of this process, everything included.
        sequences: validation sequences to run both models on; by default those of the run's own evaluation, or
            without a GPU at most as many as take a few minutes.

    Raises:
        CheckpointError: a checkpoint is damaged or hostile, or the verification failed.
        ConfigError: invalid dtype, `output` exists, too little memory, or too little disk space.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: choose {', '.join(DTYPES)}.")
    source = [{"step": checkpoint.step, "files": checkpoint.files} for checkpoint in checkpoints]
    if (output / CERTIFICATE).is_file():
        done = read_certificate(output)
        if (done["source"], done["dtype"]) == (source, dtype):
            return done
    weights = _open(checkpoints)
    newest = checkpoints[-1]
    run = newest.run
    recipe = _as_evaluated(load_recipe(run.recipe), newest)
    parameters = sum(shape.numel() for shape in weights.shapes.values())
    make_directory(output.parent)
    require_free_space(output.parent, parameters * DTYPES[dtype].itemsize, "the converted model")
    with publish_directory(output) as unfinished:
        copy_tokenizer(run.tokenizer, unfinished)
        config = _write_configs(unfinished, recipe, Encoder(unfinished).eos_id, dtype)
        _check_parameters(config, set(weights.shapes))
        _require_memory(config, memory_cap_bytes)
        tensors, files = write_weights(unfinished, weights, DTYPES[dtype], max_shard_bytes, _shown("converting"))
        certificate: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "kind": "certificate",
            "versions": versions(),
            "source": source,
            "dtype": dtype,
            "parameters": parameters,
            "tied": dict(weights.tied),
            "tensors": {name: proof.as_json() for name, proof in tensors.items()},
        }
        problems = check_tensors(unfinished, certificate)
        if problems:
            raise CheckpointError(f"{newest.path}: verification failed, nothing was written: {problems[0]}.")
        memory.manage_freed_memory(scarce=True)  # until here, freed blocks are better kept for reuse
        same_weights = all(proof.master == proof.written for proof in tensors.values())
        compared, total = _compare(
            None if same_weights else weights, unfinished, config, recipe, memory_cap_bytes, sequences
        )
        certificate["forward"] = compared and asdict(compared)
        certificate["engine"] = _engine(checkpoints, compared, total)
        _check_losses(newest, certificate, dtype)
        write_model_card(unfinished, run, checkpoints, certificate)
        certificate["files"] = {
            file.name: files.get(file.name) or digest_file(file) for file in sorted(unfinished.iterdir())
        }
        certificate["peak_memory_bytes"] = memory.peak_resident_bytes()
        write_json(unfinished / CERTIFICATE, certificate)
    return certificate


def _as_evaluated(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe with the number of validation sequences that the checkpoint's loss was measured on."""
    sequences = (checkpoint.settings or {}).get("evaluation.sequences", recipe.evaluation.sequences)
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"sequences": sequences})})


class _Mean:
    """Mean of the weights of several checkpoints."""

    def __init__(self, parts: Sequence[SavedState]) -> None:
        self._parts = parts
        self.shapes, self.tied = parts[0].shapes, parts[0].tied

    def read(self, name: str, what: str = FP32, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read elements of the mean: summed in fp64 and rounded once."""
        total = torch.zeros((), dtype=torch.float64)
        for part in self._parts:
            total = total + part.read(name, what, start, stop)
        return (total / len(self._parts)).float()

    def leave_cache(self) -> None:
        """Drop from the page cache what has been read."""
        for part in self._parts:
            part.leave_cache()


def _open(checkpoints: Sequence[Checkpoint]) -> Weights:
    """Verify the files that hold weights, and open them. Raises CheckpointError."""
    opened = []
    for checkpoint in checkpoints:
        # AdamW's moments on NVMe and in universal checkpoints are separate files, which are not needed here.
        apart = {name for name in checkpoint.files if name.startswith(("offloaded_tensors/", "zero/"))}
        apart.discard(OPTIMIZER_STATE)
        checkpoint.verify(checkpoint.files.keys() - apart)
        weights = open_state(checkpoint)
        checkpoint.verify(weights.files(FP32) & apart)
        opened.append(weights)
    for weights, checkpoint in zip(opened, checkpoints, strict=True):
        if weights.shapes != opened[0].shapes:
            raise CheckpointError(f"{checkpoint.path}: its tensors differ from those in {checkpoints[0].path}.")
    return opened[0] if len(opened) == 1 else _Mean(opened)


def _shown(what: str) -> Callable[[Sequence[str]], Iterator[str]]:
    return lambda names: progress(names, what, len(names), "tensor")


def _write_configs(directory: Path, recipe: Recipe, eos_id: int, dtype: str) -> Any:
    from transformers import GenerationConfig, GPT2Config

    config = GPT2Config(
        **recipe.model.hugging_face_config(eos_id), architectures=["GPT2LMHeadModel"], dtype=DTYPES[dtype]
    )
    config.save_pretrained(directory)
    GenerationConfig(bos_token_id=eos_id, eos_token_id=eos_id, pad_token_id=eos_id).save_pretrained(directory)
    return config


def _check_parameters(config: Any, held: set[str]) -> None:
    """Check that the checkpoint's parameter names are exactly those of the configured model."""
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):
        network = GPT2LMHeadModel(config)
    expected = {name for name, _ in network.named_parameters()}
    if expected != held:
        missing, extra = sorted(expected - held), sorted(held - expected)
        raise CheckpointError(
            f"the checkpoint is not this recipe's model: missing {missing[:3]}, unexpected {extra[:3]}."
        )


def _require_memory(config: Any, memory_cap_bytes: int) -> None:
    """Raise ConfigError if verifying a single sequence would exceed the memory limit."""
    needed = memory.resident_bytes() + _proof_bytes(config)
    if needed > memory_cap_bytes:
        raise ConfigError(
            f"--memory-cap {memory_cap_bytes / 1e9:.2f}GB: this model needs {needed / 1e9:.2f} GB, of which "
            f"{memory.resident_bytes() / 1e9:.2f} GB are Python and torch. Raise the limit."
        )


def _proof_bytes(config: Any) -> int:
    """Return the bytes needed to verify one sequence or to hold the blocks of weights being written."""
    activations = int(config.n_positions) * activation_bytes_per_token(config)
    return max(activations + largest_weight_bytes(config), 4 * 4 * BLOCK_ELEMENTS)


def _compare(
    weights: Weights | None,
    directory: Path,
    config: Any,
    recipe: Recipe,
    memory_cap_bytes: int,
    wanted: int | None,
) -> tuple[Comparison | None, int]:
    """Run both models on validation sequences. Returns their comparison and the size of the engine's evaluation.

    The comparison is None without shards. Without `weights`, only the converted model is run: it has the same bits.
    """
    try:
        valid = Dataset.open(recipe.data.sources, recipe.model.seq_len).valid
    except DataError as error:
        say(f"note: no validation sequences to evaluate ({error}).")
        return None, 0
    total = len(validation_sequences(len(valid), recipe.evaluation.sequences))
    count = min(total, wanted) if wanted is not None else total
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted is None and device.type == "cpu":
        models = 1 if weights is None else 2
        operations = models * 2 * recipe.model.parameters * recipe.model.seq_len  # per sequence
        count = max(1, min(count, int(_CPU_OPERATIONS / operations)))
        if count < total:
            say(
                f"note: without a GPU, {count} of the {total} sequences of the run's evaluation are used; "
                f"--sequences {total} uses all."
            )
    if not count:
        return None, total
    # The sequences of the evaluation, or an evenly spaced subset of them.
    chosen = validation_sequences(len(valid), recipe.evaluation.sequences)[validation_sequences(total, count)]
    written = WrittenWeights(directory)
    free = memory_cap_bytes - memory.resident_bytes() - largest_weight_bytes(config)
    found = compare(
        config,
        None if weights is None else _reader(weights),
        lambda name, rows=None: written.tensor(name, rows).float(),
        valid.batch(chosen),
        free,
        device,
    )
    return found, total


def _reader(weights: Weights) -> Any:
    def read(name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        shape = weights.shapes[name]
        if rows is None:
            return weights.read(name).view(shape)
        width = shape[1]
        return weights.read(name, start=rows[0] * width, stop=rows[1] * width).view(-1, width)

    return read


def _engine(checkpoints: Sequence[Checkpoint], compared: Comparison | None, total: int) -> dict[str, Any]:
    """Return the loss that the engine measured in training, and the reason if it cannot be compared."""
    loss = checkpoints[-1].loss_valid
    why = None
    if len(checkpoints) > 1:
        loss, why = None, "the engine did not evaluate the mean of these checkpoints"
    elif loss is None:
        why = "training recorded no validation loss for this step"
    elif compared is None:
        why = "no validation sequences were evaluated"
    elif compared.sequences < total:
        why = f"it covers {total} sequences, but {compared.sequences} were evaluated here"
    return {"loss_valid": loss, "sequences": total, "not_compared": why}


def _check_losses(checkpoint: Checkpoint, certificate: dict[str, Any], dtype: str) -> None:
    """Raise CheckpointError unless the models agree with each other and with the engine."""
    forward, engine = certificate["forward"], certificate["engine"]
    if forward is None:
        return
    precision = _PRECISIONS[dtype]
    pairs = [
        (
            "the checkpoint's weights give",
            forward["loss_master"],
            _SAME_WEIGHTS_TOLERANCE if precision == "fp32" else _LOSS_TOLERANCE[precision],
        )
    ]
    if engine["not_compared"] is None:
        tolerance = max(_LOSS_TOLERANCE[checkpoint.precision], _LOSS_TOLERANCE[precision])
        pairs.append(("the engine's was", engine["loss_valid"], tolerance))
    for what, expected, tolerance in pairs:
        if not abs(forward["loss_written"] - expected) <= tolerance:  # negated, so that NaN fails
            raise CheckpointError(
                f"{checkpoint.path}: the converted model's validation loss is {forward['loss_written']:.6f}, but "
                f"{what} {expected:.6f} (tolerance {tolerance}). Nothing was written."
            )


def write_model_card(
    directory: Path, run: RunDirectory, checkpoints: Sequence[Checkpoint], certificate: dict[str, Any]
) -> None:
    """Write README.md, which the Hub shows."""
    newest, forward = checkpoints[-1], certificate["forward"]
    recipe = load_recipe(run.recipe)
    steps = ", ".join(f"{checkpoint.step:,}" for checkpoint in checkpoints)
    rows = [
        ("parameters", f"{certificate['parameters']:,}"),
        ("layers, heads, width", f"{recipe.model.n_layer}, {recipe.model.n_head}, {recipe.model.n_embd}"),
        ("vocabulary", f"{recipe.model.vocab_size:,} (byte-level BPE)"),
        ("context", f"{recipe.model.seq_len:,} tokens"),
        ("optimizer steps", steps if len(checkpoints) == 1 else f"the mean of the weights after {steps}"),
        ("tokens seen", f"{newest.samples_seen * recipe.model.seq_len:,}"),
        ("trained in", f"{newest.precision}, ZeRO stage {newest.zero_stage}, {newest.world_size} ranks"),
        ("weights here", certificate["dtype"]),
    ]
    if forward is not None:
        rows.append(
            ("validation loss", f"{forward['loss_written']:.4f} nats per token, {forward['sequences']} sequences")
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    (directory / "README.md").write_text(
        f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- code
- gpt2
- codeparrot-ds
---

# {recipe.name}

A GPT-2 model of source code, trained from scratch with codeparrot-ds.

| | |
|---|---|
{table}

```python
from transformers import pipeline

complete = pipeline("text-generation", "PATH_OR_REPOSITORY")
print(complete("def fibonacci(n):", max_new_tokens=64)[0]["generated_text"])
```

`{CERTIFICATE}` holds the digest of every tensor, that of the fp32 weights in the checkpoint it was converted from, and
the losses of both. `codeparrot-ds convert --check DIRECTORY` verifies these files against it.
"""
    )
