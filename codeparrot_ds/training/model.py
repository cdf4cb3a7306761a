"""GPT-2 whose initial weights depend only on the seed and parameter names, at every ZeRO stage and world size."""

import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
import xxhash
from torch import nn
from torch.utils.checkpoint import checkpoint

from codeparrot_ds.run.sections import Model
from codeparrot_ds.system.libraries import require_transformers
from codeparrot_ds.training import attention
from codeparrot_ds.training.loss import LossHead
from codeparrot_ds.training.pretrained import load_pretrained


def build_model(
    model: Model,
    eos_id: int,
    seed: int,
    ds_config: Mapping[str, Any] | None = None,
    *,
    loss_chunk_tokens: int = 4096,
    from_checkpoint: bool = False,
    draw_on: torch.device | None = None,
) -> nn.Module:
    """Build an initialized `transformers.GPT2LMHeadModel` with tied embeddings that also computes its loss.

    `network(input_ids, targets=...)` returns the mean loss; without targets it is transformers' own forward.

    Args:
        model: the recipe's `model` section.
        eos_id: end-of-sequence id for the model's configuration.
        seed: for the initial weights, unless they are loaded (`model.init_from`).
        ds_config: resolved DeepSpeed configuration; at stage 3 each rank only ever holds its partition.
        loss_chunk_tokens: see `LossHead`.
        from_checkpoint: all weights will be loaded afterwards, so `model.init_from` need not exist any more.
        draw_on: device on which to draw random weights. This is fast, but the weights differ from those of training.

    Returns:
        The network, with activation checkpointing set up as in `model`.

    Raises:
        CheckpointError, DataError: `model.init_from` is not a GPT-2 directory of this shape.
        ConfigError: transformers is too old.
    """
    import deepspeed
    from transformers import GPT2Config

    require_transformers()
    attention.register()
    make = _class_with_loss()
    config = GPT2Config(
        **model.hugging_face_config(eos_id),
        use_cache=False,
        attn_implementation=attention.CAUSAL,
        # GPT-2's activation in one kernel: "gelu_new" takes seven, and keeps their outputs for the backward pass.
        activation_function="gelu_pytorch_tanh",
    )
    if ds_config is not None and ds_config["zero_optimization"]["stage"] == 3:
        with deepspeed.zero.Init(config_dict_or_path=dict(ds_config)):
            network = make(config)
    else:
        with torch.device("meta"):  # allocate once, without transformers' initialization
            network = make(config)
        network.to_empty(device=draw_on or "cpu")
    network.tie_weights()
    attention.set_scale(network)
    network.lm_head.chunk_tokens = loss_chunk_tokens
    if draw_on is not None:
        _draw(network, model.init_std)
    elif model.init_from is None or from_checkpoint:
        initialize_weights(network, model, seed)
    else:
        load_pretrained(network, model, model.init_from)
    recompute_activations(network, model.activation_checkpointing)
    return network


def recompute_activations(network: Any, mode: str) -> None:
    """Make blocks discard their activations after the forward pass and recompute them in the backward pass.

    Args:
        network: GPT-2 of transformers.
        mode: "none", "full" for all blocks, or "selective" for every second block.
    """
    if mode == "none" and not any(block.gradient_checkpointing for block in network.transformer.h):
        return
    # Renamed in transformers 5; the old name is removed in 6.
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for number, block in enumerate(network.transformer.h):
        block.gradient_checkpointing = mode == "full" or (mode == "selective" and number % 2 == 0)


def compile_blocks(network: Any, device: torch.device, backend: Any = "inductor") -> None:
    """Compile each block with torch.compile.

    All blocks share one graph, or two where only some recompute their activations, compiled once per micro-batch shape.
    Recomputation is part of the graph, so that only what the backward pass needs is recomputed. The hooks with which
    ZeRO-3 gathers a block's weights stay outside the graph: see `gather_whole_blocks`.
    """
    attention.share_scale(network, device)
    for block in network.transformer.h:
        forward = type(block).forward.__get__(block)
        if block.gradient_checkpointing:
            block.gradient_checkpointing = False
            forward = partial(_recomputed, block)
        block.forward = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend)


def _recomputed(block: Any, *arguments: Any, **named: Any) -> Any:
    if not block.training:
        return type(block).forward(block, *arguments, **named)
    return checkpoint(type(block).forward, block, *arguments, use_reentrant=False, **named)


def gather_whole_blocks(network: Any) -> None:
    """Make ZeRO-3 gather weights per block instead of per module, which needs a twelfth of its Python hooks."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(network, [type(network.transformer.h[0])])


@lru_cache(maxsize=1)
def _class_with_loss() -> Any:
    """Return transformers' GPT-2 with our head. Defined on first use, because importing transformers takes seconds."""
    from transformers import GPT2LMHeadModel

    class GPT2WithLoss(GPT2LMHeadModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.transformer.wte = TokenEmbedding(config.vocab_size, config.n_embd)
            self.lm_head = LossHead(config.n_embd, config.vocab_size, bias=False)

        def forward(self, input_ids: Any = None, targets: Any = None, **others: Any) -> Any:
            if others.get("attention_mask") is not None:
                raise ValueError("the training network takes no attention mask")
            if targets is None:
                return super().forward(input_ids, **others)
            hidden = self.transformer(input_ids).last_hidden_state
            return self.lm_head(hidden, targets)

    return GPT2WithLoss


class TokenEmbedding(nn.Embedding):
    """Embedding whose gradient is accumulated in fp32 on CPU too, as in CUDA's kernel. In bf16, late contributions to
    the gradient of a frequent token would be rounded away."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up input [batch, seq_len] int64; returns [batch, seq_len, n_embd]."""
        if input.device.type == "cpu" and self.weight.dtype == torch.bfloat16 and torch.is_grad_enabled():
            embedded: torch.Tensor = _EmbeddingSummedInFp32.apply(self.weight, input)
            return embedded
        return super().forward(input)


class _EmbeddingSummedInFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = len(weight), weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        summed = torch.ops.aten.embedding_dense_backward(gradients[0].float(), ids, ctx.rows, -1, False)
        return summed.to(ctx.dtype), None


def initialize_weights(network: nn.Module, model: Model, seed: int) -> None:
    """Set every parameter to its `initial_value`, whether or not it is partitioned.

    transformers' own initialization sees empty partitions under ZeRO-3, and a single generator for all parameters
    would make each weight depend on the order in which modules are built.
    """
    import deepspeed

    for name, parameter in network.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
            if parameter.numel() > 0:  # gathered: rank 0's values are broadcast on exit
                parameter.copy_(initial_value(name, parameter.shape, model, seed))


def _draw(network: nn.Module, std: float) -> None:
    """Initialize every parameter on its device: from the default generator, and without depth scaling."""
    import deepspeed

    for name, parameter in network.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
            if ".ln_" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, std)


def initial_value(name: str, shape: torch.Size, model: Model, seed: int) -> torch.Tensor:
    """Return the fp32 value of one parameter at step 0, on the CPU. Scales from the GPT-2 paper, section 2.3."""
    if ".ln_" in name:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    # Each block adds two projections to the residual stream. Scaling keeps its variance independent of depth.
    std = model.init_std / math.sqrt(2 * model.n_layer) if name.endswith("c_proj.weight") else model.init_std
    generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(f"{seed}/{name}".encode()) >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in fp32, nats per token, of logits [batch, seq_len, vocab], targets [batch, seq_len] int64."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: weight decay for matrices and embeddings, none for biases and layer norms.

    Grouping is by number of dimensions, so it does not depend on names; a ZeRO-3 partition has its shape in `ds_shape`.
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
