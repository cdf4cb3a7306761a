"""Run by one rank: count host reads of an optimizer step, and its memory traffic outside forward and backward.

Usage: probe_step.py RECIPE OUT [BREAK]. BREAK makes one part slow, so that a test can check that it is detected:
`clip`, `reduce`, `zero`, `add` or `read`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.train import end
from codeparrot_ds.training import zero1
from codeparrot_ds.training.loop import Trainer
from codeparrot_ds.trial import trainer_on_random_ids
from tests.counting import Counter

recipe_path, out, *broken = [each for each in sys.argv[1:] if not each.startswith("--local_rank")]
recipe = load_recipe(Path(recipe_path))
traffic = Counter()


def count_traffic_of(owner: Any, name: str) -> None:
    """Count a method in `traffic`."""
    plain = getattr(owner, name)

    def counted(*arguments: Any, **named: Any) -> Any:
        with traffic:
            return plain(*arguments, **named)

    setattr(owner, name, counted)


if broken == ["clip"]:
    plain_step = zero1.LeanBF16Optimizer.step

    def step(optimizer: Any, closure: None = None) -> None:
        """Clip in a separate pass."""
        for gradients in optimizer.fp32_groups_gradients_flat:
            gradients.mul_(1.0)
        plain_step(optimizer)

    zero1.LeanBF16Optimizer.step = step  # type: ignore[method-assign]
elif broken == ["zero"]:
    zero1.LeanBF16Optimizer.clear_hp_grads = zero1.BF16_Optimizer.clear_hp_grads  # type: ignore[method-assign]
elif broken == ["reduce"]:
    plain = zero1.DeepSpeedEngine.buffered_allreduce_fallback
    zero1.Engine.buffered_allreduce_fallback = plain  # type: ignore[method-assign]
elif broken == ["add"]:
    zero1.LeanBF16Optimizer._update_hp_grad = zero1.BF16_Optimizer._update_hp_grad  # type: ignore[method-assign]
elif broken == ["read"]:
    zero1.Engine.skipped_so_far = lambda engine: engine.skipped_steps  # type: ignore[method-assign]
    plain_loss = Trainer.loss
    Trainer.loss = lambda trainer, ids: plain_loss(trainer, ids) * (ids.max().item() > 0)  # type: ignore[method-assign]

with trainer_on_random_ids(recipe) as (trainer, _):
    engine = trainer.engine

    def take_step(accumulation: int) -> None:
        """Traffic of a step of `micro_batches` micro-batches."""
        engine.set_train_batch_size(recipe.batch.micro_batch_size * accumulation)
        engine.micro_steps = 0
        batch = recipe.batch.model_copy(update={"global_batch_size": engine.train_batch_size()})
        trainer.recipe = recipe.model_copy(update={"batch": batch})
        trainer.train_step()
        trainer.stop_requests.finish_exchange()

    def reads(accumulation: int) -> list[str]:
        """Host reads in a step of `micro_batches` micro-batches."""
        with Counter() as counter:
            take_step(accumulation)
        return counter.host_reads

    take_step(2)  # the first step creates the optimizer state
    few, many = reads(2), reads(6)
    a_micro_batch = (len(many) - len(few)) / 4
    found = {"a_micro_batch": a_micro_batch, "a_step": len(few) - 2 * a_micro_batch, "names": sorted(set(many))}
    if isinstance(engine.optimizer, zero1.BF16_Optimizer):
        for owner, names in (
            (engine, ("allreduce_gradients", "zero_grad")),
            (engine.optimizer, ("_update_hp_grad", "update_hp_grads", "clear_lp_grads", "step", "zero_grad")),
        ):
            for name in names:
                count_traffic_of(owner, name)
        take_step(1)
        found["bytes_a_parameter"] = traffic.traffic_bytes / trainer.parameters
    Path(out).write_text(json.dumps(found), encoding="utf-8")
end(0)
