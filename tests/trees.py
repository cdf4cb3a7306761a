"""Copies of this tree, like a clone."""

import shutil
import subprocess
from pathlib import Path

from tests.conftest import ROOT


def copy_tree(target: Path) -> Path:
    """Copy all tracked and untracked, non-ignored files to `target`, which is created and returned."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if not (ROOT / name).exists():  # deleted but not yet committed
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target
