"""The sdist and the wheel hold all that the package needs, and the wheel alone is enough to use it."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from tests.conftest import ROOT, once
from tests.trees import bash, copy_tree

NAME = "codeparrot_ds-0.1.0"


def build(kind: str, source: Path, output: Path) -> Path:
    """Build an "sdist" or a "wheel" of a source tree by the build backend, without a network."""
    hook = f"from setuptools.build_meta import build_{kind} as build; build({str(output)!r})"
    subprocess.run([sys.executable, "-c", hook], cwd=source, check=True, capture_output=True)
    (built,) = output.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return built


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with a copy of the tree, `clone`; its sdist; and in `wheel` the wheel built from the sdist."""

    def make(directory: Path) -> None:
        sdist = build("sdist", copy_tree(directory / "clone"), directory)
        with tarfile.open(sdist) as archive:
            archive.extractall(directory, filter="data")
        (directory / "wheel").mkdir()
        build("wheel", directory / NAME, directory / "wheel")

    return once(tmp_path_factory, "distributions", make)


def contents(wheel: Path) -> dict[str, bytes]:
    """Each file of a wheel, without what pip writes anew for every installation."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def wheel_in(directory: Path) -> Path:
    """The one wheel of a directory."""
    (wheel,) = directory.glob("*.whl")
    return wheel


@pytest.fixture
def installed(distributions: Path, tmp_path: Path) -> dict[str, str]:
    """Environment of a user who installed the wheel into a virtual environment, and nothing from this tree."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = str(venv / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, wheel_in(distributions / "wheel")], check=True)
    # The requirements are those of these tests; a .pth file that is in their directory, of this tree, is not read.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    program = Path(sys.executable).with_name("deepspeed").read_text(encoding="utf-8")
    (venv / "bin" / "deepspeed").write_text(f"#!{python}\n{program.partition(chr(10))[2]}", encoding="utf-8")
    (venv / "bin" / "deepspeed").chmod(0o755)
    kept = {name: os.environ[name] for name in ("HOME", "HF_HUB_OFFLINE") if name in os.environ}
    return {**kept, "PATH": f"{venv}/bin:/usr/bin:/bin", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(distributions: Path) -> None:
    clone = distributions / "clone"
    files = {}
    for directory, _, names in os.walk(clone / "codeparrot_ds", followlinks=True):
        files |= {str(Path(directory, name).relative_to(clone)): Path(directory, name).read_bytes() for name in names}
    # Recipes, DeepSpeed JSON and the hostfile are links to where users of a clone look for them.
    assert {f"codeparrot_ds/recipes/{path.name}" for path in (ROOT / "launch" / "recipes").iterdir()} < set(files)
    assert {f"codeparrot_ds/ds_configs/{path.name}" for path in (ROOT / "ds_configs").iterdir()} < set(files)
    found = contents(wheel_in(distributions / "wheel"))
    metadata = {name for name in found if name.startswith(f"{NAME}.dist-info/")}
    assert {name: text for name, text in found.items() if name not in metadata} == files
    assert f"{NAME}.dist-info/licenses/LICENSE" in metadata
    in_sdist = {path.name for path in (distributions / NAME).iterdir()}
    assert {"CHANGELOG.md", "constraints.txt", "LICENSE", "README.md"} < in_sdist


@pytest.mark.slow
def test_the_metadata_say_what_it_is(distributions: Path) -> None:
    metadata = message_from_bytes(contents(wheel_in(distributions / "wheel"))[f"{NAME}.dist-info/METADATA"])
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"
    description = metadata.get_payload(decode=True)
    assert isinstance(description, bytes)
    assert description.decode().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert set(metadata.get_all("Provides-Extra", [])) == {"corpus", "evaluate", "ray", "s3", "test", "wandb"}
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


@pytest.mark.slow
def test_an_installed_wheel_gives_the_command(installed: dict[str, str], tmp_path: Path) -> None:
    def run(*command: str) -> str:
        return subprocess.check_output(command, env=installed, cwd=tmp_path, text=True).strip()

    assert run("codeparrot-ds", "--version") == "0.1.0"
    assert run("codeparrot-ds", "init", "new") == "new/recipe.yaml\nnew/hostfile"
    load = "import codeparrot_ds as c; print(c.__file__, c.load_recipe('quickstart').engine.deepspeed, sep='\\n')"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages/codeparrot_ds")
    assert run("python", "-c", load) == f"{site}/__init__.py\n{site}/ds_configs/zero3.json"


@pytest.mark.nightly
def test_the_tree_and_its_sdist_give_the_same_wheel(distributions: Path, tmp_path: Path) -> None:
    wheel = build("wheel", distributions / "clone", tmp_path)
    assert contents(wheel) == contents(wheel_in(distributions / "wheel"))


SMALL = """
model.vocab_size=1024 model.seq_len=64 model.n_layer=1 model.n_head=2 model.n_embd=32 data.shards=data/shards
batch.global_batch_size=4 batch.micro_batch_size=auto schedule.steps=4 schedule.warmup_steps=1 engine.precision=fp32
evaluation.every_steps=2 evaluation.sequences=8 checkpoints.every_steps=2
"""
WALK = """
codeparrot-ds init .
codeparrot-ds corpus collect "$LIBRARY/asyncio" "$LIBRARY/email" -o data/raw
codeparrot-ds corpus clean data/raw -o data/corpus
codeparrot-ds tokenizer train data/corpus --vocab-size 1024 --max-seq-len 64 -o data/tokenizer
codeparrot-ds shards build data/corpus --tokenizer data/tokenizer --valid-fraction 0.1 -o data/shards
codeparrot-ds shards verify data/shards --deep
codeparrot-ds launch quickstart --ranks 2 --set name=by-name {settings}
codeparrot-ds launch recipe.yaml --ranks 2 --set name=by-file {settings}
codeparrot-ds convert runs/by-file runs/by-file/hf
codeparrot-ds complete runs/by-file 'def main():' --num 1
codeparrot-ds report runs/by-name --model runs/by-file/hf --tokenizer data/tokenizer --summary summary.json
codeparrot-ds status runs/by-file
"""


@pytest.mark.nightly
def test_the_verbs_of_the_quickstart_run_outside_a_checkout(installed: dict[str, str], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    settings = " ".join(f"--set {setting}" for setting in SMALL.split())
    environment = {**installed, "LIBRARY": sysconfig.get_path("stdlib")}
    done = bash("set -x\n" + WALK.format(settings=settings), empty, environment)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("step 4: checkpoint runs/by-") == 2
    assert json.loads((empty / "summary.json").read_text(encoding="utf-8"))["tokens"] > 100_000
    assert "finished, trained to its last step" in done.stdout


WRONG = """
import codeparrot_ds
from codeparrot_ds import complete, load_model, load_recipe, open_shards, no_such_name

open_shards(3, seq_len=4)
open_shards("a", seq_len="long")
print(complete(load_model("m"), "x")[0].texts)
print(load_recipe("quickstart").model.layers)
codeparrot_ds.nothing()
"""


@pytest.mark.nightly
def test_scripts_of_users_are_type_checked_against_the_installed_package(
    installed: dict[str, str], tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    (tmp_path / "script.py").write_text(page.rpartition("```python\n")[2].partition("```")[0], encoding="utf-8")
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n[mypy-torch.*,transformers.*,deepspeed.*]\nfollow_imports = skip\n", encoding="utf-8"
    )
    python = tmp_path / "venv" / "bin" / "python"
    mypy = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--python-executable", python]
    done = subprocess.run(
        [*mypy, "script.py", "wrong.py"], cwd=tmp_path, env=installed, capture_output=True, text=True, check=False
    )
    wrong = [int(line.split(":")[1]) for line in done.stdout.splitlines() if line.startswith("wrong.py:")]
    assert wrong == [3, 5, 6, 7, 8, 9], done.stdout + done.stderr
    assert "script.py:" not in done.stdout
