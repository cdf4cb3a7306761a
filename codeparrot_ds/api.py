"""The functions for scripts: `from codeparrot_ds import open_shards`. docs/api.md shows all of them in one script.

A path is a `str` or a `Path`; `~` is expanded. Whatever a user can fix is raised as a `codeparrot_ds.errors.UserError`,
whose message says what is wrong, where, and how to fix it. Notes and progress bars go to standard error. torch,
DeepSpeed and transformers are imported by the functions that need them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codeparrot_ds.errors import ConfigError, list_problems
from codeparrot_ds.run import recipe as recipes
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.shards import inspect
from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.system.paths import expand_user

if TYPE_CHECKING:
    from torch import nn

    from codeparrot_ds.evaluation.complete import Completion
    from codeparrot_ds.evaluation.loss import ValidationLoss
    from codeparrot_ds.evaluation.pretrained import Pretrained

# Of one shard directory, or of several with their weights.
Shards = str | Path | Mapping[str, float] | Mapping[Path, float]
_MEMORY_BYTES = 1_500_000_000  # that `convert` may use on top of what the process holds already


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe. Its relative paths are relative to the working directory.

        recipe = load_recipe("codeparrot-small", ["schedule.steps=1000"])
        recipe.model.parameters, recipe.batch.global_batch_size

    Args:
        recipe: YAML file, or the name of a recipe that comes with the package.
        overrides: "section.key=value" each, as for `--set`; they take precedence over the file.

    Raises:
        ConfigError: lists every unknown key and every invalid value.
    """
    return recipes.load_recipe(expand_user(Path(recipe)), overrides)


def open_shards(shards: Shards, seq_len: int) -> Dataset:
    """Memory-map shards as sequences of `seq_len` tokens, after checking the size of every file.

        data = open_shards("data/shards", seq_len=1024)
        ids = data.train.batch(np.arange(8))  # [8, 1025] int64: 1,024 inputs, and the same shifted by one as targets

    Sequences are numbered from 0 in the order of the shards; `data.order(seed).at(positions)` gives the numbers in the
    order of training. `data.valid` holds the validation split, and may be empty.

    Args:
        shards: a shard directory, or several with their weights, as in a recipe (`recipe.data.sources`).
        seq_len: sequence length (tokens).

    Raises:
        ConfigError: `seq_len` is not above 0, or no directory is named.
        DataError: a directory is damaged, has fewer tokens than one sequence, or another tokenizer than the first.
    """
    sources = _sources(shards)
    if seq_len < 1 or not sources:
        raise ConfigError(f"open_shards: seq_len {seq_len}, {len(sources)} directories; each must be at least 1.")
    return Dataset.open(sources, seq_len)


def sequences_of_step(
    recipe: Recipe, step: int, *, rank: int | None = None, world_size: int = 1, data: Dataset | None = None
) -> np.ndarray:
    """The numbers of the training sequences that a step reads, [sequences] int64, in the order of the micro-batches.

        numbers = sequences_of_step(recipe, 10, rank=1, world_size=16)

    They are those of the run: ranges of the data that it skipped after a loss spike are left out.

    Args:
        recipe: of the run.
        step: optimizer step, from 0.
        rank: only the share of this rank, global_batch_size / world_size sequences; None for all of the step.
        world_size: number of ranks.
        data: the recipe's shards, if they are open; otherwise they are opened.

    Raises:
        ConfigError: there is no such step or rank, or `world_size` does not divide the global batch.
        DataError: damaged shards.
    """
    return np.asarray(inspect.sequences_of_step(recipe, step, rank, world_size, data), np.int64)


