"""Training through DeepSpeed at every ZeRO stage gives the losses of a plain PyTorch loop, step by step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import RunRanks, Trained, recipe_on, save_recipe, train
from tests.reference_loop import ReferenceStep, train_reference

STEPS = 100
GLOBAL_BATCH_SIZE = 8
CLIPPING = 0.6
WORLD_SIZES = (1, 2)
ACCUMULATIONS = (1, 4)
# Both compute in fp32 but sum in different orders, which changes a loss by about 1e-7 and a norm by about 1e-6. At
# three times this learning rate it is 1e-5 and 1e-2: a layer norm amplifies the small remainder of an embedding that is
# passing through 0.
LEARNING_RATE = 0.001
LOSS_DIFFERENCE = 1e-5  # relative
NORM_DIFFERENCE = 1e-4  # relative

pytestmark = pytest.mark.slow
Reference = dict[int, list[ReferenceStep]]


@pytest.fixture(scope="module")
def body(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of 100 steps that is evaluated, saved and logged only at the end."""
    recipe = recipe_on(data, tmp_path_factory.mktemp("reference"))
    return {
        **recipe,
        "model": {**recipe["model"], "activation_checkpointing": "none"},
        "batch": {"global_batch_size": GLOBAL_BATCH_SIZE},
        "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": 0.1, "gradient_clipping": CLIPPING},
        "schedule": {"steps": STEPS, "warmup_steps": 10, "min_ratio": 0.1},
        "evaluation": {"every_steps": STEPS, "sequences": GLOBAL_BATCH_SIZE},
        "checkpoints": {"every_steps": STEPS},
        "logging": {"every_steps": STEPS, "tensorboard": False},
    }


@pytest.fixture(scope="module")
def reference(body: dict[str, Any]) -> Reference:
    """Steps of the plain loop, by accumulation."""
    recipe = save_recipe(body, Path(body["runs"]) / "reference.yaml")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on busy cores, threads waiting for one another take twenty times as long
    try:
        return {accumulation: train_reference(recipe, accumulation) for accumulation in ACCUMULATIONS}
    finally:
        torch.set_num_threads(threads)


def furthest(found: list[float], expected: list[float]) -> tuple[float, int]:
    """The largest relative difference, and its step."""
    return max((abs(a - b) / b, step) for step, (a, b) in enumerate(zip(found, expected, strict=True)))


def test_the_plain_loop_learns_and_clips_some_steps(reference: Reference) -> None:
    for steps in reference.values():
        assert steps[-1].loss < steps[0].loss - 0.5
        assert STEPS / 10 < sum(step.gradient_norm > CLIPPING for step in steps) < STEPS / 2


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_step_is_that_of_the_plain_loop_on_one_rank_and_on_two(
    forked: RunRanks, body: dict[str, Any], reference: Reference, stage: int, accumulation: int
) -> None:
    def train_on(ranks: int) -> Trained:
        name = f"stage{stage}-ranks{ranks}-accumulation{accumulation}"
        options = [f"batch.micro_batch_size={GLOBAL_BATCH_SIZE // (ranks * accumulation)}"]
        if stage == 0:  # no JSON is shipped for this stage
            ds_config = Path(body["runs"]) / f"{name}.json"
            ds_config.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
            options.append(f"engine.deepspeed={ds_config}")
        return train(forked, {**body, "name": name}, ranks=ranks, stage=stage, options=options)

    expected = reference[accumulation]
    for ranks in WORLD_SIZES:
        trained = train_on(ranks)
        resolved = json.loads(trained.run.ds_config.read_text())
        assert resolved["zero_optimization"]["stage"] == stage
        trained.require_checkpoint_as_large_as_estimated(stage)
        assert resolved["gradient_accumulation_steps"] == accumulation
        rows = [row for row in trained.rows if row["kind"] == "train"]
        difference, step = furthest([row["loss"] for row in rows], [step.loss for step in expected])
        assert difference < LOSS_DIFFERENCE, f"{ranks} ranks, loss of step {step}"
        if stage > 0:  # without ZeRO, DeepSpeed 0.19.8 clips but reports no norm
            norms = [row["gradient_norm"] for row in rows]
            difference, step = furthest(norms, [step.gradient_norm for step in expected])
            assert difference < NORM_DIFFERENCE, f"{ranks} ranks, gradient norm of step {step}"
