"""How `doctor` judges the facts that a host reports."""

import ast
import copy
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from codeparrot_ds.doctor import probe
from codeparrot_ds.doctor.examine import _IMPORTS, _files, _import, blame, rounds
from codeparrot_ds.doctor.judge import COLUMNS, Expected, Report, judge
from codeparrot_ds.run.recipe import Recipe

HERE: dict[str, Any] = {
    "asked_seconds": 0.4,
    "skew_seconds": 0.0,
    "hostname": "a",
    "addresses": {"a": "127.0.1.1", "b": "192.0.2.2"},
    "python": "3.11.7",
    "executable": "/venv/bin/python",
    "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"},
    "source": "abc",
    "gpus": [["H100", "570.1", "81559 MiB"]] * 8,
    "memory_bytes": 10**12,
    "disk_bytes": {"runs": 10**13},
    "temporary_bytes": 10**11,
    "shards": {"/d": "x"},
    "files": {"/d": []},
    "sees": True,
    "compiler": "/usr/bin/g++",
    "ninja": "/venv/bin/ninja",
    "ops": {"cpu_adam": False},
    "port_free": True,
}


FILES = {"/d": dict.fromkeys(["a.bin", *map(str, range(9))], 1000)}


def row(cpu: bool = False, shared_disk: bool = True, **facts: Any) -> Any:
    """Return the report of a host that differs from this machine in `facts`."""
    expected = Expected(HERE, {"a": 8}, ["/d"], ["cpu_adam"], {"runs": 10**12}, True, cpu, shared_disk, FILES)
    return judge("a", {**copy.deepcopy(HERE), **facts}, expected)


def test_a_host_like_this_one_passes() -> None:
    report = row()
    assert report.red == {}
    assert set(COLUMNS) - set(report.cells) == {"links"}


@pytest.mark.parametrize(
    ("facts", "column", "problem"),
    [
        ({"skew_seconds": -7.25}, "clock", "its clock is off by -7.2 s: enable NTP"),
        ({"python": "3.12.1"}, "software", "python 3.12.1, here 3.11.7"),
        ({"packages": {"torch": "2.12.0", "deepspeed": None}}, "software", "torch 2.12.0, here 2.13.0; deepspeed None"),
        ({"gpus": [["H100", "535.0", "x"]] * 8}, "software", "driver 535.0, here 570.1"),
        ({"source": "abd"}, "software", "source differs from the one here"),
        ({"gpus": [["H100", "570.1", "x"]] * 7}, "slots", "slots=8, but it has 7 GPUs"),
        ({"disk_bytes": {"runs": 10**11}}, "disk", "100.0 GB free for its runs directory, 1,000.0 GB needed"),
        ({"disk_bytes": {"runs": None}}, "disk", "is not writable"),
        ({"temporary_bytes": 5}, "disk", "0.0 GB free for its temporary directory"),
        ({"memory_bytes": 10**9}, "memory", "1.0 GB of memory available"),
        ({"shards": {"/d": None}}, "data", "/d/manifest.json is missing"),
        ({"shards": {"/d": "y"}}, "data", "/d/manifest.json differs from the one here"),
        ({"files": {"/d": [["a.bin", None]]}}, "data", "/d: a.bin is missing: place the same shards"),
        ({"files": {"/d": [["a.bin", 5]]}}, "data", "/d: a.bin has 5 bytes, not 1,000"),
        ({"files": {"/d": [[str(n), 5] for n in range(8)]}}, "data", "4 has 5 bytes, not 1,000 and 3 more"),
        (
            {"packages": {"torch": "2.13.0", "deepspeed": "0.19.8", "regex": "1.0"}},
            "software",
            "regex 1.0, here None",
        ),
        ({"sees": False}, "shared", "put `runs` on a shared disk"),
        ({"compiler": None}, "compiler", "DeepSpeed compiles cpu_adam: install g++ and ninja there"),
        ({"port_free": False}, "port", "in use there"),
        ({"addresses": {"a": "127.0.1.1", "b": None}}, "name", "cannot resolve b"),
        ({"addresses": {"a": "127.0.1.1", "b": "127.0.1.1"}}, "name", "resolves b to loopback"),
    ],
)
def test_a_difference_fails_and_says_how_to_fix_it(facts: dict[str, Any], column: str, problem: str) -> None:
    report = row(**facts)
    assert set(report.red) == {column}
    assert problem in report.red[column]


def test_harmless_differences_pass() -> None:
    assert row(compiler=None, ops={"cpu_adam": True}).red == {}  # built already
    assert row(cpu=True, gpus=[], packages=HERE["packages"]).red.keys() <= {"software"}  # no driver there
    assert row(skew_seconds=1.9).red == {}
    own = row(shared_disk=False, sees=False)
    assert (own.red, own.cells["shared"]) == ({}, "own disk")


