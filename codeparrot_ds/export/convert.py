"""Convert ZeRO checkpoints to a Hugging Face directory that is verified before it is published."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.checkpoint.attention_scale import fold
from codeparrot_ds.checkpoint.zero import FP32, OPTIMIZER_STATE, SavedState, open_state
from codeparrot_ds.errors import CheckpointError, ConfigError, DataError, list_problems
from codeparrot_ds.export.certificate import (
    CERTIFICATE,
    DTYPES,
    FOLDED,
    KEPT,
    NO_SCALE,
    check_tensors,
    read_certificate,
    versions,
)
from codeparrot_ds.export.forward import (
    Comparison,
    activation_bytes_per_token,
    agree,
    compare_models,
    largest_weight_bytes,
    load_config,
)
from codeparrot_ds.export.model_card import write_model_card
from codeparrot_ds.export.plain_gpt2 import Reader
from codeparrot_ds.export.statements import CONFIG, find_contradictions
from codeparrot_ds.export.tokenizer import write_tokenizer
from codeparrot_ds.export.write import BLOCK_ELEMENTS, Weights, write_weights
from codeparrot_ds.export.written import WrittenWeights
from codeparrot_ds.run.directory import Checkpoint
from codeparrot_ds.run.gpt2 import GPT2
from codeparrot_ds.run.recipe import Recipe, load_recipe
from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.shards.validation import validation_sequences
from codeparrot_ds.system import memory
from codeparrot_ds.system.files import (
    FORMAT_VERSION,
    digest_file,
    make_directory,
    publish_directory,
    read_json,
    require_free_space,
    write_json,
)
from codeparrot_ds.system.jobs import progress, say
from codeparrot_ds.system.libraries import require_transformers
from codeparrot_ds.tokenizer.encode import Encoder

DEFAULT_MEMORY_CAP_BYTES = 1_500_000_000
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Nats per token, for the engine's precision and for weights written in a coarser type.
_LOSS_TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 2e-2}
_SAME_WEIGHTS_TOLERANCE = 1e-5  # without rounding; on a CPU the results are bit-identical
_CPU_OPERATIONS = 2e13  # FLOPs that take a few minutes


def convert(
    checkpoints: Sequence[Checkpoint],
    output: Path,
    *,
    dtype: str = "float32",
    keep_attention_scale: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    memory_cap_bytes: int = DEFAULT_MEMORY_CAP_BYTES,
    sequences: int | None = None,
) -> dict[str, Any]:
    """Convert a published checkpoint, or the mean of several of one run, and return the certificate.

    Args:
        checkpoints: checkpoints of one run; files that hold weights are verified first.
        output: must not exist; it is written atomically. A directory made from the same checkpoints is kept.
        dtype: "float32", "bfloat16" or "float16".
        keep_attention_scale: write `scale_attn_by_inverse_layer_idx` as a setting, instead of folding the scale into
            the weights. Most runtimes, and transformers before 5.4, ignore the setting.
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
    require_transformers()
    newest = checkpoints[-1]
    run = newest.run
    recipe = _as_evaluated(load_recipe(run.recipe), newest)
    scale = (KEPT if keep_attention_scale else FOLDED) if recipe.model.scale_attn_by_inverse_layer_idx else NO_SCALE
    source = [{"step": checkpoint.step, "files": checkpoint.files} for checkpoint in checkpoints]
    if (output / CERTIFICATE).is_file():
        done = read_certificate(output)
        if (done["source"], done["dtype"], done.get("attention_scale")) == (source, dtype, scale):
            return done
    weights = _open(checkpoints)
    parameters = sum(shape.numel() for shape in weights.shapes.values())
    output = output.resolve()  # may be a link to another disk
    make_directory(output.parent)
    require_free_space(output.parent, parameters * DTYPES[dtype].itemsize, "the converted model")
    written = weights if scale != FOLDED else _Folded(weights, recipe.model.n_embd)
    with publish_directory(output) as unfinished:
        write_tokenizer(run.tokenizer, unfinished, recipe.model.seq_len)
        model = _write_configs(unfinished, recipe, Encoder(unfinished).eos_id, dtype, scale)
        _check_parameters(unfinished, set(weights.shapes))
        _require_memory(model, memory_cap_bytes)
        tensors, files = write_weights(unfinished, written, DTYPES[dtype], max_shard_bytes, _shown("converting"))
        certificate: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "kind": "certificate",
            "versions": versions(),
            "source": source,
            "dtype": dtype,
            "attention_scale": scale,
            "parameters": parameters,
            "tied": dict(weights.tied),
            "tensors": {name: proof.as_json() for name, proof in tensors.items()},
        }
        problems = check_tensors(unfinished, certificate) or find_contradictions(unfinished)
        if problems:
            raise CheckpointError(f"{newest.path}: verification failed: {problems[0]}. Nothing was written.")
        memory.manage_freed_memory(scarce=True)  # until here, freed blocks are better kept for reuse
        same_weights = all(proof.master == proof.written for proof in tensors.values())
        same_model = same_weights and model == GPT2.of_recipe(recipe.model)
        compared, total = _compare(
            None if same_model else weights, unfinished, model, recipe, memory_cap_bytes, sequences
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

    def drop_from_cache(self) -> None:
        """Drop from the page cache what has been read."""
        for part in self._parts:
            part.drop_from_cache()


class _Folded:
    """Weights with the attention scale divided into the queries, in fp32."""

    def __init__(self, weights: Weights, n_embd: int) -> None:
        self._weights, self._n_embd = weights, n_embd
        self.shapes, self.tied = weights.shapes, weights.tied

    def read(self, name: str, what: str = FP32, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read elements of a folded weight."""
        assert what == FP32
        return fold(name, self._weights.read(name, what, start, stop), self._n_embd, start)

    def drop_from_cache(self) -> None:
        """Drop from the page cache what has been read."""
        self._weights.drop_from_cache()


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


def _write_configs(directory: Path, recipe: Recipe, eos_id: int, dtype: str, scale: str) -> GPT2:
    """Write config.json and generation_config.json. Returns the model that config.json describes, as read back."""
    from transformers import GenerationConfig, GPT2Config

    settings = recipe.model.hugging_face_config(eos_id)
    settings["scale_attn_by_inverse_layer_idx"] = scale == KEPT
    GPT2Config(**settings, architectures=["GPT2LMHeadModel"], dtype=DTYPES[dtype]).save_pretrained(directory)
    GenerationConfig(bos_token_id=eos_id, eos_token_id=eos_id, pad_token_id=eos_id).save_pretrained(directory)
    return GPT2.of_config(read_json(directory / CONFIG, "model configuration"), str(directory / CONFIG))


def _check_parameters(directory: Path, held: set[str]) -> None:
    """Check that the checkpoint's parameter names are exactly those of the configured model."""
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):
        network = GPT2LMHeadModel(load_config(directory))
    expected = {name for name, _ in network.named_parameters()}
    if expected != held:
        missing, extra = sorted(expected - held), sorted(held - expected)
        raise CheckpointError(
            f"the checkpoint is not this recipe's model: missing {missing[:3]}, unexpected {extra[:3]}."
        )


def _require_memory(model: GPT2, memory_cap_bytes: int) -> None:
    """Raise ConfigError if verifying a single sequence would exceed the memory limit."""
    needed = memory.resident_bytes() + _proof_bytes(model)
    if needed > memory_cap_bytes:
        raise ConfigError(
            f"--memory-cap {memory_cap_bytes / 1e9:.2f}GB: this model needs {needed / 1e9:.2f} GB, of which "
            f"{memory.resident_bytes() / 1e9:.2f} GB are Python and torch. Raise the limit."
        )


def _proof_bytes(model: GPT2) -> int:
    """Return the bytes needed to verify one sequence or to hold the blocks of weights being written."""
    activations = model.n_positions * activation_bytes_per_token(model)
    return max(activations + largest_weight_bytes(model), 4 * 4 * BLOCK_ELEMENTS)


def _compare(
    weights: Weights | None,
    directory: Path,
    model: GPT2,
    recipe: Recipe,
    memory_cap_bytes: int,
    wanted: int | None,
) -> tuple[Comparison | None, int]:
    """Run the models on validation sequences. Returns their comparison and the size of the engine's evaluation.

    The comparison is None without shards. Without `weights`, only the converted model is run: it is the same.
    """
    try:
        valid = Dataset.open(recipe.data.sources, recipe.model.seq_len).require_valid()
    except DataError as error:
        say(f"note: no validation sequences to evaluate ({error}).")
        return None, 0
    numbers = validation_sequences(len(valid), recipe.evaluation.sequences_afterwards)
    total = len(numbers)
    count = min(total, wanted) if wanted is not None else total
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted is None and device.type == "cpu":
        models = 2 if weights is None else 3  # the converted one is run twice: by plain code and by transformers
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
    chosen = numbers[validation_sequences(total, count)]
    free = memory_cap_bytes - memory.resident_bytes() - largest_weight_bytes(model)
    found = compare_models(
        None if weights is None else (GPT2.of_recipe(recipe.model), _reader(weights)),
        (model, WrittenWeights(directory).read),
        load_config(directory),
        valid.batch(chosen),
        free,
        device,
    )
    return found, total


def _reader(weights: Weights) -> Reader:
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
    written = forward["loss_written"]
    problems = []
    comparisons = [
        (
            "the checkpoint's weights give",
            forward["loss_master"],
            _SAME_WEIGHTS_TOLERANCE if precision == "fp32" else _LOSS_TOLERANCE[precision],
        ),
        ("transformers computes", forward["loss_transformers"], _SAME_WEIGHTS_TOLERANCE),
    ]
    if engine["not_compared"] is None:
        tolerance = max(_LOSS_TOLERANCE[checkpoint.precision], _LOSS_TOLERANCE[precision])
        comparisons.append(("the engine measured", engine["loss_valid"], tolerance))
    for what, expected, tolerance in comparisons:
        if not abs(written - expected) <= tolerance:  # negated, so that NaN fails
            problems.append(
                f"the converted model's validation loss is {written:.6f}, but {what} {expected:.6f} (tolerance "
                f"{tolerance})"
            )
    differences = {"transformers'": forward["largest_transformers_difference"]}
    if precision == "fp32":
        differences["the checkpoint's"] = forward["largest_logit_difference"]
    for whose, difference in differences.items():
        if not agree(difference, forward["largest_logit"]):
            problems.append(f"the converted model's logits differ from {whose} by up to {difference:.2g}")
    if problems:
        raise CheckpointError(list_problems(str(checkpoint.path), problems, "Nothing was written."))
