"""The step of a GPU, shown on CPU ranks: what it reads on the host, and how often it goes through memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, RunRanks, recipe_on, save_recipe

pytestmark = pytest.mark.slow
PROBE = ROOT / "tests" / "integration" / "probe_step.py"
MOST_BYTES_A_PARAMETER = 55
# Stages 2 and 3 are DeepSpeed's own: it reads the norm, to decide whether to clip and whether to skip the step.
MOST_READS_A_STEP = {1: 0, 2: 4, 3: 4}


@pytest.fixture
def probe(forked: RunRanks, data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What a step of a tiny model does under bf16, at a stage, as it is or with a part made slow."""

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
    assert found["a_step"] <= MOST_READS_A_STEP[stage], found["names"]


def test_zero_1_goes_through_memory_half_as_often_as_deepspeed_does(probe: Callable[..., dict[str, Any]]) -> None:
    assert probe(1)["bytes_a_parameter"] <= MOST_BYTES_A_PARAMETER


@pytest.mark.parametrize("broken", ["clip", "reduce", "zero", "add"])
def test_a_pass_more_is_seen(probe: Callable[..., dict[str, Any]], broken: str) -> None:
    assert probe(1, broken)["bytes_a_parameter"] > MOST_BYTES_A_PARAMETER


def test_a_read_of_each_micro_batch_or_step_is_seen(probe: Callable[..., dict[str, Any]]) -> None:
    found = probe(1, "read")
    assert found["a_micro_batch"] == 1
    assert found["a_step"] == 1
