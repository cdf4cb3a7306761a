"""The GPU benchmark can be checked without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"


def benchmark(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `python benchmarks/gpu.py ...` without a GPU."""
    return subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def step(**more: Any) -> dict[str, Any]:
    """A cell of 16 x 4 on an H100: 65,536 tokens per step in 2 s, 1e10 FLOPs per token."""
    return {
        "part": "step",
        "cell": "16 x 4",
        "stage": 1,
        "micro_batch": 16,
        "accumulation": 4,
        "recompute": "none",
        "compile": False,
        "change": "",
        "step_seconds": [2.0, 2.0, 9.0],
        "tokens_per_step": 65536,
        "peak_bytes": 50e9,
        "reserved_bytes": 60e9,
        "predicted_peak_bytes": 51e9,
        "fits": True,
        "out_of_memory": False,
        "flops_per_token": 1e10,
        "peak_flops": 989e12,
        "device": "NVIDIA H100 80GB HBM3",
        **more,
    }


ROWS = [
    {"part": "versions", "GPU": "NVIDIA H100 80GB HBM3", "torch": "2.11.0"},
    {"part": "ceiling", "what": "copy", "device": "NVIDIA H100 80GB HBM3", "seconds": 0.004, "value": 2100.0},
    {"part": "correctness", "cell": "loss at step 0", "ok": True, "found": 6.24, "wanted": "6.2383"},
    {"part": "correctness", "cell": "no host waits", "ok": False, "found": "a | b", "wanted": "none"},
    step(),
    step(change="no fused loss", step_seconds=[2.5, 2.5]),
    step(cell="128 x 4", micro_batch=128, step_seconds=[], peak_bytes=None, out_of_memory=True, fits=False),
    {**step(stage=None), "part": "peer", "who": "nanogpt", "compile": True, "step_seconds": [4.0]},
    {"part": "checkpoint", "memory": "pageable", "bytes": 2e10, "waited_seconds": 8.0, "seconds": 30.0},
    {"part": "profile", "operators": [{"name": f"kernel {i}", "calls": 2, "microseconds": 100.0} for i in range(40)]},
]
NAMES = ("versions", "ceilings", "correctness", "step", "changes", "memory", "peers", "profile", "checkpoint")


def test_tables_of_rows_go_between_the_marks_of_a_page(tmp_path: Path) -> None:
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"part": "st')  # a process was killed
    page.write_text("before\n" + "".join(f"<!-- gpu:{name} -->\nold\n<!-- gpu:end -->\n" for name in NAMES) + "after\n")
    done = benchmark("--from", rows, "--fill", page)
    assert done.returncode == 0, done.stdout
    assert "rows.jsonl:11: not a whole line" in done.stdout
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for line in (
        "| H100 | 16 x 4 | ZeRO-1 | none |  | 32,768 | 2,000.0 | 33.1% | 50.00 | 60.00 |",  # 32,768 * 1e10 / 989e12
        "| H100 | no fused loss | ZeRO-1, 16 x 4 | 26,214 | 2,500.0 | 26.5% | 50.00 | 0.800 |",
        "| H100 | 16 x 4 |  | ZeRO-1 | none |  | 51.00 | 50.00 | +2.0% | yes | yes |",
        "| H100 | 128 x 4 |  | ZeRO-1 | none |  | 51.00 |  |  | no | no |",
        "| H100 | nanoGPT | 16 x 4 |  | yes | 16,384 | 4,000.0 | 16.6% | 50.00 | 2.000 |",
        "| no host waits | **FAIL** | a / b | none |",
        "| 20 others | 40 | 2.00 | 50.0% |",
    ):
        assert line in text, f"{line}\n{text}"


def test_a_page_without_a_mark_is_left_alone(tmp_path: Path) -> None:
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    page.write_text("<!-- gpu:versions -->\nold\n<!-- gpu:end -->\n")
    done = benchmark("--from", rows, "--fill", page)
    assert done.returncode == 1
    assert "no mark <!-- gpu:ceilings -->" in done.stdout
    assert "old" in page.read_text()


def test_the_page_has_a_mark_for_every_table(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "speed.md").read_text()
    assert [name for name in NAMES if f"<!-- gpu:{name} -->\n" not in text] == []
    assert text.count("<!-- gpu:end -->\n") == len(NAMES)


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_killed_and_the_results_so_far_are_printed(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    output.write_text(json.dumps(ROWS[4]) + '\n{"part": "st')
    # It starts Python with torch six times, one after another.
    done = benchmark("--part", "first", "--tiny", "--seconds", "9", "--only", "correctness", "--output", output)
    assert done.returncode == 1, done.stdout
    assert "failed: correctness (time is up)" in done.stdout
    assert "| H100 | 16 x 4 | ZeRO-1 |" in done.stdout
    last = json.loads(output.read_text().splitlines()[-1])
    assert (last["part"], last["name"], last["exit"]) == ("child", "correctness", None)


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["first", "second", "third"])
def test_each_part_runs_on_tiny_models_within_its_seconds(part: str, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    done = benchmark("--part", part, "--tiny", "--output", output)
    assert done.returncode == 0, done.stdout
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    expected = {
        "first": {"versions", "ceiling", "correctness", "step", "profile", "child"},
        "second": {"step", "peer", "child"},
        "third": {"step", "checkpoint", "child"},
    }
    assert {row["part"] for row in rows} == expected[part]
    assert [row["cell"] for row in rows if row["part"] == "step" and row.get("error")] == []
    for row in rows:
        if row.get("predicted_peak_bytes") and row.get("peak_bytes") and not row.get("compile"):
            assert row["predicted_peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.05), row


@pytest.mark.nightly
def test_a_vocabulary_of_python_saves_tokens_on_python() -> None:
    """On files that were not trained on; `nonlocal` is rare without a blank in front."""
    command = [sys.executable, BENCHMARKS / "vocabulary.py", "60"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["times as many tokens"]["tokenizer-of-english"] >= 1.6
    keywords = found["keywords that are single tokens"]
    assert keywords["of the standard library"] == {"bare": 35, "after_blank": 35}
    assert keywords["of the sample"]["after_blank"] == 35
    assert keywords["of the sample"]["bare"] >= 34
