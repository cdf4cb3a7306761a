"""Chunked output projection and loss, so that the logits of a whole micro-batch are never in memory."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import nn

from codeparrot_ds.training import kernels


class LossHead(nn.Linear):
    """Projection to logits that can compute the mean loss without holding all logits in memory.

    For 8 sequences of 1,024 tokens and a vocabulary of 32,768, the logits take 1.1 GB in fp32, and so does their
    gradient.

    Attributes:
        chunk_tokens: number of tokens whose logits are computed at a time.
        fused: compute the loss and its gradient from a chunk's logits in one kernel, which reads them twice and writes
            the gradient once: 12 bytes per logit in bf16, with the three matrix products, instead of 34. None uses the
            kernel wherever it is available.
    """

    chunk_tokens = 4096
    fused: bool | None = None

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Project hidden [batch, seq_len, n_embd] to logits [batch, seq_len, vocab]; with `targets` [batch, seq_len]
        int64, return their mean loss [] in nats per token instead."""
        if targets is None:
            return super().forward(hidden)
        fused = kernels.available(hidden.device) if self.fused is None else self.fused
        loss: torch.Tensor = _ChunkedLoss.apply(
            hidden.flatten(0, 1), self.weight, targets.flatten(), self.chunk_tokens, fused
        )
        return loss


class _ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of a projection, chunk by chunk.

    Gradients are computed in the forward pass, while a chunk's logits are in memory, so no logits are stored or
    recomputed. After Liger Kernel's fused linear cross-entropy (Hsu et al., 2024).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int, fused: bool
    ) -> torch.Tensor:
        """Compute the loss [] fp32 from hidden [tokens, n_embd], weight [vocab, n_embd] and targets [tokens] int64."""
        needs_gradient = any(ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if needs_gradient else None
        weight_gradient: torch.Tensor | None = None
        loss_and_gradient = kernels.loss_and_gradient if fused else in_passes
        for start in range(0, len(hidden), chunk):
            part, wanted = hidden[start : start + chunk], targets[start : start + chunk, None]
            # No reference to the logits is kept here, so that the callee can free them.
            loss, gradient = loss_and_gradient(F.linear(part, weight), wanted, needs_gradient)
            total += loss
            if hidden_gradient is None or gradient is None:
                continue
            torch.mm(gradient, weight, out=hidden_gradient[start : start + chunk])
            if weight_gradient is None:
                weight_gradient = (gradient.T @ part).float()
            elif gradient.dtype == torch.float32:
                weight_gradient.addmm_(gradient.T, part)
            else:
                weight_gradient += gradient.T @ part
            del gradient  # frees it before the next chunk's gradient is computed
        if hidden_gradient is not None:
            ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.tokens, ctx.weight_type = len(hidden), weight.dtype
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Scale the stored gradients by the gradient of the loss."""
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = gradients[0] / ctx.tokens
        return (
            hidden_gradient * scale.to(hidden_gradient.dtype),
            (weight_gradient * scale).to(ctx.weight_type),
            None,
            None,
            None,
        )


def in_passes(
    logits: torch.Tensor, targets: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the same as `kernels.loss_and_gradient` with a sequence of PyTorch operators."""
    dtype = logits.dtype
    log_probabilities = F.log_softmax(logits, 1, dtype=torch.float32)
    del logits
    loss = -log_probabilities.gather(1, targets).sum()
    if not needs_gradient:
        return loss, None
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=gradient.dtype))
    return loss, gradient.to(dtype)
