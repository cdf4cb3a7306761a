"""What `codeparrot-ds status` reports about a run."""

from pathlib import Path

import pytest

from codeparrot_ds.errors import DataError
from codeparrot_ds.report.status import run_status
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.system.files import exclusive_lock


def test_a_run_with_status_running_is_dead_unless_a_process_holds_its_lock(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_status("running", world_size=2)
    with exclusive_lock(run.lock, ""):
        assert run_status(run).state == "running"
    assert run_status(run).state.startswith("dead: ")
    run.write_status("finished", step=6)
    assert run_status(run).rows() == [("state", "finished"), ("step", "6")]


def test_attempts_are_numbered_and_a_truncated_line_is_skipped(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(DataError):
        run_status(run)
    line = '{"began": 0, "seconds": 2.0, "from_step": 0, "to_step": 3, "state": "failed", "reason": "rank 1"}\n'
    run.launches.write_text(2 * line + line[:20])
    found = run_status(run)
    assert found.state == "never started"
    names, values = zip(*found.rows(), strict=True)
    assert names == ("state", "attempt 1", "attempt 2")
    assert values[2].endswith("2 s, steps 0 to 3: failed, rank 1")
