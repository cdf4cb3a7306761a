"""Causal attention over full sequences for training: no mask, no padding, no KV cache.

transformers passes a [batch, 1, seq_len, seq_len] mask whenever torch.compile traces the model, which rules out
PyTorch's flash and cuDNN kernels; in eager mode it synchronizes with the device to see whether it needs a mask.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)

CAUSAL = "codeparrot_ds_causal"  # `attn_implementation` of a transformers configuration


def register() -> None:
    """Register `CAUSAL` with transformers. Without a mask function of that name, transformers builds no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(CAUSAL, causal_attention)


def causal_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention; an attention function of transformers.

    Args:
        module: the attention layer.
        query: [batch, heads, seq_len, head_dim], as are key and value.
        key: see `query`.
        value: see `query`.
        attention_mask: must be None.
        dropout: dropout probability.
        scaling: factor on the logits; None for 1 / sqrt(head_dim).

    Returns:
        Output [batch, seq_len, heads, head_dim], and no attention weights.

    Raises:
        ValueError: for a mask or a KV cache, which must not be ignored silently.
    """
    if attention_mask is not None or query.shape != key.shape:
        raise ValueError("the training network takes full sequences only: no attention mask and no key-value cache")
    scale = getattr(module, "query_scale", None)
    if scale is not None:  # in fp32: bf16 is too coarse for factors such as 1/3
        query = (query.float() * scale).to(query.dtype)
    attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    return attended.transpose(1, 2), None


def set_scale(network: Any) -> None:
    """Set each block's scale of the attention logits, so that it does not depend on the version of transformers."""
    for number, block in enumerate(network.transformer.h, start=1):
        divisor = number if network.config.scale_attn_by_inverse_layer_idx else 1
        block.attn.scaling = block.attn.head_dim**-0.5 / divisor


def share_scale(network: Any, device: torch.device) -> None:
    """Move the per-block factor of the attention scale from a Python number to a tensor.

    torch.compile builds a graph for each value of a number, but a single one for all values of a tensor. With
    `scale_attn_by_inverse_layer_idx` each block has a different scale: 1 / sqrt(head_dim) / (block + 1).
    """
    if not network.config.scale_attn_by_inverse_layer_idx:
        return
    for number, block in enumerate(network.transformer.h, start=1):
        block.attn.scaling = network.transformer.h[0].attn.scaling
        # Not a buffer: DeepSpeed would cast it to bf16 with the weights.
        block.attn.query_scale = torch.tensor(1 / number, dtype=torch.float32, device=device)
