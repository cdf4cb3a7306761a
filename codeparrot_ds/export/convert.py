"""A ZeRO checkpoint to a Hugging Face directory that is proved before it appears."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.errors import CheckpointError, ConfigError
from codeparrot_ds.files import (
    digest_bytes,
    digest_file,
    make_directory,
    publish_directory,
    read_json,
    require_free_space,
    write_json,
)
from codeparrot_ds.recipe import Recipe, load_recipe
from codeparrot_ds.run_directory import Checkpoint, RunDirectory
from codeparrot_ds.tokenizer.encode import Encoder, copy_tokenizer
from codeparrot_ds.zero import ZeroCheckpoint

CERTIFICATE = "certificate.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_LOSS_TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 2e-2}  # nats per token, for the coarser of engine and result


def convert(
    checkpoint: Checkpoint,
    output: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    measure_loss: Callable[[Path, Recipe], float | None],
) -> dict[str, Any]:
    """Convert a published checkpoint and return its certificate.

    Args:
        checkpoint: of a run; its files are verified first.
        output: must not exist; it is whole or absent. A directory made from the same checkpoint is kept.
        dtype: "float32", "bfloat16" or "float16".
        max_shard_bytes: size at which a new safetensors file is begun; one such file is held in memory.
        measure_loss: validation loss of a Hugging Face directory over the recipe's validation sequences, or None
            when the shards are out of reach; compared with the loss that the engine measured.

    Raises:
        CheckpointError: the checkpoint is damaged or hostile, or the proof failed.
        ConfigError: bad dtype, `output` exists, or the disk is too small.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r}: choose {', '.join(_DTYPES)}.")
    source = {"step": checkpoint.step, "files": checkpoint.files}
    if (output / CERTIFICATE).is_file():
        done: dict[str, Any] = read_json(output / CERTIFICATE, "certificate")
        if done.get("source") == source and done.get("dtype") == dtype:
            return done
    checkpoint.verify()
    run = RunDirectory(checkpoint.path.parent.parent)
    recipe = load_recipe(run.recipe)
    weights = ZeroCheckpoint(checkpoint)
    parameters = sum(shape.numel() for shape in weights.shapes.values())
    make_directory(output.parent)
    require_free_space(output.parent, parameters * _DTYPES[dtype].itemsize, "the converted model")
    with publish_directory(output) as unfinished:
        copy_tokenizer(run.tokenizer, unfinished)
        _write_configs(unfinished, recipe, Encoder(unfinished).eos_id, dtype)
        tensors = _write_weights(unfinished, weights, dtype, max_shard_bytes)
        _check_parameters(unfinished, tensors)
        loss = measure_loss(unfinished, recipe)
        certificate = {
            "format_version": 1,
            "kind": "certificate",
            "source": source,
            "dtype": dtype,
            "parameters": parameters,
            "tied": weights.tied,
            "tensors": tensors,  # xxh3-128 of each tensor's fp32 bytes in the checkpoint
            "files": {file.name: digest_file(file) for file in sorted(unfinished.iterdir())},
            "loss_valid": {"checkpoint": checkpoint.loss_valid, "converted": loss},
        }
        _check_loss(checkpoint, loss, dtype)
        write_json(unfinished / CERTIFICATE, certificate)
    return certificate


def _write_configs(directory: Path, recipe: Recipe, eos_id: int, dtype: str) -> None:
    from transformers import GenerationConfig, GPT2Config

    config = GPT2Config(
        **recipe.model.hugging_face_config(eos_id), architectures=["GPT2LMHeadModel"], dtype=_DTYPES[dtype]
    )
    config.save_pretrained(directory)
    GenerationConfig(bos_token_id=eos_id, eos_token_id=eos_id, pad_token_id=eos_id).save_pretrained(directory)


def _write_weights(directory: Path, weights: ZeroCheckpoint, dtype: str, max_shard_bytes: int) -> dict[str, str]:
    """Write safetensors files and, for several, their index. Returns each tensor's digest."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    digests: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    held_bytes = total_bytes = 0

    def write_held() -> None:
        nonlocal held_bytes
        save_file(held, directory / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()
        held_bytes = 0

    for name, tensor in weights.tensors():
        digests[name] = digest_bytes(tensor.contiguous().numpy().data)
        # A copy, so that no file is written from the checkpoint's own memory map.
        converted = tensor.to(_DTYPES[dtype], copy=True).contiguous()
        if held and held_bytes + converted.nbytes > max_shard_bytes:
            write_held()
        held[name] = converted
        held_bytes += converted.nbytes
        total_bytes += converted.nbytes
    write_held()

    if len(shards) == 1:
        (directory / "part-0").rename(directory / "model.safetensors")
        return digests
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return digests


def _check_parameters(directory: Path, tensors: dict[str, str]) -> None:
    """The names written are exactly those of the model that the configuration describes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        network = GPT2LMHeadModel(GPT2Config.from_pretrained(directory))
    expected = {name for name, _ in network.named_parameters()}
    if expected != tensors.keys():
        missing, extra = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        raise CheckpointError(
            f"the checkpoint is not this recipe's model: missing {missing[:3]}, unexpected {extra[:3]}."
        )


def _check_loss(checkpoint: Checkpoint, loss: float | None, dtype: str) -> None:
    if loss is None or checkpoint.loss_valid is None:
        return  # the certificate says so
    tolerance = max(_LOSS_TOLERANCE[checkpoint.precision], _LOSS_TOLERANCE[_PRECISIONS[dtype]])
    if not abs(loss - checkpoint.loss_valid) <= tolerance:  # so that NaN fails
        raise CheckpointError(
            f"{checkpoint.path}: the converted model's validation loss is {loss:.6f}, the engine's was "
            f"{checkpoint.loss_valid:.6f}; they may differ by {tolerance}. Nothing was written."
        )
