"""The shape of the package: imports run one way, heavy ones come late, names are known, the linters are quiet."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import codeparrot_ds
from tests.conftest import ROOT

PACKAGE = Path(codeparrot_ds.__file__).parent
# In the order of docs/reading-the-code.md. A module imports from its own stage and from those above it.
LAYERS = [
    ["errors"],
    ["files", "memory"],
    ["storage"],
    ["jobs"],
    ["lifeline"],
    ["recipe"],
    ["run_directory"],
    ["corpus"],
    ["tokenizer"],
    ["shards"],
    ["stored"],
    ["zero"],
    ["training", "export", "evaluation"],  # side by side: they do not import one another
    ["cluster"],
    ["report"],
    ["train"],
    ["trial"],
    ["cli"],
]
RANK = {stage: rank for rank, layer in enumerate(LAYERS) for stage in layer}


def modules() -> list[Path]:
    """Every module of the package."""
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported_stages(path: Path) -> set[str]:
    """Stages that a module imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import hides its stage"
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "codeparrot_ds" and len(parts) > 1 and parts[1] in RANK:
                found.add(parts[1])
    return found


def violations(stage: str, imported: set[str]) -> set[str]:
    """Stages that `stage` must not import."""
    return {other for other in imported if other != stage and RANK[other] >= RANK[stage]}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    stage = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert stage in RANK, "a new stage: give it its place in LAYERS and in the docs"
    assert not violations(stage, imported_stages(path))


def test_the_rule_can_be_broken() -> None:
    assert violations("corpus", {"training"}) == {"training"}
    assert violations("export", {"evaluation"}) == {"evaluation"}
    assert violations("training", {"shards", "recipe"}) == set()


def heavy_imports(statement: str) -> set[str]:
    """Which heavy libraries a fresh Python has loaded after `statement`."""
    heavy = {"torch", "transformers", "deepspeed", "datasets", "pydantic", "numpy", "pyarrow"}
    code = f"{statement}\nimport sys\nprint(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_preprocessing_starts_without_torch() -> None:
    loaded = heavy_imports(
        "import codeparrot_ds.corpus.build, codeparrot_ds.tokenizer.train, codeparrot_ds.tokenizer.encode\n"
        "import codeparrot_ds.shards.build, codeparrot_ds.shards.verify, codeparrot_ds.shards.sequences\n"
        "import codeparrot_ds.recipe, codeparrot_ds.training.engine, codeparrot_ds.train"
    )
    assert not loaded & {"torch", "transformers", "deepspeed", "datasets"}


def test_the_command_line_loads_no_stage_before_its_verb_is_called() -> None:
    assert heavy_imports("import codeparrot_ds.cli") == set()


def public_names() -> str:
    """One line a module: its public functions and classes, in order."""
    lines = []
    for path in modules():
        names = [
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        if names:
            lines.append(f"{path.relative_to(PACKAGE).with_suffix('').as_posix()}: {' '.join(names)}")
    return "\n".join(lines) + "\n"


def test_the_public_names_are_those_that_were_agreed() -> None:
    """A name that comes, goes or changes is a decision: write it down in public_names.txt."""
    assert public_names() == (Path(__file__).with_name("public_names.txt")).read_text()


def test_every_public_name_has_a_docstring() -> None:
    missing = []
    for path in modules():
        top = ast.parse(path.read_text()).body
        classes = [node for node in top if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        members = [member for node in classes for member in node.body]
        for node in [*top, *members]:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None and path.name != "cli.py":
                missing.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}")
    assert not missing


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_linters_and_types(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_launch_scripts_are_short() -> None:
    for script in (ROOT / "launch").glob("*.sh"):
        assert len(script.read_text().splitlines()) < 40, script


def test_the_pages_are_finished_and_their_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        assert "@@" not in text, f"{page}: a place that was never filled in"
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), f"{page}: {link}"
