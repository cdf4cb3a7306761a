"""Package structure: imports run one way, heavy imports are lazy, public names are listed, linters pass."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import codeparrot_ds
from tests.conftest import ROOT

PACKAGE = Path(codeparrot_ds.__file__).parent
# Subpackages and top-level modules in the order of docs/reading-the-code.md. Each imports only from those above it.
LAYERS = [
    ["errors"],
    ["system"],
    ["run"],
    ["documents"],
    ["tokenizer"],
    ["corpus"],
    ["shards"],
    ["checkpoint"],
    ["hosts"],
    ["training", "export", "evaluation", "planning", "doctor"],  # peers: they do not import one another
    ["supervision"],
    ["report"],
    ["train"],
    ["trial"],
    ["api"],
    ["cli"],
]
MAX_LINES = 400
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}


def modules() -> list[Path]:
    """Every module of the package."""
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    """Module name such as `training.loop`; a subpackage's `__init__` has the subpackage's name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(source: str) -> set[str]:
    """Modules of this package that a module imports, at top level, in functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        assert not (isinstance(node, ast.ImportFrom) and node.level), "a relative import hides what is imported"
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "codeparrot_ds" and len(parts) > 1 and parts[1] in LAYER_OF:
                found.add(".".join(parts[1:3]) if (PACKAGE / parts[1]).is_dir() else parts[1])
    return found


def from_below(module: str, others: set[str]) -> set[str]:
    """Forbidden imports of `module`: modules neither in its subpackage nor in a layer above."""
    own = module.partition(".")[0]
    return {
        other
        for other in others
        if other.partition(".")[0] != own and LAYER_OF[other.partition(".")[0]] >= LAYER_OF[own]
    }


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that form an import cycle, if any."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(graph.get(module, set())):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    assert name_of(path).partition(".")[0] in LAYER_OF, "a new subpackage: give it its place in LAYERS and in the docs"
    assert not from_below(name_of(path), imported(path.read_text(encoding="utf-8")))


def test_no_modules_import_one_another() -> None:
    assert cycle({name_of(path): imported(path.read_text()) for path in modules()}) == []


def unnamed_encodings(source: str) -> list[int]:
    """Lines that read or write text in the encoding of the locale, which is not that of the file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        options = {option.arg: option.value for option in node.keywords}
        literals = [each.value for each in (*node.args, options.get("mode")) if isinstance(each, ast.Constant)]
        modes = [each for each in literals if isinstance(each, str) and re.fullmatch(r"[rwax][bt+]{0,2}", each)]
        if name in ("open", "fdopen", "TemporaryFile", "NamedTemporaryFile"):
            default = {"open": "" if isinstance(node.func, ast.Attribute) else "r", "fdopen": "r"}.get(name, "w+b")
            as_text = "b" not in (modes[0] if modes else default or "b")
        elif name == "write_text":
            as_text = len(node.args) < 2
        elif name in ("run", "Popen", "check_output", "call"):
            as_text = any(name in options for name in ("text", "universal_newlines"))
        else:
            as_text = name in ("read_text", "FileHandler", "TextIOWrapper", "popen")
        if as_text and "encoding" not in options:
            found.append(node.lineno)
    return found


def too_long(lines: dict[str, int]) -> dict[str, int]:
    """Modules that are too long, and so have more than one responsibility."""
    return {name: count for name, count in lines.items() if count > MAX_LINES}


def test_no_module_is_too_long() -> None:
    assert too_long({name_of(path): len(path.read_text().splitlines()) for path in modules()}) == {}


@pytest.mark.parametrize("path", [*modules(), *sorted((ROOT / "launch").glob("*.py"))], ids=lambda path: path.name)
def test_text_files_have_a_named_encoding(path: Path) -> None:
    assert unnamed_encodings(path.read_text(encoding="utf-8")) == []


def test_the_rules_can_be_broken() -> None:
    lazy = "def f():\n    from codeparrot_ds.training import loop\n    import codeparrot_ds.training.ranks"
    assert imported(lazy) == {"training.loop", "training.ranks"}
    assert imported("from codeparrot_ds.errors import ConfigError") == {"errors"}
    assert from_below("corpus.collect", {"training.loop", "documents.read"}) == {"training.loop"}
    assert from_below("export.convert", {"evaluation.loss", "export.write"}) == {"evaluation.loss"}
    assert from_below("training.loop", {"shards.order", "run.recipe", "training.ranks"}) == set()
    assert sorted(cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == ["b", "c"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    for text in (
        *("open(p)", "open(p, 'w')", "p.open('a')", "gzip.open(p, 'rt')", "open(p, mode='r+')", "os.fdopen(f)"),
        *("p.read_text()", "p.write_text(t)", "p.read_text(errors='replace')", "tempfile.NamedTemporaryFile('w')"),
        *("subprocess.run(c, text=True)", "logging.FileHandler(p)", "Popen(c, universal_newlines=True)"),
    ):
        assert unnamed_encodings(text) == [1], text
    for text in (
        "open(p, 'rb')",
        "p.open('wb')",
        "open(p, encoding='utf-8')",
        "p.write_text(t, 'utf-8')",
        "Corpus.open(p)",
    ):
        assert unnamed_encodings(text) == [], text
    assert too_long({"a": 400, "b": 401}) == {"b": 401}


def heavy_imports(statement: str) -> set[str]:
    """Heavy libraries loaded in a new Python process after `statement`."""
    heavy = {"torch", "transformers", "deepspeed", "datasets", "pydantic", "numpy", "pyarrow"}
    code = f"{statement}\nimport sys\nprint(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_preprocessing_starts_without_torch() -> None:
    loaded = heavy_imports(
        "import codeparrot_ds.corpus.collect, codeparrot_ds.tokenizer.train, codeparrot_ds.tokenizer.encode\n"
        "import codeparrot_ds.shards.build, codeparrot_ds.shards.verify, codeparrot_ds.shards.sequences\n"
        "import codeparrot_ds.run.recipe, codeparrot_ds.training.engine, codeparrot_ds.train"
    )
    assert not loaded & {"torch", "transformers", "deepspeed", "datasets"}


def test_the_command_line_imports_no_stage_before_a_command_runs() -> None:
    assert heavy_imports("import codeparrot_ds.cli") == set()


def test_every_public_name_has_a_docstring() -> None:
    missing = []
    for path in modules():
        top = ast.parse(path.read_text()).body
        classes = [node for node in top if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        members = [member for node in classes for member in node.body]
        for node in [*top, *members]:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None and path.parent.name != "cli":
                missing.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}")
    assert not missing


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."]], ids=" ".join)
def test_linters(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_types_of_the_package_and_of_a_script_that_uses_it(tmp_path: Path) -> None:
    (script,) = re.findall(r"^```python\n(import .*?)^```", (ROOT / "docs" / "api.md").read_text(), re.M | re.S)
    flags = "disallow-any-generics, disallow-untyped-calls, no-implicit-reexport, warn-return-any, strict-equality"
    (tmp_path / "script_of_the_page.py").write_text(f"# mypy: {flags}\n{script}", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "-p", "codeparrot_ds", "-m", "script_of_the_page"]
    environment = {**os.environ, "MYPYPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
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
