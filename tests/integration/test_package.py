"""`pip install .`: the wheel contains every module and installs the command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.trees import copy_tree


@pytest.mark.slow
def test_an_installed_wheel_gives_the_command(tmp_path: Path) -> None:
    source, site = copy_tree(tmp_path / "clone"), tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(source)]
    subprocess.run(install, check=True)
    modules = {path.relative_to(ROOT) for path in (ROOT / "codeparrot_ds").rglob("*.py")}
    assert {path.relative_to(site) for path in (site / "codeparrot_ds").rglob("*.py")} == modules

    for ours in (*(ROOT / "launch" / "recipes").iterdir(), *(ROOT / "ds_configs").iterdir()):
        (installed,) = (site / "codeparrot_ds").glob(f"*/{ours.name}")
        assert installed.read_bytes() == ours.read_bytes()
    assert (site / "codeparrot_ds" / "py.typed").exists()

    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = "import codeparrot_ds; print(codeparrot_ds.__file__)"
    found = subprocess.check_output([sys.executable, "-c", where], env=environment, cwd=tmp_path, text=True)
    assert found.startswith(str(site))
    command = [str(site / "bin" / "codeparrot-ds"), "--version"]
    version = subprocess.check_output(command, env=environment, cwd=tmp_path, text=True)
    assert version.strip() == "0.1.0"
    init = [str(site / "bin" / "codeparrot-ds"), "init", "new"]
    assert subprocess.check_output(init, env=environment, cwd=tmp_path, text=True) == "new/recipe.yaml\nnew/hostfile\n"
    load = "from codeparrot_ds.run.recipe import *; print(load_recipe(Path('quickstart')).engine.deepspeed)"
    found = subprocess.check_output([sys.executable, "-c", load], env=environment, cwd=tmp_path, text=True)
    assert found.strip() == str(site / "codeparrot_ds" / "ds_configs" / "zero3.json")