def test_a_host_that_cannot_be_queried_has_one_failed_check() -> None:
    expected = Expected(HERE, {"a": 8})
    report = judge("a", {"error": "Connection refused"}, expected)
    assert list(report.red) == ["ssh"] and "Connection refused" in report.red["ssh"]
    table = Report([report, row()], {("a", "b"): 1e9, ("b", "a"): 1.25e9}).table()
    assert table[0].split() == ["host", *COLUMNS]
    assert table[1].split()[:3] == ["a", "!", "no"]
    assert table[-1] == "links: 2 measured, median 9.00 Gb/s, slowest a to b 8.00 Gb/s"


def test_the_host_that_explains_most_is_to_blame() -> None:
    others = ["a", "c", "d"]
    lame = [("b", each) for each in others] + [(each, "b") for each in others]
    assert set(blame(lame)) == {"b"} and len(blame(lame)["b"]) == 6
    assert set(blame(("b", each) for each in others)) == {"b"}  # it cannot send
    assert set(blame((each, "b") for each in others)) == {"b"}  # it cannot receive
    assert set(blame([*lame, ("c", "d")])) == {"b", "c", "d"}
    assert set(blame([("a", "c")])) == {"a", "c"}  # either could be at fault
    assert blame([]) == {}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16])
def test_rounds_hold_every_pair_once_and_a_host_once_a_round(count: int) -> None:
    found = list(rounds(count))
    pairs = [frozenset(pair) for pairs in found for pair in pairs]
    assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
    for pairs_of_round in found:
        ends = [end for pair in pairs_of_round for end in pair]
        assert len(ends) == len(set(ends))


def test_the_probe_answers_on_a_python_that_has_nothing_else() -> None:
    """A host where the package was never installed."""
    wanted = {"names": ["localhost"], "shards": ["/nowhere"], "ops": ["cpu_adam"], "port": 0, "runs": "/tmp/x/y"}
    said = subprocess.run(
        [sys.executable, "-I", "-S", probe.__file__],
        input=json.dumps(["facts", wanted]) + "\n" + json.dumps(["measure", ["127.0.0.1", 1]]) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    facts, measured = map(json.loads, said.stdout.splitlines())
    assert facts["packages"] == dict.fromkeys(probe.PACKAGES) and facts["source"] is None
    assert facts["addresses"] == {"localhost": "127.0.0.1"} and facts["shards"] == {"/nowhere": None}
    assert "refused" in measured["error"]
    port = probe.listen()
    link = probe.measure("127.0.0.1", port)
    assert link["bandwidth"] > 1e6


def test_all_packages_that_ours_needs_are_compared() -> None:
    found = probe._packages()
    assert set(probe.PACKAGES) <= set(found)
    assert {"safetensors", "pyyaml", "regex", "pydantic-core"} <= set(found)  # also those that those need
    assert "wandb" not in found and "ruff" not in found  # of extras
    assert found["numpy"] == importlib.metadata.version("numpy")


def test_files_of_another_size_are_found(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    assert probe._different(str(tmp_path), {"a": 3}) == []
    assert probe._different(str(tmp_path), {"a": 4, "b": 0}) == [["a", 3], ["b", None]]


def test_the_files_that_ranks_read_are_compared(tiny_recipe: dict[str, Any], data: Path) -> None:
    model = data / "tokenizer"  # stands for a directory of weights
    tiny_recipe["model"]["init_from"] = str(model)
    found = _files(Recipe.model_validate(tiny_recipe))
    assert set(found) == {str(data / "shards"), str(data / "shards" / "tokenizer"), str(model)}
    for directory, files in found.items():
        assert files == {name: (Path(directory) / name).stat().st_size for name in files}
    shards = {path.name for path in (data / "shards").iterdir() if path.suffix in (".bin", ".idx", ".parquet")}
    assert set(found[str(data / "shards")]) == shards
    assert "tokenizer.json" in found[str(data / "shards" / "tokenizer")]


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        (["json"], ""),
        (["no_such_module"], "ModuleNotFoundError: No module named 'no_such_module'"),
        (["codeparrot_ds.run", "this_dies"], "No module named 'this_dies'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(modules: list[str], problem: str) -> None:
    rank = probe.Rank()
    assert rank.all_reduce({"seconds": 1}) == {"error": "not started"}
    found = rank.imports(modules)
    assert problem in found.get("error", "") and bool(problem) == bool(found)


def test_a_rank_that_cannot_import_fails_the_software_check() -> None:
    report = Report([row()])
    broken: Any = SimpleNamespace(host="a", ask=lambda *arguments: {"error": "ImportError: libcudart.so.13"})
    _import(report, [broken], ["torch"])
    assert "its ranks cannot start (ImportError: libcudart.so.13)" in report.hosts[0].red["software"]


def test_what_a_rank_imports_later_is_imported() -> None:
    """Modules that functions import are not imported with the modules that hold them."""
    package = Path(probe.__file__).parents[1]
    later = set()
    for path in [package / "train.py", *(package / "training").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            for node in ast.walk(function):
                names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                later |= {name.partition(".")[0] for name in names}
    known = {name.partition(".")[0] for name in _IMPORTS} | set(sys.stdlib_module_names)
    # torch comes with the modules of training, and wandb is for rank 0 alone.
    assert later - known == {"torch", "wandb"}
    assert "transformers" in later and "safetensors" in later
