#!/usr/bin/env python3
"""Create .venv and install this package into it with the pinned constraints. Requires only Python 3.11.

Run it again to resume: pip caches its wheels, and a finished installation is not changed.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
FINISHED = (
    VENV / "installed.sha256"
)  # digest of the installed requirements; missing while an installation is incomplete
RESULTS = [ROOT / "runs" / "quickstart", ROOT / "runs" / "quickstart-data"]

# required program, Python module or C header -> Debian package that provides it
BASE_PACKAGES = {"module:ensurepip": f"python3.{sys.version_info.minor}-venv", "c++": "g++"}
TEST_PACKAGES = {
    "pdsh": "pdsh",
    "sshd": "openssh-server",
    "ip": "iproute2",
    "header:libaio.h": "libaio-dev",
    "mpirun": "openmpi-bin",
    "slurmctld": "slurm-wlm",
    "munged": "munge",
    "bwrap": "bubblewrap",
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
}


def main() -> None:
    """Install everything requested, and print each command before running it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--fresh", action="store_true", help="remove .venv and the quickstart's results, then start over"
    )
    parser.add_argument("--offline-wheels", type=Path, metavar="DIR", help="install from DIR, without a network")
    parser.add_argument(
        "--torch-index", metavar="URL", help="package index to install torch from, e.g. one with CPU builds"
    )
    parser.add_argument("--test", action="store_true", help="also install the test dependencies")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs before any other version check)
        fail(f"Python 3.11 or newer is required, but this is {sys.version.split()[0]}. Set PYTHON=python3.11 launch/…")
    if options.offline_wheels is not None and not options.offline_wheels.is_dir():
        fail(f"{options.offline_wheels}: no such directory of wheels. Create one with launch/wheelhouse.sh.")
    if options.offline_wheels is not None:
        options.offline_wheels = options.offline_wheels.resolve()
    os.chdir(ROOT)
    if options.fresh:
        for path in [VENV, *RESULTS]:
            shutil.rmtree(path, ignore_errors=True)
    install_system_packages({**BASE_PACKAGES, **(TEST_PACKAGES if options.test else {})})
    install_python_packages(options)


def install_system_packages(needed: dict[str, str]) -> None:
    """Install missing packages with apt if permitted; otherwise print the command to run."""
    missing = [package for program, package in needed.items() if not is_there(program)]
    if not missing:
        return
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    may = shutil.which("apt-get") and (not as_root or (shutil.which("sudo") and succeeds([*as_root, "true"])))
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if may:
        environment = [*as_root, "env", "DEBIAN_FRONTEND=noninteractive"]
        run([*environment, "apt-get", "update", "-q"], quiet=True)
        run([*environment, *install], quiet=True)
        missing = [package for program, package in needed.items() if not is_there(program)]
    if missing:
        fail(f"missing on this machine: {', '.join(missing)}. Run this, then try again:\n  sudo {shlex.join(install)}")


def is_there(program: str) -> bool:
    """Whether a program is on PATH, a module can be imported by this Python, or a header exists."""
    if program.startswith("header:"):
        return Path("/usr/include", program.removeprefix("header:")).exists()
    if program.startswith("module:"):
        return succeeds([sys.executable, "-c", f"import {program.removeprefix('module:')}"])
    return (
        shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is not None
    )  # sshd is not on a user's PATH


def install_python_packages(options: argparse.Namespace) -> None:
    """Create the virtual environment and install into it, torch first, because unpinned it pulls gigabytes of CUDA."""
    inputs = [ROOT / "constraints.txt", ROOT / "pyproject.toml"]
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in inputs) + sys.version.encode()).hexdigest()
    extra = "test" if options.test else "corpus"  # `test` contains `corpus`
    installed = FINISHED.read_text(encoding="utf-8") if FINISHED.exists() else ""
    if installed in (f"{wanted} {extra}", f"{wanted} test"):
        print(f"{VENV.name} is ready.", flush=True)
        return
    python = VENV / "bin" / "python"
    if not python.exists() or not succeeds([str(python), "-c", "import pip"]):
        run([sys.executable, "-m", "venv", "--clear", VENV.name])
    FINISHED.unlink(missing_ok=True)
    install = [".venv/bin/pip", "install", "--quiet", "--constraint", "constraints.txt"]
    if options.offline_wheels is not None:
        install += ["--no-index", "--find-links", str(options.offline_wheels)]
    torch_index = ["--index-url", options.torch_index] if options.torch_index else []
    run([*install, *torch_index, "torch"])
    run([*install, "--editable", f".[{extra}]"])
    FINISHED.write_text(f"{wanted} {extra}", encoding="utf-8")


def run(command: list[str], quiet: bool = False) -> None:
    """Print and run a command; if it fails, exit with its output and an error message."""
    print(f"$ {shlex.join(command)}", flush=True)
    result = subprocess.run(
        command, check=False, encoding="utf-8", errors="replace", stdout=subprocess.PIPE if quiet else None, stderr=None
    )
    if result.returncode:
        if quiet:
            print(result.stdout, file=sys.stderr)
        fail(f"`{shlex.join(command)}` failed with exit code {result.returncode}, see above. Fix it and run again.")


def succeeds(command: list[str]) -> bool:
    """Whether a command exits with 0; its output is not shown."""
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def fail(message: str) -> None:
    """Print an error message and exit with code 1."""
    sys.exit(f"error: {message}")


if __name__ == "__main__":
    main()
