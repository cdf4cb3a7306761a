"""State of the engine before the first step, at several ZeRO stages, world sizes and precisions."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.checkpoint.zero import ZeroCheckpoint
from codeparrot_ds.system.files import digest_bytes
from tests.conftest import ROOT, SEQ_LEN, VOCAB_SIZE, RunRanks, save_recipe

PROBE = Path(__file__).with_name("probe_step0.py")
Layout = tuple[int, int, str]  # ZeRO stage, ranks, precision
FP32 = [(0, 1, "fp32"), (0, 2, "fp32"), (1, 2, "fp32"), (2, 3, "fp32"), (3, 1, "fp32"), (3, 2, "fp32"), (3, 3, "fp32")]
BF16 = [(1, 2, "bf16"), (2, 2, "bf16"), (3, 2, "bf16")]
LAYOUTS = FP32 + BF16
Probed = dict[Layout, dict[str, Any]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def probed(data: Path, forked: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Probed:
    """Results of `probe_step0.py`, by layout."""
    directory = tmp_path_factory.mktemp("step0")
    body = {
        "name": "probe",
        "runs": str(directory / "runs"),
        # 34 is not a multiple of 3: on three ranks every partition has padding.
        "model": {"vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN, "n_layer": 2, "n_head": 2, "n_embd": 34},
        "data": {"shards": str(data / "shards")},
        "batch": {"global_batch_size": 6},
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"steps": 2},
        "engine": {"deepspeed": str(ROOT / "ds_configs" / "zero3.json")},
    }
    recipe = save_recipe(body, directory / "probe.yaml")
    found = {}
    for stage, ranks, precision in LAYOUTS:
        out = directory / f"{precision}-{stage}-{ranks}.json"
        done = forked(PROBE, recipe, out, str(stage), precision, ranks=ranks)
        assert done.returncode == 0, done.output
        found[stage, ranks, precision] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_at_step_0_are_the_same_at_every_stage_and_world_size(probed: Probed, layout: Layout) -> None:
    reference = FP32[0] if layout in FP32 else BF16[0]
    assert probed[layout]["weights"] == probed[reference]["weights"]
    assert len(set(probed[layout]["weights"].values())) > 10  # not all empty, not all zero


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_at_step_0_is_that_of_a_uniform_guess(probed: Probed, layout: Layout) -> None:
    assert abs(probed[layout]["loss"] - math.log(VOCAB_SIZE)) < 0.3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_decay_reaches_matrices_and_embeddings_only(probed: Probed, layout: Layout) -> None:
    found = probed[layout]
    decayed = {name for group in found["groups"] if group["weight_decay"] > 0 for name in group["parameters"]}
    plain = {name for group in found["groups"] if group["weight_decay"] == 0 for name in group["parameters"]}
    assert decayed | plain == set(found["weights"])
    assert plain == {name for name in found["weights"] if name.endswith(".bias") or ".ln_" in name}
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight"} <= decayed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_accumulate_in_fp32(probed: Probed, layout: Layout) -> None:
    assert probed[layout]["accumulated"] == "torch.float32"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_conversion_reads_is_what_the_engine_holds(probed: Probed, layout: Layout) -> None:
    """Every partition, padding and group order matches the parameters gathered by DeepSpeed itself."""
    found = probed[layout]
    read = ZeroCheckpoint(source_checkpoint(Path(found["run"]), step=0))
    digests = {name: digest_bytes(value.contiguous().numpy().data) for name, value in read.tensors()}
    assert digests == found["weights"]
    assert read.tied == {"lm_head.weight": "transformer.wte.weight"}
