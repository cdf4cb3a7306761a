"""Fused GPU kernels, built with torch.compile, that replace several passes over memory by PyTorch's operators."""

import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch


def available(device: torch.device) -> bool:
    """Whether the kernels can be used: they need a GPU, Triton, and the C compiler that Triton calls."""
    return device.type == "cuda" and _can_compile()


@cache
def _can_compile() -> bool:
    return find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang")))


def loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the summed cross-entropy of a chunk, and optionally its gradient.

    Args:
        logits: [tokens, vocab].
        targets: [tokens, 1] int64.
        needs_gradient: whether to compute the gradient.

    Returns:
        The sum of losses, [] fp32, and its gradient, [tokens, vocab] in the logits' dtype, or None. The gradient is not
        divided by the number of tokens, because fp16 would underflow.
    """
    for tensor in (logits, targets):
        torch._dynamo.mark_dynamic(tensor, 0)  # the last chunk may be shorter
    return _compiled()(logits, targets, needs_gradient)


@cache
def _compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    compiled: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = torch.compile(
        _loss_and_gradient, fullgraph=True
    )
    return compiled


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    wide = logits.float()
    normalizer = wide.logsumexp(1, keepdim=True)
    loss = (normalizer - wide.gather(1, targets)).sum()
    if not needs_gradient:
        return loss, None
    probability = (wide - normalizer).exp()
    wanted = torch.arange(logits.shape[1], device=logits.device) == targets  # [tokens, vocab], never materialized
    return loss, (probability - wanted.float()).to(logits.dtype)
