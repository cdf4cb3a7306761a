"""Environments of peers: one each, so that none decides which versions another gets, or ours with more packages."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"  # pinned: where pip knows a CPU build of just this version, gigabytes of CUDA stay away


@dataclass(frozen=True)
class Environment:
    """A virtual environment that is ready.

    Attributes:
        python: its interpreter.
        versions: of all its packages, by name.
    """

    python: Path
    versions: dict[str, str]


def environment(directory: Path, packages: tuple[str, ...], at_start: str = "") -> Environment:
    """The environment in `directory` with `packages`; it is made when it is not there, which takes minutes.

    `at_start` is code that its interpreter runs whenever it starts.
    """
    python = directory / "bin" / "python"
    receipt = directory / "installed.json"  # written last: without it an installation was cut short
    asked = {"packages": list(packages), "at_start": at_start}
    if not receipt.exists() or json.loads(receipt.read_text()) != asked:
        print(f"making {directory}: {', '.join(packages)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True, env=plain_env())
        site_packages = next((directory / "lib").glob("python*/site-packages"))
        (site_packages / "sitecustomize.py").write_text(at_start)
        receipt.write_text(json.dumps(asked))
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, env=plain_env()
    )
    return Environment(python, {package["name"]: package["version"] for package in json.loads(listed.stdout)})


def layer(directory: Path, *packages: str) -> Path:
    """A directory with `packages`, without what they need, to be named in PYTHONPATH over this environment.

    What they need is here already, in the versions that we use: with those, and no others, they are to be compared.
    """
    receipt = directory / "installed.json"
    if not receipt.exists() or json.loads(receipt.read_text()) != list(packages):
        print(f"making {directory}: {', '.join(packages)}", file=sys.stderr, flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory)]
        subprocess.run([*command, *packages], check=True)
        receipt.write_text(json.dumps(packages))
    return directory


def plain_env(**more: str) -> dict[str, str]:
    """This process's environment variables without those that would lend its packages to another interpreter."""
    lending = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if key not in lending} | more
