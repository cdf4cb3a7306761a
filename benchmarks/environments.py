"""Environments of peers: a separate one each, so that version constraints do not interfere, or ours plus packages."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"  # pinned, so that pip can pick an available CPU build instead of gigabytes of CUDA


@dataclass(frozen=True)
class Environment:
    """An installed virtual environment.

    Attributes:
        python: path of its interpreter.
        versions: package name -> version.
    """

    python: Path
    versions: dict[str, str]


def environment(directory: Path, packages: tuple[str, ...], at_start: str = "") -> Environment:
    """Return the environment in `directory` with `packages`, creating it if needed, which takes minutes.

    Args:
        directory: where the environment is kept.
        packages: pip requirements.
        at_start: code that its interpreter runs at every start.
    """
    python = directory / "bin" / "python"
    receipt = directory / "installed.json"  # written last: without it the installation is incomplete
    asked = {"packages": list(packages), "at_start": at_start}
    if not receipt.exists() or json.loads(receipt.read_text()) != asked:
        print(f"installing {directory}: {', '.join(packages)}", file=sys.stderr, flush=True)
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
    """Install `packages` without dependencies into `directory`, to be put on PYTHONPATH over this environment.

    Their dependencies are already installed here, in the versions that we use and compare with.
    """
    receipt = directory / "installed.json"
    if not receipt.exists() or json.loads(receipt.read_text()) != list(packages):
        print(f"installing {directory}: {', '.join(packages)}", file=sys.stderr, flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory)]
        subprocess.run([*command, *packages], check=True)
        receipt.write_text(json.dumps(packages))
    return directory


def plain_env(**more: str) -> dict[str, str]:
    """This process's environment variables, except those that expose its packages to another interpreter."""
    lending = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if key not in lending} | more
