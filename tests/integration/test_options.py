"""Less common recipe options on real ranks: fp16, starting from given weights, samples, retention."""

import importlib.metadata
import json
import math
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.checkpoint.zero import ZeroCheckpoint
from codeparrot_ds.export.convert import convert
from codeparrot_ds.run.events import read_lines
from tests.conftest import ROOT, RunRanks, Trained, read_run, save_recipe

pytestmark = pytest.mark.slow
Train = Callable[..., Trained]


def test_fp16_finds_its_loss_scale_and_keeps_it_on_another_stage(
    forked: RunRanks, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """A scale of 2^40 overflows: steps are skipped until it fits, and a resumed run does not search again."""

    def train(stage: int, steps: int) -> Trained:
        config = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
        config["fp16"] |= {"initial_scale_power": 40, "hysteresis": 1}
        (tmp_path / "fp16.json").write_text(json.dumps(config))
        tiny_recipe["engine"] = {"deepspeed": str(tmp_path / "fp16.json"), "precision": "fp16"}
        tiny_recipe["schedule"] = {"steps": steps, "name": "constant"}
        tiny_recipe["guards"] = {"max_skipped_steps": 60}
        recipe = save_recipe(tiny_recipe, tmp_path / "tiny.yaml")
        done = forked(ROOT / "tests" / "integration" / "probe_fp16.py", recipe)
        assert done.returncode == 0, done.output
        return read_run(tmp_path / "runs" / "tiny")

    first = train(stage=1, steps=45)
    rows = [row for row in first.rows if row["kind"] == "train"]
    skipped = rows[-1]["skipped_steps"]
    assert 10 < skipped < 40
    tokens_per_step = tiny_recipe["batch"]["global_batch_size"] * tiny_recipe["model"]["seq_len"]
    assert rows[-1]["tokens_seen"] == (45 - skipped) * tokens_per_step
    assert rows[-1]["samples_seen"] == 45 * tiny_recipe["batch"]["global_batch_size"]
    saved = ZeroCheckpoint(source_checkpoint(first.run.path))
    assert saved.step == 45 - skipped
    assert not first.run.incidents.exists()  # the search for the scale is not an incident

    second = train(stage=3, steps=50)
    rows = [row for row in second.rows if row["kind"] == "train"]
    # One more step may be skipped as the scale grows; starting over would skip as many again.
    assert skipped <= rows[-1]["skipped_steps"] <= skipped + 1
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    again = ZeroCheckpoint(source_checkpoint(second.run.path))
    assert again.step == 50 - rows[-1]["skipped_steps"]
    scale = saved.loss_scaler().cur_scale
    assert again.loss_scaler().cur_scale in (scale, scale / 2) and scale < 2**40


def test_unsupported_fp16_is_one_message(forked: RunRanks, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    tiny_recipe["engine"]["precision"] = "fp16"
    done = forked("--module", "codeparrot_ds.train", save_recipe(tiny_recipe, tmp_path / "tiny.yaml"))
    if done.returncode == 0:
        pytest.skip("this CPU computes in fp16")
    assert done.returncode == 1
    assert done.output.count("error: engine.precision: fp16 is not supported on cpu devices") == 1
    assert "Traceback" not in done.output


def test_a_run_starts_from_other_weights(train_tiny: Train, baseline: Trained, tmp_path: Path) -> None:
    convert([source_checkpoint(baseline.run.path)], tmp_path / "hf", memory_cap_bytes=8_000_000_000)
    options = [f"model.init_from={tmp_path / 'hf'}", "schedule.steps=3"]
    for stage in (1, 3):
        warm = train_tiny(f"warm{stage}", stage=stage, options=options)
        assert warm.valid_losses()[0] == pytest.approx(baseline.valid_losses()[6], rel=1e-6)
    (tmp_path / "hf").rename(tmp_path / "gone")  # a resumed run does not need it
    train_tiny("warm3", options=[*options, "schedule.steps=6"])


def test_samples_retention_schedule_and_records(train_tiny: Train, baseline: Trained) -> None:
    tokens_per_step = 4 * 32
    trained = train_tiny(
        "options",
        env={"WANDB_MODE": "offline"},
        options=[
            *("evaluation.samples=2", "evaluation.sample_tokens=5", "logging.tensorboard=true", "logging.wandb=true"),
            *("checkpoints.keep_every_steps=4", "checkpoints.keep_last=1", "checkpoints.every_minutes=1e-6"),
            *("schedule.name=wsd", f"schedule.tokens={6 * tokens_per_step}", "schedule.steps=null"),
            *(f"schedule.decay_tokens={2 * tokens_per_step}", "model.activation_checkpointing=selective"),
            *("engine.loss_chunk_tokens=50", "logging.peak_tflops=0.001"),
        ],
    )
    # Different activation checkpointing and loss chunks compute the same numbers.
    assert trained.digests() == baseline.digests()
    first, second = (float.fromhex(run.losses()[0]) for run in (trained, baseline))
    assert math.isclose(first, second, rel_tol=1e-6)
    rows = [row for row in trained.rows if row["kind"] == "train"]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01] * 5 + [0.005])
    for row in rows:
        assert 0 < row["data_seconds"] < row["step_seconds"]
        parameters = trained.run.read_status()["parameters"]
        flops = 6 * (parameters - 32 * 32) + 12 * 2 * 32 * 32
        assert row["mfu"] == pytest.approx(flops * row["tokens_per_second"] / (2 * 1e9))
        assert 50e6 < row["peak_memory_bytes"] < 4e9

    # Saved after every step, as the interval has always passed; every fourth and the last are kept.
    assert [path.name[-1] for path in trained.run.checkpoint_directories()] == ["4", "6"]

    board = EventAccumulator(str(trained.run.tensorboard), size_guidance={"tensors": 0})
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "train/mfu", "valid/loss_valid", "final/loss_valid"} <= set(tags["scalars"])
    assert {"sample/0/text_summary", "sample/1/text_summary", "recipe/text_summary"} <= set(tags["tensors"])
    assert "_hparams_/session_start_info" in str(board.summary_metadata.keys())
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("sample/0/text_summary")]
    assert len(texts) == 3  # at steps 0, 3 and 6
    assert all("[...]" in text for text in texts)
    assert list((trained.run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert "sample 1:" in trained.run.log(0).read_text()
    recorded = list(read_lines(trained.run.samples))
    assert [(row["step"], row["number"]) for row in recorded] == [(step, n) for step in (0, 3, 6) for n in (0, 1)]
    assert len({row["prompt"] for row in recorded}) == 2 and all(row["completion"] for row in recorded)
    events = list(read_lines(trained.run.events))
    assert [row["event"] for row in events] == ["start", *["checkpoint"] * 6, "end"]
    assert [row["step"] for row in events] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert all(0 <= row["waited_seconds"] <= row["seconds"] for row in events[1:-1])
    assert (events[0]["world_size"], events[0]["device"], events[-1]["state"]) == (2, "cpu", "finished")
    assert events[0]["versions"]["deepspeed"] == importlib.metadata.version("deepspeed")


def test_a_taken_port_is_one_message(
    rank_environment: dict[str, str], tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = save_recipe(tiny_recipe, tmp_path / "tiny.yaml")
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "codeparrot_ds.train", str(recipe)],
            env={**rank_environment, "MASTER_PORT": str(port)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1, done.stderr
    assert f"error: port {port} of " in done.stderr
    assert f"`deepspeed --master_port {port + 1} ...`" in done.stderr
    assert "Traceback" not in done.stderr
