"""docs/faults.md: every fault has a test that CI runs."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "faults.md"


def rows() -> dict[int, list[str]]:
    """Tests by fault number."""
    found = {}
    for line in PAGE.read_text().splitlines():
        if match := re.match(r"\| (\d+) \|.*\|(.*)\|$", line):
            found[int(match[1])] = re.findall(r"`(\S+::\S+)`", match[2])
    return found


@cache
def functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {
        node.name: node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }


def is_nightly(test: ast.FunctionDef) -> bool:
    """Whether the whole test is nightly, not just one parameter."""
    return any(ast.unparse(decorator) == "pytest.mark.nightly" for decorator in test.decorator_list)


def test_all_faults_are_listed() -> None:
    assert list(rows()) == list(range(1, 27))
    assert all(rows().values())


@pytest.mark.parametrize("test", sorted({test for tests in rows().values() for test in tests}))
def test_the_tests_of_the_faults_exist_and_ci_runs_them(test: str) -> None:
    file, _, name = test.partition("::")
    found = functions(ROOT / "tests" / file)
    assert name in found
    assert not is_nightly(found[name])


def test_nightly_tests_are_recognized() -> None:
    found = functions(ROOT / "tests" / "integration" / "test_readme.py")
    assert sum(is_nightly(test) for test in found.values()) == 1


def test_tests_that_name_a_fault_are_those_that_are_listed() -> None:
    listed = {(number, test) for number, tests in rows().items() for test in tests}
    for folder in ("faults", "multinode"):
        for path in (ROOT / "tests" / folder).glob("test_*.py"):
            for name, test in functions(path).items():
                said = re.match(r"Faults? ([\d, and]+)", ast.get_docstring(test) or "")
                for number in re.findall(r"\d+", said[1]) if said else []:
                    assert (int(number), f"{folder}/{path.name}::{name}") in listed
