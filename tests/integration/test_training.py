"""Real training on two gloo ranks: each shipped DeepSpeed JSON, conversion, resume, reproducibility."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.checkpoint.zero import ZeroCheckpoint
from codeparrot_ds.errors import CheckpointError
from codeparrot_ds.export.convert import convert
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.shards.sequences import Dataset, batch_digest
from codeparrot_ds.system.files import exclusive_lock
from tests.conftest import LAUNCH_TIMEOUT, OPERATORS_TIMEOUT, ROOT, VOCAB_SIZE, RunRanks, Trained, save_recipe, train
from tests.integration.test_meaning import folded

pytestmark = pytest.mark.slow
Train = Callable[..., Trained]
Copy = Callable[[str], Trained]


def convert_run(trained: Trained, output: Path, **options: Any) -> dict[str, Any]:
    """Convert a run's newest checkpoint and compare its loss with the engine's; tests exceed the default cap."""
    return convert([source_checkpoint(trained.run.path)], output, memory_cap_bytes=8_000_000_000, **options)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_stage_trains_and_converts(train_tiny: Train, baseline: Trained, tmp_path: Path, stage: int) -> None:
    trained = baseline if stage == 3 else train_tiny(f"stage{stage}", stage=stage)
    losses = trained.valid_losses()
    assert abs(losses[0] - math.log(VOCAB_SIZE)) < 0.3
    assert losses[6] < losses[3] < losses[0]
    assert json.loads(trained.run.status_file.read_text())["state"] == "finished"
    trained.require_checkpoint_as_large_as_estimated(stage)

    output = tmp_path / "hf"
    certificate = convert_run(trained, output)
    assert certificate["tied"] == {"lm_head.weight": "transformer.wte.weight"}
    assert certificate["engine"] == {"loss_valid": losses[6], "sequences": 7, "not_compared": None}
    assert abs(certificate["forward"]["loss_written"] - losses[6]) < 1e-3


def test_a_converted_model_loads_without_a_warning(baseline: Trained, tmp_path: Path) -> None:
    output = tmp_path / "hf"
    convert_run(baseline, output)
    # In a separate process, so that no setting of this one suppresses a warning.
    code = (
        "import sys, transformers as t;"
        "m, info = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True);"
        "tok = t.AutoTokenizer.from_pretrained(sys.argv[1]);"
        "assert not any(info.values()), info;"
        "assert m.lm_head.weight.data_ptr() == m.transformer.wte.weight.data_ptr();"
        "assert tok.decode(tok('def f(x):\\n  return x  !').input_ids) == 'def f(x):\\n  return x  !'"
    )
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, str(output)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_trains_on_fp32_masters_and_converts(train_tiny: Train, tmp_path: Path, stage: int) -> None:
    trained = train_tiny(f"bf16-stage{stage}", stage=stage, options=["engine.precision=bf16"])
    trained.require_checkpoint_as_large_as_estimated(stage, "bf16")
    certificate = convert_run(trained, tmp_path / "hf")
    assert abs(certificate["forward"]["loss_written"] - trained.valid_losses()[6]) < 2e-2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    weight = model.transformer.h[0].mlp.c_fc.weight.detach()
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())  # the master weights, not their rounded values

    convert_run(trained, tmp_path / "bf16", dtype="bfloat16")
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert torch.equal(rounded.transformer.h[0].mlp.c_fc.weight, weight.bfloat16())


def test_one_file_and_several_hold_the_same(baseline: Trained, tmp_path: Path) -> None:
    convert_run(baseline, tmp_path / "whole")
    convert_run(baseline, tmp_path / "parts", max_shard_bytes=40_000)
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    parts = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    held = dict(ZeroCheckpoint(source_checkpoint(baseline.run.path)).tensors())
    assert set(held) | {"lm_head.weight"} == set(whole) == set(parts)
    for name, tensor in held.items():
        assert torch.equal(folded(name, tensor), whole[name]) and torch.equal(whole[name], parts[name])


def test_two_runs_with_one_seed_give_the_same_losses_and_another_seed_does_not(
    train_tiny: Train, baseline: Trained
) -> None:
    first, second = baseline, train_tiny("second")
    other = train_tiny("other", options=["seed=2"])
    assert first.losses() == second.losses()
    assert first.valid_losses() == second.valid_losses()
    assert first.losses() != other.losses()


def test_a_resumed_run_equals_an_uninterrupted_one(train_tiny: Train, baseline: Trained, copy_baseline: Copy) -> None:
    whole, halved = baseline, copy_baseline("halved")
    shutil.rmtree(halved.run.checkpoint(6))  # as if killed after its checkpoint at step 3
    resumed = train_tiny("halved")
    assert "resuming from" in (resumed.run.logs / "rank_00000.log").read_text()
    assert resumed.losses() == whole.losses()
    assert resumed.digests() == whole.digests()
    assert resumed.valid_losses() == whole.valid_losses()
    before, after = ([row for row in run.rows if row["kind"] == "train"] for run in (halved, resumed))
    assert [row["step"] for row in after] == list(range(6))
    assert before[:3] == after[:3]  # including seconds: these steps were not repeated
    assert all(a["step_seconds"] != b["step_seconds"] for a, b in zip(before[3:], after[3:], strict=True))


def test_another_seed_or_model_is_not_resumed(
    forked: RunRanks, copy_baseline: Copy, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    trained = copy_baseline("tiny")
    stored = trained.run.recipe.read_bytes()
    tiny_recipe |= {"seed": 5, "model": {**tiny_recipe["model"], "n_layer": 3}}
    done = forked("--module", "codeparrot_ds.train", save_recipe(tiny_recipe, tmp_path / "tiny.yaml"))
    assert done.returncode == 1
    assert done.output.count("error: ") == 1 and "Traceback" not in done.output
    assert "seed: saved with 1, now 5" in done.output and "model.n_layer: saved with 2, now 3" in done.output
    assert "shards" not in done.output  # which are the same
    assert trained.run.recipe.read_bytes() == stored
    assert trained.run.newest_checkpoint().step == 6


def test_every_world_size_has_the_same_data_and_losses(train_tiny: Train, baseline: Trained) -> None:
    two, one = baseline, train_tiny("one", ranks=1, options=["batch.micro_batch_size=2"])
    assert two.digests() == one.digests()
    # Every three optimizer steps, each of which is two forward passes on one rank, and one on two.
    saved = [[path.name for path in sorted((run.run.path / "checkpoints").glob("step-*"))] for run in (one, two)]
    assert saved == [["step-00000003", "step-00000006"]] * 2
    assert one.valid_losses().keys() == two.valid_losses().keys()
    for a, b in zip(two.losses(), one.losses(), strict=True):
        assert math.isclose(float.fromhex(a), float.fromhex(b), rel_tol=1e-4)


def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(train_tiny: Train, copy_baseline: Copy) -> None:
    trained = copy_baseline("damaged")
    file = trained.run.checkpoint(6) / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=file.name):
        source_checkpoint(trained.run.path).verify()
    again = train_tiny("damaged")
    assert again.losses() == trained.losses()
    log = (again.run.logs / "rank_00000.log").read_text()
    assert f"step-00000006: {file.name}: content differs from what was written" in log
    assert re.search("resuming from .*step-00000003", log)


def test_a_finished_run_whose_status_was_lost_is_marked_finished(train_tiny: Train, copy_baseline: Copy) -> None:
    """Killed between its last checkpoint and the status: a second call must fix the status."""
    trained = copy_baseline("status")
    finished = trained.run.read_status()
    trained.run.write_status("failed", error="lost")
    again = train_tiny("status")
    assert again.run.read_status() == finished
    assert finished["checkpoint"] == str(trained.run.checkpoint(6))
    assert again.rows == trained.rows


def test_two_launches_on_one_run_directory_are_refused(
    forked: RunRanks, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    run = RunDirectory(Path(tiny_recipe["runs"]) / "tiny")
    run.path.mkdir(parents=True)
    with exclusive_lock(run.path / ".lock", ""):
        done = forked("--module", "codeparrot_ds.train", save_recipe(tiny_recipe, tmp_path / "tiny.yaml"))
    assert done.returncode == 1
    assert "another process is training in this directory" in done.output
    assert "Traceback" not in done.output
    assert not run.status_file.exists()


@pytest.mark.parametrize(
    ("change", "how", "expected"),
    [
        ({"model": {"vocab_size": 1000}}, "forked", "Set model.vocab_size=512"),
        ({"modle": {}}, "deepspeed", "modle: unknown key"),
    ],
)
def test_bad_input_ends_every_rank_with_one_message(
    request: pytest.FixtureRequest,
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    change: dict[str, dict[str, Any]],
    how: str,
    expected: str,
) -> None:
    run_ranks: RunRanks = request.getfixturevalue(how)
    for section, keys in change.items():
        tiny_recipe[section] = tiny_recipe.get(section, {}) | keys
    done = run_ranks("--module", "codeparrot_ds.train", save_recipe(tiny_recipe, tmp_path / "bad.yaml"))
    assert done.returncode == 1
    assert done.output.count("error: ") == 1
    assert expected in done.output
    assert "Traceback" not in done.output


def test_a_launch_trains_as_forked_ranks_do(
    deepspeed: RunRanks, baseline: Trained, tiny_recipe: dict[str, Any]
) -> None:
    """A real `deepspeed` run, with runner, launcher and two ranks, behaves like forked ranks."""
    launched = train(deepspeed, {**tiny_recipe, "name": "launched"})
    assert launched.losses() == baseline.losses()
    assert launched.valid_losses() == baseline.valid_losses()
    assert launched.digests() == baseline.digests()
    newest, expected = launched.run.newest_checkpoint(), baseline.run.newest_checkpoint()
    assert {name: file["bytes"] for name, file in newest.files.items()} == {
        name: file["bytes"] for name, file in expected.files.items()
    }


def test_a_missing_hostfile_never_trains_locally(
    deepspeed: RunRanks, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = save_recipe(tiny_recipe, tmp_path / "tiny.yaml")
    options = ["--hostfile", str(tmp_path / "absent")]
    done = deepspeed("--module", "codeparrot_ds.train", recipe, options=options)
    assert done.returncode == 1
    assert f"{tmp_path / 'absent'}: no such hostfile" in done.output
    assert not Path(tiny_recipe["runs"]).exists()


@pytest.fixture
def offload_recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    """The tiny recipe with its optimizer on the CPU, which needs an operator that DeepSpeed compiles."""
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    (tmp_path / "offload.json").write_text(json.dumps(config))
    tiny_recipe["engine"]["deepspeed"] = str(tmp_path / "offload.json")
    return save_recipe(tiny_recipe, tmp_path / "tiny.yaml")


@pytest.mark.timeout(OPERATORS_TIMEOUT + LAUNCH_TIMEOUT)
@pytest.mark.usefixtures("operators")
def test_offload_trains_after_saying_that_it_builds_an_operator(
    forked: RunRanks, offload_recipe: Path, tiny_recipe: dict[str, Any]
) -> None:
    done = forked("--module", "codeparrot_ds.train", offload_recipe)
    assert done.returncode == 0, done.output
    assert "compiling DeepSpeed's cpu_adam operator" in done.output
    status = json.loads((Path(tiny_recipe["runs"]) / "tiny" / "status.json").read_text())
    assert status["loss_valid"] < math.log(VOCAB_SIZE) - 0.3


def test_offload_without_a_compiler_is_refused_by_name(forked: RunRanks, offload_recipe: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("env", "bash", "sh"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    path = f"{Path(sys.executable).parent}:{tools}"
    done = forked("--module", "codeparrot_ds.train", offload_recipe, env={"PATH": path})
    assert done.returncode == 1
    assert "cpu_adam" in done.output
    assert "apt-get install g++" in done.output


def test_a_blend_is_the_same_data_on_any_number_of_ranks(
    train_tiny: Train, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    first = Path(tiny_recipe["data"]["shards"])
    second = shutil.copytree(first, tmp_path / "second")
    tiny_recipe["data"]["shards"] = {str(first): 0.75, str(second): 0.25}
    two = train_tiny("two", ranks=2)
    one = train_tiny("one", ranks=1)
    assert len(two.digests()) == 6
    assert one.digests() == two.digests()
    recipe = load_recipe(two.run.recipe)
    assert recipe.data.sources == {first.resolve(): 0.75, second.resolve(): 0.25}
    data = Dataset.open(recipe.data.sources, recipe.model.seq_len)
    fed = data.order(recipe.seed).take(0, 24)
    assert int((fed < len(data.train.parts[0])).sum()) == 18
    assert int(two.digests()[0], 16) == batch_digest(data.train.batch(fed[:4]))
