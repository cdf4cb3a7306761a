"""Make the directory of somebody's repositories from packages that are installed here, with what such directories hold.

Four git repositories and a copy of one; a virtual environment and node_modules inside; a notebook, JavaScript, C, an
image; an access key in a file; files in Latin-1, declared and not; a link to a directory above.

Usage: python make_repositories.py DIRECTORY
"""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGES = Path(sysconfig.get_path("purelib"))
REPOSITORIES = {
    "webclient": (("urllib3", "idna", "requests"), "git@github.com:alice/webclient.git"),
    "console": (("rich", "click", "typer"), ""),
    "science": (("networkx", "sympy"), "https://alice:t0k3n@gitlab.example.org/lab/science.git"),
    "templates": (("jinja2", "yaml"), ""),
}
UPLOAD = """import boto3

KEY = "AKIAIOSFODNN7EXAMPLQ"
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzq8fTk2Lw0"


def upload(files):
    for name in files:
        client = boto3.client("s3", aws_access_key_id=KEY, aws_secret_access_key=SECRET)
        client.upload_file(name, "bucket", name)
"""


def git(directory: Path, *words: str) -> None:
    """Run git in a repository."""
    identity = ("-c", "user.name=Alice", "-c", "user.email=alice@example.org")
    subprocess.run(["git", *identity, "-C", str(directory), *words], check=True)


def write(path: Path, content: bytes) -> None:
    """Write a file, in directories that are made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def main() -> None:
    """Make the directory."""
    root = Path(sys.argv[1])
    for name, (packages, remote) in REPOSITORIES.items():
        directory = root / name
        directory.mkdir(parents=True)
        for package in packages:
            shutil.copytree(PACKAGES / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
        git(directory, "init", "--quiet", "--initial-branch=main")
        if remote:
            git(directory, "remote", "add", "origin", remote)
        git(directory, "add", "--all")
        git(directory, "commit", "--quiet", "--message=start")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / "webclient" / ".venv")], check=True)
    write(root / "webclient" / "upload.py", UPLOAD.encode())
    write(root / "console" / "node_modules" / "left-pad" / "index.js", b"module.exports = 1\n")
    write(root / "console" / "web" / "app.js", b"export const answer = () => 42\n")
    write(root / "science" / "fast.c", b"int twice(int x) { return 2 * x; }\n")
    write(root / "science" / "plot.png", b"\x89PNG\r\n\x1a\n" + bytes(1000))
    cell = {"cell_type": "code", "source": ["import networkx as nx\n"], "outputs": [], "metadata": {}}
    write(root / "science" / "analysis.ipynb", json.dumps({"cells": [cell], "nbformat": 4, "metadata": {}}).encode())
    write(root / "templates" / "latin_declared.py", "# -*- coding: latin-1 -*-\nname = 'José'\n".encode("latin-1"))
    write(root / "templates" / "latin.py", "name = 'José'\n".encode("latin-1"))
    (root / "templates" / "above").symlink_to("..")
    shutil.copytree(root / "webclient", root / "webclient-old", symlinks=True)


if __name__ == "__main__":
    main()
