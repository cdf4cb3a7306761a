"""tests/mutations/mutations.yaml matches the tree, so that a missed mutation indicates a gap in the tests."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.mutations.run import Mutation, load_mutations

MUTATIONS = load_mutations()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_has_one_place_and_tests_that_exist(mutation: Mutation) -> None:
    path = mutation.place(ROOT)
    broken = path.read_text().replace(mutation.find, mutation.replace)
    assert broken != path.read_text()
    if path.suffix == ".py":
        ast.parse(broken)
    for test in mutation.tests:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        assert name.partition("[")[0] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_names_are_unique() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(names) == len(set(names)) >= 60


def test_nearly_every_module_has_one() -> None:
    places = {mutation.place(ROOT) for mutation in MUTATIONS}
    modules = {path for path in (ROOT / "codeparrot_ds").rglob("*.py") if path.name != "__init__.py"}
    modules = {path for path in modules if path.parent.name != "cli"}  # whose commands do little but call other modules
    without = {path.name for path in modules - places}
    # Affects only speed; covered only by the README's test; a single system call.
    assert without <= {"preload.py", "summary.py", "network.py"}


def test_text_that_occurs_twice_or_never_is_rejected(tmp_path: Path) -> None:
    package = tmp_path / "codeparrot_ds"
    package.mkdir()
    (package / "a.py").write_text("x = 1\ny = 1\n")
    assert Mutation("once", "x = 1", "x = 2", ()).place(tmp_path) == package / "a.py"
    for find in ("= 1", "z"):
        with pytest.raises(LookupError):
            Mutation("other", find, "", ()).place(tmp_path)
