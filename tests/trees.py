"""Copies of this tree, as a clone would have it."""

import shutil
import subprocess
from pathlib import Path

from tests.conftest import ROOT


def copy_tree(target: Path) -> Path:
    """Copy what git tracks or would track to `target`, which is made and returned."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if not (ROOT / name).exists():  # removed and not yet committed
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target
