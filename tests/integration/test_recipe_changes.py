"""A recipe changed between stop and resume: each key applies at once or is refused, and the run says which."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.checkpoint.zero import MOMENTS, ZeroCheckpoint
from codeparrot_ds.export.convert import convert
from codeparrot_ds.run.directory import RunDirectory
from tests.conftest import (
    LAUNCH_TIMEOUT,
    OPERATORS_TIMEOUT,
    ROOT,
    Launched,
    RunRanks,
    Trained,
    read_run,
    save_recipe,
    set_options,
)

pytestmark = pytest.mark.slow
RATE = 0.01
Train = Callable[..., Launched]


def ds_config(directory: Path, **zero: Any) -> Path:
    """A DeepSpeed JSON with this `zero_optimization` section."""
    path = directory / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return path


@pytest.fixture
def train(forked: RunRanks, tiny_recipe: dict[str, Any], tmp_path: Path) -> Train:
    """Train the tiny recipe with a constant learning rate: `train(steps, "key=value", ranks=2, stage=1)`."""

    def run(steps: int, *options: str, ranks: int = 2, **zero: Any) -> Launched:
        tiny_recipe["schedule"] = {"name": "constant", "steps": steps}
        tiny_recipe["engine"]["deepspeed"] = str(ds_config(tmp_path, **{"stage": 1, **zero}))
        recipe = save_recipe(tiny_recipe, tmp_path / "tiny.yaml")
        overrides = set_options(options)
        return forked("--module", "codeparrot_ds.train", recipe, *overrides, ranks=ranks)

    return run


def recorded(run: RunDirectory) -> list[dict[str, Any]]:
    """The changes that a run has recorded, oldest first."""
    return [json.loads(line) for line in run.recipe_changes.read_text().splitlines()]


OPTIMIZERS: list[tuple[dict[str, Any], str]] = [
    ({"stage": 0}, "fp32"),
    ({"stage": 1}, "fp32"),
    ({"stage": 1}, "bf16"),
    ({"stage": 2}, "fp32"),
    ({"stage": 3}, "bf16"),
    ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "fp32"),
]


def optimizers() -> list[Any]:
    """Cases of (zero_optimization, precision, ranks after the resume); the second number of ranks mostly at night."""
    found = []
    for zero, precision in OPTIMIZERS:
        time_limit = [pytest.mark.timeout(OPERATORS_TIMEOUT + LAUNCH_TIMEOUT)] if "offload_optimizer" in zero else []
        rare = [] if (zero["stage"], precision) in ((1, "bf16"), (3, "bf16")) else [pytest.mark.nightly]
        found.append(pytest.param(zero, precision, 2, marks=time_limit))
        found.append(pytest.param(zero, precision, 1, marks=[*time_limit, *rare]))
    return found


@pytest.mark.parametrize(("zero", "precision", "ranks"), optimizers(), ids=str)
def test_the_optimizer_follows_the_recipe_at_the_next_step(
    train: Train, tmp_path: Path, zero: dict[str, Any], precision: str, ranks: int, request: pytest.FixtureRequest
) -> None:
    """With betas of 0 the moments are the gradient and its square. With an eps of 1e9 AdamW only decays the weights."""
    if "offload_optimizer" in zero:
        request.getfixturevalue("operators")
    assert train(3, f"engine.precision={precision}", **zero).returncode == 0
    run = RunDirectory(tmp_path / "runs" / "tiny")
    changed = ("weight_decay=10", "eps=1e9", "betas=[0.0,0.0]", "gradient_clipping=0.001")
    done = train(
        4, f"engine.precision={precision}", *(f"optimizer.{change}" for change in changed), ranks=ranks, **zero
    )
    assert done.returncode == 0, done.output

    old, new = (ZeroCheckpoint(source_checkpoint(run.checkpoint(step))) for step in (3, 4))
    squares = 0.0
    for name, shape in old.shapes.items():
        gradient, square = (new.read(name, what) for what in MOMENTS)
        assert torch.allclose(square, gradient**2, rtol=1e-5, atol=1e-20), name
        squares += float((gradient.double() ** 2).sum())
        left = 1 - RATE * 10 if len(shape) >= 2 else 1.0  # no decay of biases and layer norms
        assert torch.allclose(new.read(name), left * old.read(name), rtol=1e-6, atol=1e-9), name
    assert squares**0.5 == pytest.approx(0.001, rel=5e-3)  # the gradients were clipped to the new norm

    stored = yaml.safe_load(run.recipe.read_text())["optimizer"]
    assert (stored["weight_decay"], stored["eps"], stored["betas"]) == (10, 1e9, [0, 0])
    (entry,) = recorded(run)
    assert entry["step"] == 3
    assert entry["changes"] == {
        "optimizer.betas": [[0.9, 0.999], [0.0, 0.0]],
        "optimizer.eps": [1e-8, 1e9],
        "optimizer.gradient_clipping": [1.0, 0.001],
        "optimizer.weight_decay": [0.1, 10.0],
        "schedule.steps": [3, 4],
    }
    line = "recipe changed since step 3: optimizer.betas [0.9, 0.999] -> [0.0, 0.0]; optimizer.eps 1e-08 -> 1"
    assert done.output.count(line) == 1


def test_an_unchanged_recipe_records_no_change(train: Train, tmp_path: Path) -> None:
    assert train(6).returncode == 0
    run = RunDirectory(tmp_path / "runs" / "tiny")
    whole = read_run(run.path).losses()
    shutil.rmtree(run.checkpoint(6))
    done = train(6)
    assert done.returncode == 0
    assert "recipe changed" not in done.output
    assert not run.recipe_changes.exists()
    assert read_run(run.path).losses() == whole


@pytest.mark.parametrize("ranks", [2, 1], ids=["same layout", "other ranks"])
def test_the_other_keys_apply_at_the_next_step(train: Train, tmp_path: Path, ranks: int) -> None:
    assert train(3).returncode == 0
    run = RunDirectory(tmp_path / "runs" / "tiny")
    done = train(
        6,
        *("schedule.name=linear", "schedule.warmup_steps=2", "schedule.min_ratio=0.5", "optimizer.learning_rate=0.02"),
        *("batch.micro_batch_size=1", "model.activation_checkpointing=none", "engine.loss_chunk_tokens=50"),
        *("evaluation.every_steps=1", "evaluation.sequences=3", "evaluation.samples=1", "evaluation.sample_tokens=2"),
        *("checkpoints.every_steps=2", "checkpoints.keep_last=1", "checkpoints.keep_every_steps=4"),
        *("checkpoints.background=false", "logging.every_steps=1", "logging.tensorboard=true"),
        *("logging.peak_tflops=0.001", "guards.hang_seconds=900", "guards.spike=stop", "guards.spike_threshold=9"),
        *("guards.max_skipped_steps=3", "guards.replica_check_steps=1"),
        ranks=ranks,
    )
    assert done.returncode == 0, done.output
    trained = read_run(run.path)
    rows = {row["step"]: row for row in trained.rows if row["kind"] == "train"}
    # Linear from 0.02 at step 2, where the warm-up ends, to 0.01 at step 6.
    assert [rows[step]["learning_rate"] for step in (2, 3, 4, 5)] == pytest.approx([RATE, 0.0175, 0.015, 0.0125])
    assert [step for step in trained.valid_losses() if step > 3] == [4, 5, 6]
    assert [path.name[-1] for path in run.checkpoint_directories()] == ["4", "6"]
    assert "sample 0:" in done.output
    assert list(run.tensorboard.glob("events*"))
    assert "mfu" in rows[3] and rows[2].get("mfu") is None
    # What only names a limit or a layout is in the record; the data and the numbers are the same.
    assert set(recorded(run)[0]["changes"]) >= {"guards.spike", "guards.hang_seconds", "batch.micro_batch_size"}
    assert len(set(trained.digests())) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=2", "seed: saved with 1, now 2"),
        ("model.dropout=0.1", "model.dropout: saved with 0.0, now 0.1"),
        ("model.init_from=/some/model", "model.init_from: saved with None, now /some/model"),
        ("model.scale_attn_by_inverse_layer_idx=false", "model.scale_attn_by_inverse_layer_idx: saved with True, now "),
        ("batch.global_batch_size=8", "batch.global_batch_size: saved with 4, now 8"),
    ],
)
def test_a_fixed_key_is_refused_by_name_and_nothing_is_written(
    train: Train, tmp_path: Path, change: str, message: str
) -> None:
    assert train(3).returncode == 0
    run = RunDirectory(tmp_path / "runs" / "tiny")
    before = (run.recipe.read_bytes(), run.ds_config.read_bytes())
    for ranks in (2, 1):
        done = train(4, change, "optimizer.weight_decay=0", ranks=ranks)
        assert done.returncode == 1
        assert message in done.output and "--set name=" in done.output
        assert (run.recipe.read_bytes(), run.ds_config.read_bytes()) == before
        assert not run.recipe_changes.exists()


def test_a_finished_run_keeps_its_recipe(train: Train, tmp_path: Path) -> None:
    assert train(3).returncode == 0
    run = RunDirectory(tmp_path / "runs" / "tiny")
    before = run.recipe.read_bytes()
    done = train(3, "optimizer.weight_decay=0")
    assert done.returncode == 0
    assert "These changes of the recipe have no effect: optimizer.weight_decay 0.1 -> 0.0" in done.output
    assert run.recipe.read_bytes() == before


def test_a_start_that_fails_later_leaves_the_recipe_of_what_ran(
    train: Train, forked: RunRanks, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    assert train(3).returncode == 0
    run = RunDirectory(tmp_path / "runs" / "tiny")
    before = run.recipe.read_bytes()
    (tmp_path / "full.py").write_text(
        "import sys\nfrom codeparrot_ds import train\nfrom codeparrot_ds.errors import ConfigError\n"
        "def check_space(*arguments):\n    raise ConfigError('the disk is full')\n"
        "train.check_space = check_space\ntrain.end(train.main(sys.argv[1:]))\n"
    )
    tiny_recipe["optimizer"]["weight_decay"] = 0.0
    tiny_recipe["schedule"]["steps"] = 6
    done = forked(tmp_path / "full.py", save_recipe(tiny_recipe, tmp_path / "tiny.yaml"), ranks=2)
    assert done.returncode == 1 and "the disk is full" in done.output
    assert run.recipe.read_bytes() == before
    assert not run.recipe_changes.exists()


@pytest.mark.parametrize(
    ("on_rank_1", "message"),
    [
        ("optimizer.weight_decay=0.0", "optimizer.weight_decay: 0.1 on rank 0"),
        ("schedule.steps=5", "schedule.steps: 6 on rank 0"),
        ("engine.deepspeed=OTHER", "ds_config.zero_optimization.reduce_bucket_size: 100000 on rank 0"),
    ],
)
def test_ranks_with_different_files_are_refused(
    forked: RunRanks, tiny_recipe: dict[str, Any], tmp_path: Path, on_rank_1: str, message: str
) -> None:
    tiny_recipe["engine"]["deepspeed"] = str(tmp_path / "one" / "ds.json")
    for name, size in (("one", 100_000), ("other", 200_000)):
        (tmp_path / name).mkdir()
        ds_config(tmp_path / name, stage=1, reduce_bucket_size=size)
    change = on_rank_1.replace("OTHER", str(tmp_path / "other" / "ds.json"))
    (tmp_path / "differ.py").write_text(
        "import os, sys\nfrom codeparrot_ds import train\n"
        f"more = ['--set', {change!r}] if os.environ['RANK'] == '1' else []\n"
        "train.end(train.main([*sys.argv[1:], *more]))\n"
    )
    done = forked(tmp_path / "differ.py", save_recipe(tiny_recipe, tmp_path / "tiny.yaml"), ranks=2)
    assert done.returncode == 1, done.output
    assert message in done.output and "on rank 1 (" in done.output
    assert not (tmp_path / "runs" / "tiny" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"stage": 3, "sub_group_size": 10**9}, {"stage": 3, "sub_group_size": 10_000}),
        ({"stage": 3, "sub_group_size": 10_000}, {"stage": 3, "sub_group_size": 15_000}),
        ({"stage": 2, "reduce_bucket_size": 10_000}, {"stage": 2, "reduce_bucket_size": 500_000}),
        ({"stage": 1}, {"stage": 2}),
    ],
    ids=str,
)
def test_another_deepspeed_json_resumes_with_the_same_state(
    train: Train, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """With a learning rate of almost 0, the weights after a step are those before it."""
    assert train(3, **before).returncode == 0
    run = RunDirectory(tmp_path / "runs" / "tiny")
    done = train(4, "optimizer.learning_rate=1e-30", **after)
    assert done.returncode == 0, done.output
    old, new = (ZeroCheckpoint(source_checkpoint(run.checkpoint(step))) for step in (3, 4))
    for name in old.shapes:
        assert torch.equal(new.read(name), old.read(name)), name
    changed = recorded(run)[0]["changes"]
    key = next(key for key in after if after[key] != before.get(key))
    assert changed[f"ds_config.zero_optimization.{key}"] == [before.get(key), after[key]]


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_another_precision_resumes_with_the_same_master_weights(
    train: Train, tmp_path: Path, before: str, after: str
) -> None:
    assert train(3, f"engine.precision={before}").returncode == 0
    run = RunDirectory(tmp_path / "runs" / "tiny")
    done = train(4, f"engine.precision={after}", "optimizer.learning_rate=1e-30")
    assert done.returncode == 0, done.output
    old, new = (ZeroCheckpoint(source_checkpoint(run.checkpoint(step))) for step in (3, 4))
    for name in old.shapes:
        assert torch.equal(new.read(name), old.read(name)), name
    assert recorded(run)[0]["changes"]["engine.precision"] == [before, after]
    assert run.newest_checkpoint().precision == after


def test_a_checkpoint_is_converted_with_the_evaluation_that_it_had(train: Train, tmp_path: Path) -> None:
    """Its loss is over 7 sequences, although the recipe of the steps after it says 2."""
    assert train(3).returncode == 0
    run = RunDirectory(tmp_path / "runs" / "tiny")
    assert train(6, "evaluation.sequences=2").returncode == 0
    found = {}
    for step in (3, 6):
        out = tmp_path / f"hf-{step}"
        convert([source_checkpoint(run.checkpoint(step))], out, memory_cap_bytes=8_000_000_000)
        engine = json.loads((out / "certificate.json").read_text())["engine"]
        found[step] = (engine["sequences"], engine["not_compared"])
    assert found == {3: (7, None), 6: (2, None)}


@pytest.mark.parametrize("ranks", [2, 1], ids=["same layout", "other ranks"])
def test_a_constant_loss_scale_replaces_the_search(
    forked: RunRanks, tiny_recipe: dict[str, Any], tmp_path: Path, ranks: int
) -> None:
    def scaler(steps: int, on: int, **fp16: Any) -> Any:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": fp16}))
        tiny_recipe["engine"] = {"deepspeed": str(path), "precision": "fp16"}
        tiny_recipe["schedule"] = {"name": "constant", "steps": steps}
        recipe = save_recipe(tiny_recipe, tmp_path / "tiny.yaml")
        done = forked(ROOT / "tests" / "integration" / "probe_fp16.py", recipe, ranks=on)
        assert done.returncode == 0, done.output
        return ZeroCheckpoint(source_checkpoint(tmp_path / "runs" / "tiny")).loss_scaler()

    searching = scaler(3, 2, initial_scale_power=8)
    assert searching.dynamic and searching.cur_scale == 2**8
    constant = scaler(4, ranks, loss_scale=64)
    assert not constant.dynamic and constant.cur_scale == 64


def test_an_older_checkpoint_is_compared_with_the_stored_recipe(copy_baseline: Callable[[str], Trained]) -> None:
    """Checkpoints of older versions have no settings, and `model` as one entry of the identity."""
    from codeparrot_ds.run.changes import changes
    from codeparrot_ds.training.settings import settings_of

    run = copy_baseline("old").run
    manifest = run.checkpoint(6) / "manifest.json"
    body = json.loads(manifest.read_text())
    known = body.pop("settings")
    manifest.write_text(json.dumps(body))
    checkpoint = source_checkpoint(run.checkpoint(6))
    assert checkpoint.settings is None
    assert changes(known, settings_of(checkpoint)) == {}
    run.recipe.unlink()
    assert settings_of(checkpoint) == {}


def test_a_moved_run_goes_on_where_it_is(
    forked: RunRanks, copy_baseline: Callable[[str], Trained], baseline: Trained, tmp_path: Path
) -> None:
    """From its own recipe, in any working directory; the run that it was copied from is not touched."""
    before = {path: path.stat().st_mtime_ns for path in baseline.run.path.rglob("*")}
    copied = copy_baseline("first").run.path
    moved = tmp_path / "moved" / "second"
    moved.parent.mkdir()
    copied.rename(moved)
    options = ("--set", "schedule.steps=8", "--set", "evaluation.sequences=3")
    done = forked("--module", "codeparrot_ds.train", "second/recipe.yaml", *options, cwd=moved.parent)
    assert done.returncode == 0, done.output
    run = read_run(moved)
    assert len(run.losses()) == 8
    assert run.run.read_status()["checkpoint"] == str(run.run.checkpoint(8))
    assert json.loads(run.run.status_file.read_text())["checkpoint"] == "checkpoints/step-00000008"
    assert {path: path.stat().st_mtime_ns for path in baseline.run.path.rglob("*")} == before
    assert not copied.exists()
    convert([source_checkpoint(moved)], tmp_path / "hf", sequences=0)
