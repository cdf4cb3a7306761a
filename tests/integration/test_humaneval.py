"""HumanEval from end to end: what a model has learned is scored, no more and no less."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.splits import split_of
from codeparrot_ds.evaluation.loss import validation_loss
from codeparrot_ds.evaluation.problems import load_humaneval
from codeparrot_ds.export.convert import convert
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.options import BuildOptions
from tests.conftest import ROOT, RunRanks, Trained, recipe_on, train
from tests.tiny_models import plain_gpt2

pytestmark = pytest.mark.slow
LEARNED, COPIES, STEPS, VALID = 5, 400, 300, 0.1


def command(*arguments: str | Path, cwd: Path = ROOT) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "codeparrot_ds.cli", "evaluate", *map(str, arguments), "--json"],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.nightly
def test_a_model_scores_the_problems_that_it_was_taught(forked: RunRanks, data: Path, tmp_path: Path) -> None:
    problems = sorted(load_humaneval(), key=lambda each: len(each.prompt + each.canonical_solution))
    # As files have them, without blank lines at the start.
    texts = {each.task_id: f"{each.prompt}{each.canonical_solution}".strip() + "\n" for each in problems}
    taught = [task for task, text in texts.items() if split_of(Document(text, *[""] * 4), VALID) == "train"][:LEARNED]
    lines = taught * COPIES
    random.Random(0).shuffle(lines)
    others = (f"# line {i} of a file\n" * 200 for i in range(100))
    held_out = next(text for text in others if split_of(Document(text, *[""] * 4), VALID) == "valid")
    with open(tmp_path / "taught.jsonl", "w") as file:
        for text in (*(texts[task] for task in lines), held_out):
            file.write(json.dumps({"content": text}) + "\n")
    build(
        tmp_path / "taught.jsonl",
        data / "tokenizer",
        tmp_path / "shards",
        BuildOptions(valid_fraction=VALID, workers=1),
    )
    body = recipe_on(tmp_path, tmp_path / "runs")
    body["model"] |= {"seq_len": 256, "n_embd": 128, "n_head": 4, "activation_checkpointing": "none"}
    body |= {"batch": {"global_batch_size": 8}, "optimizer": {"learning_rate": 0.003, "weight_decay": 0.0}}
    body["schedule"] = {"steps": STEPS, "warmup_steps": 10}
    body["evaluation"] = {"every_steps": STEPS, "humaneval": 1}
    body |= {"checkpoints": {"every_steps": STEPS}, "export": {"every_steps": STEPS, "dtype": "float32"}}
    body["logging"]["tensorboard"] = True
    trained = train(forked, {**body, "name": "taught"}, ranks=1, stage=1)
    # The validation document is another one, so only training's own loss is low.
    assert trained.rows[-2]["loss"] < 0.1, "it does not know them yet"
    said = trained.run.log(0).read_text()
    assert f"step {STEPS}: HumanEval pass@1 {100 * LEARNED / 164:.2f} %, {LEARNED} of 164 problems passed" in said
    board = EventAccumulator(str(trained.run.tensorboard / "humaneval")).Reload()
    (point,) = board.Scalars("humaneval/pass@1 at temperature 0.2")
    assert (point.step, point.value) == (STEPS, pytest.approx(LEARNED / 164))

    how = ("--temperature", "0.2", "-n", "2", "-o", tmp_path / "scores")
    result = command("humaneval", trained.run.path, *how)
    scores = result["temperatures"]["0.2"]["scores"]
    assert [task for task, each in scores["problems"].items() if each["passed"]] == [
        each.task_id for each in load_humaneval() if each.task_id in taught
    ]
    assert scores["verdicts"]["passed"] == 2 * LEARNED
    assert scores["pass_at_k"]["pass@1"]["value"] == pytest.approx(LEARNED / 164)


@pytest.mark.nightly
def test_a_kill_loses_no_finished_batch(data: Path, tmp_path: Path) -> None:
    model = plain_gpt2(tmp_path / "model", data / "tokenizer", n_positions=256)
    problems = ROOT / "tests" / "small_problems.jsonl"
    options = ("--problems", problems, "-n", "12", "--temperature", "1", "--batch-size", "8", "--no-score", "-o")
    whole = command("humaneval", model, *options, tmp_path / "whole")["temperatures"]["1"]["samples_file"]
    arguments = [sys.executable, "-m", "codeparrot_ds.cli", "evaluate", "humaneval", model, *options, tmp_path / "cut"]
    process = subprocess.Popen(list(map(str, arguments)), cwd=ROOT)
    parts = tmp_path / "cut" / "parts"
    while len(list(parts.glob("*.jsonl"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 3 <= len(list(parts.glob("*.jsonl"))) < 30
    resumed = command("humaneval", model, *options, tmp_path / "cut")["temperatures"]["1"]["samples_file"]
    assert Path(resumed).read_bytes() == Path(whole).read_bytes()


def test_the_loss_is_the_engine_s_on_one_rank_and_on_two(
    forked: RunRanks, baseline: Trained, data: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    alone = train(forked, {**recipe_on(data, runs), "name": "alone"}, ranks=1, stage=1)
    for trained in (alone, baseline):
        convert([source_checkpoint(trained.run.path)], tmp_path / trained.run.path.name, memory_cap_bytes=8_000_000_000)
        found = validation_loss(tmp_path / trained.run.path.name, data / "shards", 7)
        assert found.loss_valid == pytest.approx(trained.valid_losses()[6], abs=1e-5)
