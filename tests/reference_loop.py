"""A plain PyTorch training loop in one process, without DeepSpeed: the reference for a run's losses.

It uses the package's recipe, data and initial weights, and reimplements everything else.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.training.model import build_model


@dataclass(frozen=True)
class ReferenceStep:
    """Measurements of one optimizer step."""

    loss: float  # mean over the global batch, nats per token
    gradient_norm: float  # over all parameters, before clipping


def rate_at(step: int, peak: float, warmup_steps: int, steps: int, min_ratio: float) -> float:
    """Learning rate of step 0, 1, …: linear warm-up that reaches its peak at the end, then cosine decay."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    angle = math.pi * (step - warmup_steps) / (steps - warmup_steps)  # 0 at the first step after the warm-up
    return peak * min_ratio + peak * (1 - min_ratio) * (1 + math.cos(angle)) / 2


def train_reference(recipe_path: Path, accumulation: int) -> list[ReferenceStep]:
    """Train a recipe to its last step in fp32 on the CPU, each global batch in `accumulation` equal parts."""
    recipe = load_recipe(recipe_path)
    data = Dataset.open(recipe.data.sources, recipe.model.seq_len)
    order = data.order(recipe.seed)
    model = build_model(recipe.model, data.manifests[0].eos_id, recipe.seed).train()
    settings, batch_size = recipe.optimizer, recipe.batch.global_batch_size
    steps, warmup_steps = recipe.schedule.steps, recipe.schedule.warmup_steps
    assert steps is not None and warmup_steps is not None  # this loop supports lengths in steps only
    named = dict(model.named_parameters())
    plain = {name for name in named if name.endswith(".bias") or ".ln_" in name}
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[name] for name in named if name not in plain], "weight_decay": settings.weight_decay},
            {"params": [named[name] for name in named if name in plain], "weight_decay": 0.0},
        ],
        betas=settings.betas,
        eps=settings.eps,
    )
    taken = []
    for step in range(steps):
        ids = torch.from_numpy(data.train.batch(order.take(step * batch_size, batch_size)))
        loss = 0.0
        optimizer.zero_grad()
        for part in ids.chunk(accumulation):
            part_loss = cross_entropy(model(part[:, :-1]).logits.transpose(1, 2), part[:, 1:]) / accumulation
            part_loss.backward()
            loss += part_loss.item()
        gradients = [parameter.grad for parameter in named.values() if parameter.grad is not None]
        # In fp64: on a CPU, torch's norm sums squares in fp32 and loses 0.1 % for an embedding.
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
        for gradient in gradients:
            gradient *= min(1.0, settings.gradient_clipping / norm)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings.learning_rate, warmup_steps, steps, recipe.schedule.min_ratio)
        optimizer.step()
        taken.append(ReferenceStep(loss, norm))
    return taken
