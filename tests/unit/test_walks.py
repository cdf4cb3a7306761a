"""The walks in docs/walks.md show the commands of the scripts in benchmarks/walks, in the same order."""

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT

WALKS = ROOT / "benchmarks" / "walks"
SCRIPTS = sorted(path for path in WALKS.glob("*.sh") if path.name != "walk.sh")
_CALL = re.compile(r"(?:run|fails \d+|python3 \"\$here/run\.py\" .*? --) (.*)")


def commands_of(script: Path) -> list[list[str]]:
    """The commands that a script runs as a user types them, as words."""
    calls = (_CALL.fullmatch(line) for line in script.read_text(encoding="utf-8").splitlines())
    return [shlex.split(call[1]) for call in calls if call]


def section(script: Path) -> str:
    """The part of the document whose heading is followed by the name of the script."""
    parts = re.split(r"^## ", (ROOT / "docs" / "walks.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [part for part in parts if f"benchmarks/walks/{script.name} " in part]
    assert len(found) == 1, script
    return found[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_document_shows_what_the_script_runs(script: Path) -> None:
    # A command is the first line of a block, or follows an empty line: what it prints may start with $ as well.
    shown = [shlex.split(line) for line in re.findall(r"(?:^```text|^)\n\$ (.*)", section(script), re.MULTILINE)]
    assert len(shown) > 10
    assert shown == commands_of(script)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_command_is_recorded_with_its_exit_code(script: Path) -> None:
    text = section(script)
    ends = re.findall(r"^\[exit code (-?\d+); [\d,.]+ CPU seconds, [\d,]+ MB\]$", text, re.MULTILINE)
    assert len(ends) == len(commands_of(script))
    expected = re.findall(r"^fails (\d+) |^run |--expect (-?\d+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert ends == [fails or code or "0" for fails, code in expected]


def test_there_are_four_walks() -> None:
    assert [path.stem for path in SCRIPTS] == ["json_gz", "laptop", "megatron", "slurm"]
