"""Kernels for GPUs that do at once what PyTorch's operators do in several passes over memory: by torch.compile."""

import shutil
from collections.abc import Callable
from functools import cache

import torch


def available(device: torch.device) -> bool:
    """Whether there are any: on a GPU, with a compiler for C, which Triton needs."""
    return device.type == "cuda" and _has_compiler()


@cache
def _has_compiler() -> bool:
    return any(map(shutil.which, ("cc", "gcc", "clang")))


def loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of logits [tokens, vocab] and targets [tokens, 1] int64: the sum of losses [] fp32, and with `needs_gradient` its
    gradient in the logits' type, [tokens, vocab]. It is not divided by the number of tokens: fp16 would lose it."""
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
    wanted = torch.arange(logits.shape[1], device=logits.device) == targets  # [tokens, vocab], never in memory
    return loss, (probability - wanted.float()).to(logits.dtype)
