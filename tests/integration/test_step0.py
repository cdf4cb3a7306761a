"""What the engine holds before the first step, at several ZeRO stages and world sizes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import VOCAB_SIZE, Deepspeed, save_recipe

PROBE = Path(__file__).with_name("probe_step0.py")
LAYOUTS = [(0, 1), (0, 2), (1, 2), (2, 2), (3, 1), (3, 2)]  # (ZeRO stage, ranks)


@pytest.fixture(scope="module")
def probed(
    data: Path, deepspeed: Deepspeed, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, int], dict[str, Any]]:
    """What `probe_step0.py` found, by layout."""
    from tests.conftest import ROOT, SEQ_LEN

    directory = tmp_path_factory.mktemp("step0")
    body = {
        "name": "probe",
        "model": {"vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN, "n_layer": 2, "n_head": 2, "n_embd": 32},
        "data": {"shards": str(data / "shards")},
        "batch": {"global_batch_size": 4},
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"steps": 2},
        "engine": {"deepspeed": str(ROOT / "ds_configs" / "zero3.json"), "precision": "fp32"},
    }
    recipe = save_recipe(body, directory / "probe.yaml")
    found = {}
    for stage, ranks in LAYOUTS:
        out = directory / f"{stage}-{ranks}.json"
        done = deepspeed(PROBE, recipe, out, str(stage), ranks=ranks)
        assert done.returncode == 0, done.output
        found[stage, ranks] = json.loads(out.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_at_step_0_are_the_same_at_every_stage_and_world_size(
    probed: dict[tuple[int, int], dict[str, Any]], layout: tuple[int, int]
) -> None:
    assert probed[layout]["weights"] == probed[0, 1]["weights"]
    assert len(set(probed[layout]["weights"].values())) > 10  # not all empty, not all zero


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_at_step_0_is_that_of_a_uniform_guess(
    probed: dict[tuple[int, int], dict[str, Any]], layout: tuple[int, int]
) -> None:
    assert abs(probed[layout]["loss"] - math.log(VOCAB_SIZE)) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_decay_reaches_matrices_and_embeddings_only(
    probed: dict[tuple[int, int], dict[str, Any]], layout: tuple[int, int]
) -> None:
    found = probed[layout]
    decayed = {name for group in found["groups"] if group["weight_decay"] > 0 for name in group["parameters"]}
    plain = {name for group in found["groups"] if group["weight_decay"] == 0 for name in group["parameters"]}
    assert decayed | plain == set(found["weights"])
    assert plain == {name for name in found["weights"] if name.endswith(".bias") or ".ln_" in name}
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight"} <= decayed
    assert found["accumulated"] == "torch.float32"
