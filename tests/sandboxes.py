"""Programs for the sandbox: hostile ones, sound ones, and how to run them as another user."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.evaluation.problems import Problem, load_problems
from codeparrot_ds.evaluation.sandbox.bubble import Bubble
from codeparrot_ds.evaluation.sandbox.outcome import Limits
from codeparrot_ds.evaluation.sandbox.pool import Program, run_programs

TESTS = Path(__file__).parent
SMALL_PROBLEMS = TESTS / "small_problems.jsonl"
NOBODY = 65534
# Runs a copy of this Python as another user, who cannot read root's files: in mounts of its own. $1: Python's prefix,
# $2: packages, $3: this repository.
_AS_NOBODY = f"""
set -e
mount -t tmpfs tmpfs /mnt
mkdir /mnt/python /mnt/packages /mnt/repository
mount --bind "$1" /mnt/python
mount --bind "$2" /mnt/packages
mount --bind "$3" /mnt/repository
cd /mnt/repository
exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups env -i PATH=/usr/local/bin:/usr/bin:/bin \\
    PYTHONPATH=/mnt/repository:/mnt/packages LD_LIBRARY_PATH=/mnt/python/lib PYTHONDONTWRITEBYTECODE=1 \\
    /mnt/python/bin/python3 -m tests.sandboxes
"""


def require_sandbox() -> None:
    """Skip the test (which CI does not allow) if this machine cannot run the sandbox."""
    try:
        Bubble(Limits()).close()
    except ConfigError as error:
        pytest.skip(str(error))


def small_problems() -> list[Problem]:
    """Twenty small problems of our own."""
    return load_problems(SMALL_PROBLEMS)


def hostile_programs(secret: Path) -> list[tuple[str, list[str], str]]:
    """(name, verdicts that may be given, program) of every hostile program, which looks for the file `secret`."""
    rows = yaml.safe_load((TESTS / "hostile_programs.yaml").read_text())
    replaced = [row["program"].replace("DIRECTORY", str(secret.parent)).replace("SECRET", str(secret)) for row in rows]
    allowed = [row["verdict"] if isinstance(row["verdict"], list) else [row["verdict"]] for row in rows]
    return [(row["name"], verdicts, program) for row, verdicts, program in zip(rows, allowed, replaced, strict=True)]


def run_here(programs: Sequence[str], timeout: float) -> list[dict[str, Any]]:
    """Outcomes of programs, two at a time."""
    outcomes = dict(run_programs([Program(it) for it in programs], Limits(timeout=timeout), workers=2))
    return [vars(outcomes[i]) for i in range(len(programs))]


def run_as_nobody(programs: Sequence[str], timeout: float) -> list[dict[str, Any]]:
    """The same as another user. Needs root."""
    if os.geteuid() != 0 or not shutil.which("setpriv") or not shutil.which("unshare"):
        pytest.skip("only root can become another user, with unshare and setpriv: apt-get install util-linux")
    arguments = [sys.base_prefix, sysconfig.get_path("purelib"), str(TESTS.parent)]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", _AS_NOBODY, "sh", *arguments],
        input=json.dumps([list(programs), timeout]),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["uid"] == NOBODY
    return answer["outcomes"]  # type: ignore[no-any-return]


if __name__ == "__main__":
    print(json.dumps({"uid": os.getuid(), "outcomes": run_here(*json.load(sys.stdin))}))
