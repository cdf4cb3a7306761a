"""GPT-2 with weights that are a function of seed and names alone, at every ZeRO stage and world size."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
import xxhash
from torch import nn

from codeparrot_ds.recipe import Model

_INIT_STD = 0.02  # GPT-2's `initializer_range`


def build_model(model: Model, eos_id: int, seed: int, ds_config: Mapping[str, Any] | None = None) -> nn.Module:
    """A `transformers.GPT2LMHeadModel`, initialised, its embeddings tied.

    Args:
        model: the recipe's section.
        eos_id: goes into its configuration.
        seed: of the weights.
        ds_config: resolved DeepSpeed configuration; at stage 3 each rank then only ever holds its partition.
    """
    import deepspeed
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**model.hugging_face_config(eos_id), use_cache=False, attn_implementation="sdpa")
    if ds_config is not None and ds_config["zero_optimization"]["stage"] == 3:
        with deepspeed.zero.Init(config_dict_or_path=dict(ds_config)):
            network = GPT2LMHeadModel(config)
    else:
        with torch.device("meta"):  # allocate once, and leave the initialisation to us
            network = GPT2LMHeadModel(config)
        network.to_empty(device="cpu")
    network.tie_weights()
    initialise(network, model, seed)
    if model.activation_checkpointing == "full":
        # transformers renamed it in 5; the old name goes in 6.
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return network


def initialise(network: nn.Module, model: Model, seed: int) -> None:
    """Set every parameter to `initial_value`, partitioned or not.

    transformers' own initialisation sees empty partitions under ZeRO-3, and one generator for all parameters
    would tie each weight to the order in which modules were built.
    """
    import deepspeed

    for name, parameter in network.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
            if parameter.numel() > 0:  # gathered: rank 0's values reach the others on leaving
                parameter.copy_(initial_value(name, parameter.shape, model.n_layer, seed))


def initial_value(name: str, shape: torch.Size, n_layer: int, seed: int) -> torch.Tensor:
    """The fp32 value of one parameter at step 0, on the CPU. Source of the scales: GPT-2, section 2.3."""
    if ".ln_" in name:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    # Each block adds two projections to the residual stream: scaled so that its variance does not grow with depth.
    std = _INIT_STD / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else _INIT_STD
    generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(f"{seed}/{name}".encode()) >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in fp32, nats per token. logits [batch, seq_len, vocab], targets [batch, seq_len] int64."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: weight decay for matrices and embeddings, none for biases and layer norms.

    The number of dimensions decides, which no renaming can break; a ZeRO-3 partition keeps its own in `ds_shape`.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in network.parameters():
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        (decayed if dimensions >= 2 else plain).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": plain, "weight_decay": 0.0, "name": "plain"},
    ]
