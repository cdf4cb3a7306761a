"""A cleaned corpus has the same bytes when processes are killed in any step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.shard_commands import environment
from tests.unit.test_clean import function, write


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "seed"), [(2, 1), *(pytest.param(4, seed, marks=pytest.mark.nightly) for seed in (2, 3))]
)
def test_killed_in_any_step_the_same_command_makes_the_same_bytes(tmp_path: Path, kills: int, seed: int) -> None:
    """Fault 24."""
    base = [function(name, 40) for name in ("alpha", "beta", "gamma", "delta", "omega")]
    near = [text.replace(f"_{i}_other", f"_{i}_changed") for text in base for i in (7, 9)]
    others = [function(f"other{i}") for i in range(8)]
    for part in range(3):
        write(tmp_path / "in" / f"{part}.jsonl", [*base, *near, *others, "x = 1"][part::3] + base[part : part + 1])
    (tmp_path / "scratch").mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.faults.probe_clean", tmp_path / "scratch", str(kills), str(seed)),
            *(tmp_path / "in",),
        ],
        cwd=ROOT,
        env=environment(OPENBLAS_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert min(report["killed"]) >= kills, report
