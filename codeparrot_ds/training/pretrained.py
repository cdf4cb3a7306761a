"""Start from the weights of a Hugging Face GPT-2 (`model.init_from`)."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codeparrot_ds.checkpoint.attention_scale import fold, unfold
from codeparrot_ds.errors import CheckpointError, list_problems
from codeparrot_ds.run.gpt2 import GPT2
from codeparrot_ds.run.sections import Model
from codeparrot_ds.system.files import read_json
from codeparrot_ds.training.metrics import log


def load_pretrained(network: nn.Module, model: Model, directory: Path) -> None:
    """Load every parameter from a Hugging Face GPT-2 directory, whether or not partitioned.

    If only one of the directory and the recipe scales attention by layer, the query projections are multiplied or
    divided accordingly, so that the network computes what the directory's model does.

    Raises CheckpointError or DataError unless the directory has the recipe's model.
    """
    import deepspeed
    from safetensors import SafetensorError, safe_open

    rescale = _rescaling(model, directory)
    problems = []
    where: dict[str, Path] = {}  # our parameter name -> file that contains it
    try:
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    name = key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"
                    if name in where:
                        problems.append(f"{key} is in both {where[name].name} and {path.name}")
                    where[name] = path
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}).") from None

    def values_of(name: str) -> torch.Tensor:
        with safe_open(where[name], "pt") as file:
            values: torch.Tensor = file.get_tensor(_key_in(file, name))
        return values

    head, embedding = "lm_head.weight", "transformer.wte.weight"
    if head in where and embedding in where and not torch.equal(values_of(head), values_of(embedding)):
        problems.append(f"{head} differs from {embedding}, but the recipe's model ties them")
    parameters = dict(network.named_parameters())
    for name, parameter in parameters.items():
        if name not in where:
            problems.append(f"{name} is missing")
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        with safe_open(where[name], "pt") as file:
            found = file.get_slice(_key_in(file, name)).get_shape()
        if list(shape) != list(found):
            problems.append(f"{name}: its shape is {list(found)}, but the recipe's model needs {list(shape)}")
    if problems:
        shown = [*problems[:10], *([f"and {len(problems) - 10} more"] if len(problems) > 10 else [])]
        fix = "Use a Hugging Face GPT-2 directory with safetensors, and set the recipe's model section to its shape."
        raise CheckpointError(list_problems(f"{directory} (model.init_from)", shown, fix))
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
            if parameter.numel() > 0:
                values = values_of(name).float()
                parameter.copy_(rescale(name, values.flatten(), model.n_embd).view(values.shape))


def _key_in(file: Any, name: str) -> str:
    """Return the key of parameter `name` in the file: files of a bare GPT2Model omit the `transformer.` prefix."""
    return name if name in file.keys() else name.removeprefix("transformer.")  # noqa: SIM118 (not a dict)


def _rescaling(model: Model, directory: Path) -> Callable[[str, torch.Tensor, int], torch.Tensor]:
    """Return the function of (name, flat values, n_embd) that adapts weights to the recipe's attention scale.

    Raises CheckpointError if the directory's config.json is not that of the recipe's model.
    """
    path = directory / "config.json"
    found, wanted = GPT2.of_config(read_json(path, "model configuration"), str(path)), GPT2.of_recipe(model)
    problems = [
        f"{field.name} is {getattr(found, field.name)}, but the recipe's model has {getattr(wanted, field.name)}"
        for field in fields(GPT2)
        if field.name != "scale_by_layer" and getattr(found, field.name) != getattr(wanted, field.name)
    ]
    if problems:
        fix = "Set the recipe's model section to the values of this directory, or use another."
        raise CheckpointError(list_problems(f"{path} (model.init_from)", problems, fix))
    if found.scale_by_layer == wanted.scale_by_layer:
        return lambda name, values, n_embd: values
    action = "multiplied" if wanted.scale_by_layer else "divided"
    log.info(
        "%s: query projections are %s by the number of their layer, because model.scale_attn_by_inverse_layer_idx is "
        "%s and was %s there",
        directory,
        action,
        str(wanted.scale_by_layer).lower(),
        str(found.scale_by_layer).lower(),
    )
    return unfold if wanted.scale_by_layer else fold
