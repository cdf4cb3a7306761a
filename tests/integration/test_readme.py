"""The README's blocks are run as they stand, in a copy of the tree as a clone would have it."""

import json
import math
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
NOISE = re.compile(r"warning|deprecat|traceback|\[INFO\]|\[WARNING\]", re.IGNORECASE)


def blocks() -> list[str]:
    """The README's ```bash blocks: commands for any machine. (```sh blocks need GPUs or several hosts.)"""
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def clone(target: Path) -> Path:
    """What git tracks or would track, copied to `target`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


def bash(block: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as a user would, outside this environment: without our .venv on PATH."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "PYTEST", "DS_", "PYTHON"))}
    venv_bin = str(ROOT / ".venv" / "bin")
    environment["PATH"] = ":".join(p for p in os.environ["PATH"].split(":") if p != venv_bin)
    # The block that runs the tests would run this one again, for ever: there pytest only collects.
    environment["PYTEST_ADDOPTS"] = "--collect-only --quiet"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("clone"))


def test_every_block_runs(copy: Path) -> None:
    found = blocks()
    assert any("./launch/quickstart.sh" in block for block in found)
    assert any("./launch/test.sh" in block for block in found)
    for block in found:
        done = bash(block, copy)
        assert done.returncode == 0, f"{block}\n{done.stdout}"
        if "quickstart" in block:
            check_output(done.stdout)
    check_summary(copy)


def check_output(output: str) -> None:
    """Every step printed as a command, the table, and nothing that worries a user."""
    for command in ("corpus collect", "tokenizer train", "shards build", "launch", "convert", "complete", "report"):
        assert f"\n$ codeparrot-ds {command}" in output
    assert "deepspeed --quiet --num_gpus" in output
    for row in ("source files", "tokens", "parameters", "loss at step 0", "validation loss", "unigram", "perplexity"):
        assert row in output
    assert not NOISE.search(output), NOISE.search(output)


def check_summary(copy: Path) -> None:
    """The figures hold the promises of the quickstart."""
    summary = json.loads((copy / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["files"] >= 3_000
    assert summary["vocab_size"] == 8192
    assert summary["tokens"] > 5_000_000
    assert summary["parameters"] > 3_000_000
    assert summary["tokens_per_second"] > 0
    assert summary["seconds"] > 0
    assert abs(summary["loss_step0"] - math.log(8192)) < 0.3
    assert summary["loss_valid"] <= summary["loss_unigram"] - 0.8
    assert math.isclose(summary["perplexity_valid"], math.exp(summary["loss_valid"]))
    assert set(summary["paths"]) == {"corpus", "tokenizer", "shards", "run", "checkpoint", "model"}
    for path in summary["paths"].values():
        assert (copy / path).is_dir()
    rows = [json.loads(line) for line in (copy / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
    engine_loss = next(row["loss_valid"] for row in reversed(rows) if row["kind"] == "valid")
    assert abs(engine_loss - summary["loss_valid"]) < 1e-3


def test_running_it_again_goes_on_where_it_stopped(copy: Path) -> None:
    """After everything: nothing is made again. After a kill in training: only the rest is trained."""
    first = json.loads((copy / "runs" / "quickstart" / "summary.json").read_text())
    done = bash("./launch/quickstart.sh", copy)
    assert done.returncode == 0, done.stdout
    assert "already trained to step" in done.stdout
    second = json.loads((copy / "runs" / "quickstart" / "summary.json").read_text())
    assert {**first, "seconds": 0} == {**second, "seconds": 0}

    checkpoints = sorted((copy / "runs" / "quickstart" / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    shutil.rmtree(copy / "runs" / "quickstart" / "hf")
    started = subprocess.Popen(
        ["bash", "./launch/quickstart.sh"],
        cwd=copy,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert started.stdout is not None
    output = ""
    deadline = time.monotonic() + 300
    for line in started.stdout:
        output += line
        if "going on from" in line or time.monotonic() > deadline:
            break
    os.killpg(started.pid, 9)
    started.wait()
    assert "going on from runs/quickstart/checkpoints/step-" in output, output
