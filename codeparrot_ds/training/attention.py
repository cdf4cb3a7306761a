"""Causal attention over whole sequences, which is all that training needs: no mask, no padding, no cache.

transformers passes a [batch, 1, seq_len, seq_len] mask whenever torch.compile traces the model, and PyTorch then has
neither its flash nor its cuDNN kernel for it; in eager mode it waits for the device to see whether it needs one.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)

CAUSAL = "codeparrot_ds_causal"  # `attn_implementation` of a transformers configuration


def register() -> None:
    """Make `CAUSAL` known to transformers. Without a mask function of the same name, it makes no masks for it."""
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
    """[batch, heads, seq_len, head_dim] each, to [batch, seq_len, heads, head_dim].

    Raises ValueError for what training never asks for, rather than leaving a mask out.
    """
    if attention_mask is not None or query.shape != key.shape:
        raise ValueError("the training network takes whole sequences only: no attention mask and no key-value cache")
    scale = getattr(module, "query_scale", None)
    if scale is not None:  # in fp32: bf16 has no third
        query = (query.float() * scale).to(query.dtype)
    attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    return attended.transpose(1, 2), None


def share_scale(network: Any, device: torch.device) -> None:
    """Take what makes the attention scale of a block its own out of a number and put it into a tensor.

    torch.compile makes a graph for each value of a number that it meets, one for all values of a tensor. With
    `scale_attn_by_inverse_layer_idx` each block has another scale: 1 / sqrt(head_dim) / (block + 1).
    """
    if not network.config.scale_attn_by_inverse_layer_idx:
        return
    for number, block in enumerate(network.transformer.h, start=1):
        block.attn.scaling = network.transformer.h[0].attn.scaling
        # No buffer: DeepSpeed would round it to bf16 with the weights.
        block.attn.query_scale = torch.tensor(1 / number, dtype=torch.float32, device=device)
