"""Run directories with everything that a page shows, as training writes them: no training is needed."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from codeparrot_ds.run.directory import RunDirectory

BEGAN = 1_790_000_000.0  # Unix
# Ends the script, opens a tag and an attribute, is a template, and changes the order of what follows it.
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\"{{ 7*7 }}\u202e&"
)


def train_row(step: int, **changed: Any) -> dict[str, Any]:
    """A step as training records it."""
    return {
        "kind": "train",
        "step": step,
        "loss": 2 + 7 * math.exp(-step / 80) + 0.2 * math.sin(step * 1.7),
        "learning_rate": 1e-3 * min(1.0, (step + 1) / 20),
        "gradient_norm": 1 + 0.5 * math.cos(step * 2.3),
        "step_seconds": 0.5,
        "data_seconds": 0.01 + 0.005 * math.sin(step),
        "tokens_per_second": 4096.0 + 100 * math.sin(step / 3),
        "mfu": 0.4 + 0.01 * math.sin(step / 5),
        "peak_memory_bytes": 800_000_000 + 1000 * step,
        "samples_seen": (step + 1) * 8,
        "tokens_seen": (step + 1) * 2048,
        "skipped_steps": 0,
        "batch_digest": f"{step:016x}",
        **changed,
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(path: Path, steps: int = 200, name: str = "", **recipe: Any) -> RunDirectory:
    """A finished run of `steps` steps, without checkpoints and shards: recipe, status, metrics."""
    run = RunDirectory(path)
    path.mkdir(parents=True)
    body = {
        "name": name or path.name,
        "seed": 1,
        "runs": str(path.parent),
        "model": {"vocab_size": 8192, "seq_len": 256, "n_layer": 4, "n_head": 3, "n_embd": 192},
        "data": {"shards": str(path.parent / "shards")},
        "batch": {"global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"steps": steps, "warmup_steps": 20},
        "engine": {"deepspeed": str(run.ds_config), "precision": "fp32"},
        **recipe,
    }
    run.recipe.write_text(yaml.safe_dump(body), encoding="utf-8")
    run.ds_config.write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    valid = [{"kind": "valid", "step": step, "loss_valid": 2.2 + 7 * math.exp(-step / 80)} for step in (0, steps)]
    write_lines(run.metrics, [valid[0], *map(train_row, range(steps)), valid[1]])
    run.write_status("finished", world_size=2, device="cpu", parameters=3_401_856, step=steps)
    run.events.unlink()
    return run


def make_eventful_run(path: Path, text: str = "went wrong") -> RunDirectory:
    """A run with faults, restarts, skipped steps, samples and scores; `text` stands wherever text is from outside."""
    run = make_run(path, name=text)
    rows = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["kind"] == "train":
            row["skipped_steps"] = (row["step"] >= 60) + (row["step"] >= 61)
            row["loss"] = None if row["step"] in (60, 61) else 30.0 if row["step"] == 120 else row["loss"]
    write_lines(run.metrics, rows)
    start = {
        "event": "start",
        "world_size": 2,
        "device": "cuda",
        "hardware": f"H100 {text}",
        "versions": {"torch": text},
    }
    events: list[dict[str, Any]] = [{"time": BEGAN + 5, "step": 0, **start}]
    for step in (50, 100, 150, 200):
        moment = BEGAN + 5 + step / 2 + (60 if step > 100 else 0)
        events.append({"time": moment, "event": "checkpoint", "step": step, "seconds": 2.5, "waited_seconds": 0.125})
    events.insert(-2, {"time": BEGAN + 130, "event": "go back", "step": 100, "reason": f"loss 30.0 {text}"})
    events.insert(2, {"time": BEGAN + 36, "event": "skipped", "step": 60, "reason": f"at steps 60, 61 {text}"})
    write_lines(run.events, events)
    attempt = {"hosts": ["host-a", text], "host": None, "doing": f"step 99 {text}"}
    failed = {"from_step": 0, "to_step": 50, "state": "failed", "reason": f"rank 1 exited {text}", "code": 70}
    done = {"from_step": 50, "to_step": 200, "state": "finished", "reason": "trained to its last step", "code": 0}
    write_lines(
        run.launches,
        [
            {"began": BEGAN, "seconds": 55, **failed, **attempt},
            {"began": BEGAN + 65, "seconds": 110, **done, **attempt},
        ],
    )
    changes = {"optimizer.learning_rate": [1e-3, text]}
    write_lines(run.recipe_changes, [{"time": BEGAN + 70, "step": 50, "changes": changes}])
    documents = [{"repository": text, "path": f"{text}.py"}]
    incident = {"step": 60, "reason": f"skipped: {text}", "samples": [{"sequence": 3, "documents": documents}]}
    write_lines(run.incidents, [incident, {**incident, "step": 61}])
    samples = [
        {
            "kind": "sample",
            "step": step,
            "number": number,
            "prompt": f"def f():\n    {text}",
            "completion": f"{step} {text}",
        }
        for step in (0, 100, 200)
        for number in (0, 1)
    ]
    write_lines(run.samples, samples)
    for step, value in ((100, 0.05), (200, 0.125)):
        scored = {"pass@1": {"value": value, "low": value / 2, "high": value * 2}}
        problems = {text: {"samples": 1, "passed": 1}, "b": {"samples": 1, "passed": 0}}
        run.humaneval(step).mkdir(parents=True)
        body = {"temperatures": {"0.2": {"scores": {"pass_at_k": scored, "problems": problems}}}}
        (run.humaneval(step) / "results.json").write_text(json.dumps(body), encoding="utf-8")
    run.converted.mkdir()
    certificate = {
        "source": [{"step": 200}],
        "dtype": text,
        "parameters": 3_401_856,
        "tied": {text: text},
        "tensors": {},
        "files": {text: text},
        "versions": {text: text},
        "forward": {"sequences": 8, "loss_master": 2.25, "loss_written": 2.25, "largest_logit_difference": 1e-6},
        "engine": {"loss_valid": 2.25, "not_compared": None},
    }
    (run.converted / "certificate.json").write_text(json.dumps(certificate), encoding="utf-8")
    run.write_status("failed", world_size=2, device="cuda", error=f"TrainingError: {text}")
    return run
