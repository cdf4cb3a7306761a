"""The GPU step, checked on CPU ranks: its host reads and its memory traffic."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, RunRanks, recipe_on, save_recipe

pytestmark = pytest.mark.slow
PROBE = ROOT / "tests" / "integration" / "probe_step.py"
MAX_BYTES_A_PARAMETER = 55
# Stages 2 and 3 use DeepSpeed's step, which reads the norm to decide whether to clip and whether to skip.
MAX_READS_A_STEP = {1: 0, 2: 4, 3: 4}


@pytest.fixture
def probe(forked: RunRanks, data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Counts of a step of a tiny model under bf16 at a stage, unchanged or with one part made slow."""

    def run(stage: int, *broken: str) -> dict[str, Any]:
        body = recipe_on(data, tmp_path)
        body["engine"] |= {"deepspeed": str(ROOT / "ds_configs" / f"zero{stage}.json"), "precision": "bf16"}
        body["batch"] = {"global_batch_size": 4, "micro_batch_size": 2}
        out = tmp_path / "found.json"
        done = forked(PROBE, save_recipe(body, tmp_path / "recipe.yaml"), out, *broken, ranks=1)
        assert done.returncode == 0, done.output
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_host_reads_nothing_for_a_micro_batch(probe: Callable[..., dict[str, Any]], stage: int) -> None:
    found = probe(stage)
    assert found["a_micro_batch"] == 0, found["names"]
    assert found["a_step"] <= MAX_READS_A_STEP[stage], found["names"]


def test_zero_1_goes_through_memory_half_as_often_as_deepspeed_does(probe: Callable[..., dict[str, Any]]) -> None:
    assert probe(1)["bytes_a_parameter"] <= MAX_BYTES_A_PARAMETER


@pytest.mark.parametrize("broken", ["clip", "reduce", "zero", "add"])
def test_an_additional_pass_over_memory_is_detected(probe: Callable[..., dict[str, Any]], broken: str) -> None:
    assert probe(1, broken)["bytes_a_parameter"] > MAX_BYTES_A_PARAMETER


def test_a_host_read_in_each_micro_batch_or_step_is_detected(probe: Callable[..., dict[str, Any]]) -> None:
    found = probe(1, "read")
    assert found["a_micro_batch"] == 1
    assert found["a_step"] == 1


@pytest.fixture
def zero1(forked: RunRanks, data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Six clipped steps of ZeRO-1 under bf16 on two ranks, with one of the optimizers."""

    def run(way: str, micro_batch: int = 2, clipping: float = 0.3, **ds_keys: str) -> dict[str, Any]:
        body = recipe_on(data, tmp_path)
        ds_config = tmp_path / "zero1.json"
        ds_config.write_text(json.dumps(json.loads((ROOT / "ds_configs" / "zero1.json").read_text()) | ds_keys))
        body["engine"] |= {"deepspeed": str(ds_config), "precision": "bf16"}
        body["batch"] = {"global_batch_size": 16, "micro_batch_size": micro_batch}
        body["optimizer"] = {"learning_rate": 1e-3, "weight_decay": 0.1, "gradient_clipping": clipping}
        out = tmp_path / "found.json"
        done = forked(
            ROOT / "tests" / "integration" / "probe_zero1.py", save_recipe(body, tmp_path / "r.yaml"), out, way
        )
        assert done.returncode == 0, done.output
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run


def test_our_step_is_deepspeeds(zero1: Callable[..., dict[str, Any]]) -> None:
    ours, deepspeeds = zero1("ours"), zero1("deepspeed")
    assert max(deepspeeds["norms"]) > 0.3  # clipped
    assert ours["norms"] == pytest.approx(deepspeeds["norms"], rel=2e-3)
    assert ours["mean_loss"] == pytest.approx(deepspeeds["mean_loss"], rel=1e-5)
    assert ours["weights"] == pytest.approx(deepspeeds["weights"], rel=1e-5)


def test_bf16_accumulates_as_one_large_micro_batch_would(zero1: Callable[..., dict[str, Any]]) -> None:
    small, large = zero1("ours", micro_batch=2), zero1("ours", micro_batch=8)
    assert small["norms"] == pytest.approx(large["norms"], rel=2e-2)
    assert small["mean_loss"] == pytest.approx(large["mean_loss"], rel=1e-3)


def test_a_parameter_without_a_gradient_does_not_get_the_last_ones(zero1: Callable[..., dict[str, Any]]) -> None:
    found = zero1("missing")
    assert found["largest_of_the_missing"] == 0
    assert found["largest_of_the_next"] > 0


def test_gradients_are_averaged_in_the_type_that_the_json_names(zero1: Callable[..., dict[str, Any]]) -> None:
    rounded, exact = zero1("ours"), zero1("ours", communication_data_type="fp32")
    assert exact["norms"] != rounded["norms"]
    assert exact["norms"] == pytest.approx(rounded["norms"], rel=1e-2)
