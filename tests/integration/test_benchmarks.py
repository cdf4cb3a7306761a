"""The GPU benchmark works before there is a GPU to run it on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]


def test_the_gpu_benchmark_runs_every_part_on_tiny_models(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--tiny", "--output", output]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    rows = json.loads(output.read_text())["rows"]
    assert {row["part"] for row in rows} == {"xl", "peers", "small", "ladder", "profile", "curve"}
    for row in rows:
        if "predicted_peak_bytes" in row and not row.get("out_of_memory"):
            assert row["predicted_peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.05), row