def build_model(recipe: Recipe, eos_id: int) -> "nn.Module":
    """Build the recipe's GPT-2 on the CPU, in fp32 and with the weights of step 0.

        network = build_model(recipe, data.eos_id)
        ids = torch.from_numpy(data.train.batch(numbers))
        loss = network(ids[:, :-1], targets=ids[:, 1:])  # mean, nats per token
        logits = network(ids[:, :-1]).logits             # [sequences, seq_len, vocab_size]

    It is a `transformers.GPT2LMHeadModel` that also computes its loss. The weights are drawn from `recipe.seed`, or
    loaded from `model.init_from`; with the recipe's activation checkpointing.

    Args:
        recipe: its `model` section gives the shape.
        eos_id: id of the end-of-text token: `Dataset.eos_id`.

    Raises:
        ConfigError: transformers is too old.
        CheckpointError, DataError: `model.init_from` is not a GPT-2 directory of this shape.
    """
    from codeparrot_ds.training import model

    return model.build_model(recipe.model, eos_id, recipe.seed)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    tag: int | None = None,
    average: int = 1,
    dtype: str = "float32",
    keep_attention_scale: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    memory_cap_bytes: int | None = None,
    sequences: int | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint to a Hugging Face directory, and verify the result against the checkpoint.

        certificate = convert("runs/codeparrot", "runs/codeparrot/hf", dtype="bfloat16")
        certificate["forward"]["loss_written"]  # validation loss of the written model, nats per token

    Args:
        source: a run, whose newest checkpoint is converted, or a checkpoint.
        output: directory to create. It appears only if the verification succeeds; one that was converted from the same
            checkpoint is kept.
        tag: step of the checkpoint, instead of the newest.
        average: number of last checkpoints whose weights are averaged.
        dtype: of the weights: "float32", "bfloat16" or "float16".
        keep_attention_scale: write `scale_attn_by_inverse_layer_idx` as a setting, which most runtimes ignore, instead
            of folding the scale into the weights.
        max_shard_bytes: maximum size of a safetensors file.
        memory_cap_bytes: memory limit of this process, everything included. Default: 1.5 GB more than it uses now.
        sequences: validation sequences to verify on. Default: those of the run's own evaluation, or without a GPU at
            most as many as take a few minutes.

    Returns:
        The certificate, which is also in the directory; docs/formats.md lists its keys.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or the verification failed.
        ConfigError: a wrong `dtype`, `output` exists, or too little memory or disk space.
    """
    from codeparrot_ds.checkpoint.source import source_checkpoints
    from codeparrot_ds.export import convert as conversion
    from codeparrot_ds.system.memory import resident_bytes

    return conversion.convert(
        source_checkpoints(expand_user(Path(source)), tag, average),
        expand_user(Path(output)),
        dtype=dtype,
        keep_attention_scale=keep_attention_scale,
        max_shard_bytes=max_shard_bytes,
        memory_cap_bytes=resident_bytes() + _MEMORY_BYTES if memory_cap_bytes is None else memory_cap_bytes,
        sequences=sequences,
    )


def load_model(model: str | Path, *, fp32: bool = True) -> "Pretrained":
    """Load a causal language model with its tokenizer, onto the GPU if there is one. No code of the model is run.

        model = load_model("runs/codeparrot")
        model.encoder.encode("import numpy")  # ids, [tokens]
        model.model                           # the transformers.PreTrainedModel, in evaluation mode

    Args:
        model: a run (its newest converted model), a Hugging Face directory, or OWNER/NAME[@REVISION] on the Hub.
        fp32: compute in fp32; otherwise a GPU uses the type of the weights.

    Raises:
        DataError: there is no such model, it cannot be loaded, or its tokenizer loses text.
    """
    from codeparrot_ds.evaluation.pretrained import load_pretrained

    return load_pretrained(expand_user(Path(model)) if str(model).startswith("~") else model, fp32=fp32)


def complete(
    model: "Pretrained",
    prompt: str,
    *,
    num: int = 4,
    temperature: float = 0.4,
    top_p: float = 0.95,
    max_new_tokens: int = 64,
    seed: int = 1,
) -> "list[Completion]":
    """Complete a prompt. A completion ends where a new top-level block of Python starts.

        for completion in complete(load_model("runs/codeparrot"), "def area(width, height):", num=2):
            print(completion.text, completion.ended)

    Of a prompt that does not fit into the model's context together with the completion, the end is used.

    Args:
        model: from `load_model`.
        prompt: text; if empty, the end token stands for it.
        num: number of completions.
        temperature: divides the logits; 0 takes the most likely tokens, which gives a single completion.
        top_p: sample from the most likely tokens that together have this probability.
        max_new_tokens: maximum length of a completion (tokens).
        seed: of the random numbers. The same arguments give the same completions.

    Returns:
        Completions without the prompt: `text`, `ids`, and why it `ended`.

    Raises:
        ConfigError: an argument is out of range.
    """
    limits = {
        f"num {num}: must be at least 1": num >= 1,
        f"temperature {temperature}: must be at least 0": temperature >= 0,
        f"top_p {top_p}: must be above 0 and at most 1": 0 < top_p <= 1,
        f"max_new_tokens {max_new_tokens}: must be at least 1": max_new_tokens >= 1,
        f"seed {seed}: must be at least 0": seed >= 0,
    }
    if problems := [problem for problem, holds in limits.items() if not holds]:
        raise ConfigError(list_problems("complete", problems))
    from codeparrot_ds.evaluation import complete as completion

    sampling = completion.Sampling(num, temperature, top_p, max_new_tokens, seed)
    return completion.complete(model, completion.encode_prompt(model, prompt, max_new_tokens), sampling)


def validation_loss(
    model: "Pretrained",
    shards: Shards,
    *,
    sequences: int = 512,
    seq_len: int | None = None,
) -> "ValidationLoss":
    """Compute a model's loss on the validation split, in total and by licence, repository and length of the documents.

        found = validation_loss(load_model("runs/codeparrot"), "data/shards")
        found.loss_valid, found.bits_per_byte  # nats per token; bits per byte of UTF-8, whatever the tokenizer

    Args:
        model: from `load_model`, with the tokenizer of the shards.
        shards: see `open_shards`.
        sequences: maximum number of sequences, evenly spaced.
        seq_len: length of a sequence (tokens). Default: the model's context.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the shards are damaged, have no validation split, or another tokenizer than the model.
    """
    if sequences < 1 or (seq_len is not None and seq_len < 1):
        raise ConfigError(f"validation_loss: sequences {sequences}, seq_len {seq_len}; each must be at least 1.")
    from codeparrot_ds.evaluation.document_loss import measure
    from codeparrot_ds.evaluation.loss import ValidationLoss

    return ValidationLoss.of(measure(model, _sources(shards), sequences, seq_len))


def _sources(shards: Shards) -> dict[Path, float]:
    weights = shards if isinstance(shards, Mapping) else {shards: 1.0}
    return {Path(path): weight for path, weight in weights.items()}
