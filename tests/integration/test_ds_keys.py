"""Each tested key of the DeepSpeed JSON on real ranks: it changes how a step is computed, not what.

The keys of offloading are tested in test_offload.py, those of the loss scale in test_options.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunRanks, Trained, read_run, recipe_on, save_recipe

pytestmark = pytest.mark.slow
STEPS = 3
ZERO = "zero_optimization"
KEYS: list[tuple[int, str, dict[str, Any]]] = [
    *((stage, "fp32", {ZERO: {"overlap_comm": True}}) for stage in (1, 2)),
    (3, "fp32", {ZERO: {"overlap_comm": False}}),
    *((stage, "fp32", {ZERO: {"contiguous_gradients": False}}) for stage in (1, 2, 3)),
    *((stage, "fp32", {ZERO: {"reduce_scatter": False}}) for stage in (1, 2, 3)),
    *((stage, "fp32", {ZERO: {"reduce_bucket_size": 1e4}}) for stage in (1, 2, 3)),
    *((stage, "fp32", {ZERO: {"allgather_partitions": False}}) for stage in (1, 2)),
    *((stage, "fp32", {ZERO: {"allgather_bucket_size": 1e4}}) for stage in (1, 2)),
    (1, "bf16", {ZERO: {"allgather_bucket_size": 1e4, "reduce_bucket_size": 1e4}}),
    (3, "fp32", {ZERO: {"sub_group_size": 1e4}}),
    (3, "fp32", {ZERO: {"stage3_prefetch_bucket_size": 0}}),
    (3, "fp32", {ZERO: {"stage3_param_persistence_threshold": 0}}),
    (3, "fp32", {ZERO: {"stage3_max_live_parameters": 0}}),
    (3, "fp32", {ZERO: {"stage3_max_reuse_distance": 0}}),
    *((stage, "bf16", {"communication_data_type": "fp32"}) for stage in (1, 2, 3)),
    *((stage, "bf16", {"communication_data_type": "fp16"}) for stage in (1, 2, 3)),
    (1, "bf16", {"bf16": {"immediate_grad_update": True, "check_grad_overflow": True}}),
    (2, "fp32", {"steps_per_print": 1, "wall_clock_breakdown": False}),
    (2, "fp32", {"timers": {"throughput": {"enabled": True}}}),
    (0, "fp32", {"communication_data_type": "fp32"}),
]
Run = Callable[..., Trained]


def together() -> list[tuple[int, str, dict[str, Any]]]:
    """All keys of each stage and precision in one configuration."""
    merged = dict[tuple[int, str], dict[str, Any]]()
    for stage, precision, config in KEYS:
        whole = merged.setdefault((stage, precision), {})
        for section, value in config.items():
            whole[section] = {**whole.get(section, {}), **value} if isinstance(value, dict) else value
    return [(stage, precision, config) for (stage, precision), config in merged.items()]


CASES = [*together(), *(pytest.param(*case, marks=pytest.mark.nightly) for case in KEYS)]


@pytest.fixture(scope="module")
def run(forked: RunRanks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train on two ranks with a DeepSpeed JSON: `run(stage, precision, {"key": value})`. Runs are kept."""
    directory, finished = tmp_path_factory.mktemp("keys"), dict[str, Trained]()

    def train(stage: int, precision: str, config: dict[str, Any], allow: tuple[str, ...] = ()) -> Trained:
        config = {**config, ZERO: {"stage": stage, **config.get(ZERO, {})}}
        text = json.dumps([precision, config])
        if text not in finished:
            name = f"run{len(finished)}"
            (directory / f"{name}.json").write_text(json.dumps(config))
            body = recipe_on(data, directory)
            body |= {"name": name, "schedule": {"steps": STEPS}, "evaluation": {"sequences": 2}}
            body["batch"] = {"global_batch_size": 4, "micro_batch_size": 1}
            body["engine"] = {
                "deepspeed": str(directory / f"{name}.json"),
                "precision": precision,
                "allow_untested": list(allow),
            }
            done = forked("--module", "codeparrot_ds.train", save_recipe(body, directory / f"{name}.yaml"), ranks=2)
            assert done.returncode == 0, done.output
            finished[text] = read_run(directory / name)
        return finished[text]

    return train


@pytest.mark.parametrize(("stage", "precision", "config"), CASES, ids=str)
def test_a_tested_key_does_not_change_the_result(run: Run, stage: int, precision: str, config: dict[str, Any]) -> None:
    usual, other = run(stage, precision, {}), run(stage, precision, config)
    assert other.digests() == usual.digests()
    tolerance = 1e-6 if precision == "fp32" else 2e-3
    for a, b in zip(other.losses(), usual.losses(), strict=True):
        assert float.fromhex(a) == pytest.approx(float.fromhex(b), rel=tolerance)
    assert other.valid_losses()[STEPS] == pytest.approx(usual.valid_losses()[STEPS], rel=tolerance)
    assert other.valid_losses()[STEPS] < usual.valid_losses()[0] - 0.05  # the weights have moved


def test_an_accepted_key_is_logged_and_recorded(run: Run) -> None:
    config = {"comms_logger": {"enabled": False}}
    trained = run(1, "fp32", config, allow=("comms_logger.enabled",))
    line = "DeepSpeed keys that are not tested with this package: comms_logger.enabled"
    assert trained.run.log(0).read_text().count(line) == 1
    assert "comms_logger.enabled" in trained.run.recipe.read_text()
    settings = trained.run.newest_checkpoint().settings
    assert settings is not None
    assert settings["engine.allow_untested"] == ["comms_logger.enabled"]
    assert settings["ds_config.comms_logger.enabled"] is False
