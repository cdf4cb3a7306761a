"""Run by ranks: a few steps of ZeRO-1 under bf16, with our optimizer or DeepSpeed's. Rank 0 writes the results.

Usage: probe_zero1.py RECIPE OUT ours|deepspeed|missing. With `missing`, a last step in which one parameter gets no
gradient.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.train import end
from codeparrot_ds.training import ranks as rank_module
from codeparrot_ds.training import zero1
from codeparrot_ds.training.metrics import read_tensors
from codeparrot_ds.trial import trainer_on_random_ids

STEPS = 6
recipe_path, out, way = [each for each in sys.argv[1:] if not each.startswith("--local_rank")]
recipe = load_recipe(Path(recipe_path))
if way == "deepspeed":
    deepspeeds = zero1.DeepSpeedEngine
    zero1.Engine._configure_bf16_optimizer = deepspeeds._configure_bf16_optimizer  # type: ignore[method-assign]
    zero1.Engine.buffered_allreduce_fallback = deepspeeds.buffered_allreduce_fallback  # type: ignore[method-assign]


def step_without_a_gradient(optimizer: Any) -> None:
    """Take a step in which the first bias gets no gradient."""
    optimizer.fp32_groups_has_gradients[1][0] = False
    zero1.LeanBF16Optimizer.step(optimizer)


with trainer_on_random_ids(recipe) as (trainer, _):
    optimizer = trainer.engine.optimizer
    assert type(optimizer) is (zero1.BF16_Optimizer if way == "deepspeed" else zero1.LeanBF16Optimizer)
    steps = []
    for trainer.step in range(STEPS):
        if way == "missing" and trainer.step == STEPS - 1:
            optimizer.step = partial(step_without_a_gradient, optimizer)
        steps.append(trainer.train_step())
        trainer.stop_requests.finish_exchange()
    losses = trainer.ranks.sum(sum(step.loss.double() for step in steps).reshape(1))  # type: ignore[union-attr]
    found = {
        "mean_loss": losses.item() / STEPS / trainer.ranks.world_size,
        "norms": read_tensors([step.gradient_norm for step in steps]),
        "largest_of_the_missing": float(optimizer.fp32_groups_gradients[1][0].abs().max()),
        "largest_of_the_next": float(optimizer.fp32_groups_gradients[1][1].abs().max()),
        "weights": [float(part.double().norm()) for part in optimizer.fp32_groups_flat_partition],
    }
    if trainer.ranks.rank == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
rank_module.leave()
end(0)
