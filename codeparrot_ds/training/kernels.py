"""Kernels for GPUs that do in one pass over memory what PyTorch's operators do in several: made by torch.compile."""

import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

_WIDTH = 16  # of rows in a kernel of any number of them: with it, Triton loads several numbers at a time
_ALIGNMENT_BYTES = 16  # that it then takes for granted


def available(device: torch.device) -> bool:
    """Whether they can be had: on a GPU, with a compiler for C, which Triton needs."""
    return device.type == "cuda" and _has_compiler()


@cache
def _has_compiler() -> bool:
    return any(map(shutil.which, ("cc", "gcc", "clang")))


def accumulate(total: torch.Tensor, part: torch.Tensor, first: bool) -> None:
    """Add `part` to `total`, or put it in its place if it is the `first`. Both [n], of types that may differ.

    PyTorch's own operators for two types load a number at a time: 1.9 TB/s on a GPU that copies at 4.2.
    """
    if total.numel() % _WIDTH or total.numel() == _WIDTH or (total.data_ptr() | part.data_ptr()) % _ALIGNMENT_BYTES:
        _copy(total, part) if first else _add(total, part)
        return
    rows = total.view(-1, _WIDTH), part.view(-1, _WIDTH)
    for tensor in rows:
        torch._dynamo.mark_dynamic(tensor, 0)  # one kernel serves all parameters
    _compiled(_copy if first else _add)(*rows)


def loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of logits [tokens, vocab] and targets [tokens, 1] int64: the sum of losses [] fp32, and with `needs_gradient` its
    gradient in the logits' type, [tokens, vocab]. It is not divided by the number of tokens: fp16 would lose it."""
    for tensor in (logits, targets):
        torch._dynamo.mark_dynamic(tensor, 0)  # the last chunk may be shorter
    found: tuple[torch.Tensor, torch.Tensor | None] = _compiled(_loss_and_gradient)(logits, targets, needs_gradient)
    return found


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True)
    return compiled


def _copy(total: torch.Tensor, part: torch.Tensor) -> None:
    total.copy_(part)


def _add(total: torch.Tensor, part: torch.Tensor) -> None:
    total.add_(part)


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
