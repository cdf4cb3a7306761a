"""The code blocks of README and docs are run unchanged, in a copy of the tree like a clone."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.pages import PAGES, blocks
from tests.trees import bash, copy_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
PARTS = ["install", "collect", "clean", "tokenizer", "shards", "verify", "train", "convert", "complete", "report"]
NOISE = re.compile(r"warning|deprecat|traceback|\[INFO\]|\[WARNING\]", re.IGNORECASE)


def user_environment() -> dict[str, str]:
    """Environment of a user: without our .venv on PATH, and without variables that these tests set."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "PYTEST", "DS_", "PYTHON"))}
    venv_bin = str(ROOT / ".venv" / "bin")
    environment["PATH"] = ":".join(p for p in os.environ["PATH"].split(":") if p != venv_bin)
    return environment


@pytest.mark.nightly
def test_every_block_runs_and_a_killed_quickstart_resumes(tmp_path: Path) -> None:
    """From scratch, including the installation, at full length."""
    copy, environment = copy_tree(tmp_path / "clone"), user_environment()
    run_until_killed("./launch/quickstart.sh", copy, environment)
    run_blocks(copy, environment)
    summary = read_summary(copy)
    assert summary["files"] >= 2_000
    assert summary["vocab_size"] == 8192
    assert summary["tokens"] > 5_000_000
    assert summary["parameters"] > 1_000_000
    assert summary["loss_valid"] <= summary["loss_unigram"] - 1.2

    again = bash("./launch/quickstart.sh", copy, environment)
    assert again.returncode == 0, again.stdout
    assert "already trained to step" in again.stdout
    assert {**read_summary(copy), "seconds": 0} == {**summary, "seconds": 0}


def test_every_block_runs_with_a_tenth_of_the_training(tmp_path: Path) -> None:
    """In the environment of these tests."""
    copy, environment = copy_tree(tmp_path / "clone"), user_environment()
    (copy / ".venv").symlink_to(sys.prefix)
    environment["PYTHON"] = "true"  # instead of the Python that would run the installation
    script, recipe = copy / "launch" / "quickstart.sh", copy / "launch" / "recipes" / "quickstart.yaml"
    script.write_text(script.read_text().replace("--sample 30MB", "--sample 6MB"))
    body = yaml.safe_load(recipe.read_text())
    for section in ("schedule", "evaluation", "checkpoints", "logging"):
        body[section] |= {key: steps // 10 for key, steps in body[section].items() if key.endswith("steps")}
    recipe.write_text(yaml.safe_dump(body))
    run_until_killed("./launch/quickstart.sh", copy, environment)
    run_blocks(copy, environment)
    summary = read_summary(copy)
    assert summary["loss_valid"] <= summary["loss_step0"] - 1


def run_blocks(copy: Path, environment: dict[str, str]) -> None:
    """Run each ```bash block, those of the README first; the quickstart resumes from a checkpoint.

    Blocks of docs need nothing but the quickstart. (```sh blocks need GPUs, several hosts or an account.)
    """
    (first, *others), docs = blocks(PAGES[0], "bash"), [page for page in PAGES if page.parent.name == "docs"]
    assert PAGES[0] == ROOT / "README.md" and "./launch/quickstart.sh" in first
    prepared = {**environment, "PATH": f"{copy / '.venv' / 'bin'}:{environment['PATH']}"}
    for block in [first, *others, *(block for page in docs for block in blocks(page, "bash"))]:
        done = bash(block, copy, environment if block == first else prepared)
        assert done.returncode == 0, f"{block}\n{done.stdout}"
        if "./launch/quickstart.sh" in block:
            assert "resuming from runs/quickstart/checkpoints/step-" in done.stdout
            check_output(done.stdout)


def run_until_killed(command: str, cwd: Path, environment: dict[str, str]) -> None:
    """Start a command, and SIGKILL it and its descendants once it has saved a checkpoint."""
    line = "checkpoint runs/quickstart/checkpoints/step-"
    with subprocess.Popen(
        ["bash", "-c", command],
        cwd=cwd,
        env=environment,
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
    """Check that every step is printed as a command, that the table is complete, and that there are no warnings."""
    for command in (
        "corpus collect",
        "corpus clean",
        "tokenizer train",
        "shards build",
        "launch",
        "convert",
        "complete",
        "report",
    ):
        assert f"\n$ codeparrot-ds {command}" in output
    assert re.search(r"deepspeed --quiet (--master_port \d+ )?--num_gpus", output)
    for row in ("removed: config or test", "removed: near-duplicate", "found: email"):
        assert row in output
    for row in ("source files", "tokens", "parameters", "loss at step 0", "validation loss", "unigram", "perplexity"):
        assert row in output
    parts = re.findall(r"^ +\d+\.\d +(\d+)%  (\w+)$", output, re.MULTILINE)
    assert [name for _, name in parts] == PARTS
    assert 95 <= sum(int(share) for share, _ in parts) <= 105  # rounded
    ours = output[output.index("\n$ codeparrot-ds") :]  # pip's output before that depends on the machine
    assert not NOISE.search(ours), NOISE.search(ours)


def read_summary(copy: Path) -> dict[str, Any]:
    """Read the quickstart's summary and check what holds for any length."""
    summary: dict[str, Any] = json.loads((copy / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["tokens_per_second"] > 0
    assert summary["seconds"] > 0
    assert abs(summary["loss_step0"] - math.log(8192)) < 0.3
    assert math.isclose(summary["perplexity_valid"], math.exp(summary["loss_valid"]))
    assert set(summary["paths"]) == {"corpus", "tokenizer", "shards", "run", "checkpoint", "model"}
    return summary
