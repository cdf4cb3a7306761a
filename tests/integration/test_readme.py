"""The README's blocks are run as they stand, in a copy of the tree as a clone would have it."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
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


def user_environment() -> dict[str, str]:
    """A user's: without our .venv on PATH, and without what these tests set."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "PYTEST", "DS_", "PYTHON"))}
    venv_bin = str(ROOT / ".venv" / "bin")
    environment["PATH"] = ":".join(p for p in os.environ["PATH"].split(":") if p != venv_bin)
    return environment


def bash(block: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a block to its end."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=cwd,
        env=user_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_every_block_runs_and_a_killed_quickstart_goes_on(tmp_path: Path) -> None:
    copy = clone(tmp_path / "clone")
    run_until_killed("./launch/quickstart.sh", copy, "checkpoint runs/quickstart/checkpoints/step-")
    found = blocks()
    assert any("./launch/quickstart.sh" in block for block in found)
    found.remove("./launch/test.sh\n")  # CI runs it in a clone of its own, and this test within
    assert "./launch/test.sh" in (ROOT / ".ci" / "run").read_text()
    for block in found:
        done = bash(block, copy)
        assert done.returncode == 0, f"{block}\n{done.stdout}"
        if "./launch/quickstart.sh" in block:
            assert "going on from runs/quickstart/checkpoints/step-" in done.stdout
            check_output(done.stdout)
    check_summary(copy)

    first = json.loads((copy / "runs" / "quickstart" / "summary.json").read_text())
    again = bash("./launch/quickstart.sh", copy)
    assert again.returncode == 0, again.stdout
    assert "already trained to step" in again.stdout
    second = json.loads((copy / "runs" / "quickstart" / "summary.json").read_text())
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def run_until_killed(command: str, cwd: Path, line: str) -> None:
    """Start a command and SIGKILL it and all that it started once it prints `line`."""
    with subprocess.Popen(
        ["bash", "-c", command],
        cwd=cwd,
        env=user_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        output = ""
        for printed in process.stdout:
            output += printed
            if line in printed:
                break
        ended = process.poll()
        os.killpg(process.pid, signal.SIGKILL)
    assert line in output, f"ended with {ended}:\n{output}"


def check_output(output: str) -> None:
    """Every step printed as a command, the table, and nothing that worries a user."""
    for command in ("corpus collect", "tokenizer train", "shards build", "launch", "convert", "complete", "report"):
        assert f"\n$ codeparrot-ds {command}" in output
    assert re.search(r"deepspeed --quiet (--master_port \d+ )?--num_gpus", output)
    for row in ("source files", "tokens", "parameters", "loss at step 0", "validation loss", "unigram", "perplexity"):
        assert row in output
    ours = output[output.index("\n$ codeparrot-ds") :]  # what pip says of its indices before is the machine's own
    assert not NOISE.search(ours), NOISE.search(ours)


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
