"""The projection to logits and its loss, some tokens at a time: the logits of a micro-batch are never all there."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import nn

from codeparrot_ds.training import kernels


class LossHead(nn.Linear):
    """The projection to logits, which can give the mean loss without ever holding all logits.

    At 8 sequences of 1,024 tokens and 32,768 token ids the logits take 1.1 GB in fp32, and so does their gradient.

    Attributes:
        chunk_tokens: logits are made for so many tokens at a time.
        fused: the loss and its gradient are made from a chunk's logits in one kernel that reads them twice and writes
            the gradient once: 12 bytes a logit with the three matrix products, in bf16, instead of 34. None for
            wherever there is that kernel.
    """

    chunk_tokens = 4096
    fused: bool | None = None

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [batch, seq_len, n_embd] to logits [batch, seq_len, vocab], or with `targets` [batch, seq_len]
        int64 to their mean loss [] in nats per token."""
        if targets is None:
            return super().forward(hidden)
        fused = kernels.available(hidden.device) if self.fused is None else self.fused
        loss: torch.Tensor = _ChunkedLoss.apply(
            hidden.flatten(0, 1), self.weight, targets.flatten(), self.chunk_tokens, fused
        )
        return loss


class _ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of a projection, some tokens at a time: gradients are made in the forward pass, while a
    chunk's logits are there, so that no logits are kept and none are made twice. Source of the idea: Liger Kernel's
    fused linear cross-entropy (Hsu et al., 2024)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int, fused: bool
    ) -> torch.Tensor:
        """hidden [tokens, n_embd], weight [vocab, n_embd], targets [tokens] int64, loss [] fp32."""
        needs_gradient = any(ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if needs_gradient else None
        weight_gradient: torch.Tensor | None = None
        loss_and_gradient = kernels.loss_and_gradient if fused else in_passes
        for start in range(0, len(hidden), chunk):
            part, wanted = hidden[start : start + chunk], targets[start : start + chunk, None]
            # Nothing here holds the logits, so that what follows can drop them.
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
            del gradient  # or it would stay while the next chunk's is made
        if hidden_gradient is not None:
            ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.tokens, ctx.weight_type = len(hidden), weight.dtype
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The kept gradients times that of the loss."""
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
    """What `kernels.loss_and_gradient` gives, by an operator after another."""
    dtype = logits.dtype
    log_probabilities = F.log_softmax(logits, 1, dtype=torch.float32)
    del logits
    loss = -log_probabilities.gather(1, targets).sum()
    if not needs_gradient:
        return loss, None
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=gradient.dtype))
    return loss, gradient.to(dtype)
