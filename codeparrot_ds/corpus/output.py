"""The output directory of a corpus: whether it may be used, is finished, or holds an unfinished run."""

import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.system.files import finished_manifest
from codeparrot_ds.system.inputs_record import Files, require_same_inputs
from codeparrot_ds.system.storage import LocalDirectory, is_remote

WORK = ".work"  # directory for work in progress


def require_outside(arguments: Sequence[str], output: Path) -> None:
    """Raise ConfigError if the result would be input of the next run."""
    for argument in arguments:
        path = argument.removeprefix("file://").removeprefix("local://")
        if path and not is_remote(path) and Path(path).is_dir() and output.is_relative_to(Path(path).resolve()):
            raise ConfigError(
                f"{output}: is inside the input {argument}, so its files would be read as input when the command is "
                "run again. Name an output directory outside."
            )


def require_ours(output: Path, written: Sequence[str] = ()) -> None:
    """Raise ConfigError if there is something in the output directory that an unfinished run did not put there.

    `written`: patterns of the names that it puts there before it is finished.
    """
    if not output.is_dir() or (output / WORK).is_dir():
        return
    found = (path.name for path in output.iterdir() if not path.name.startswith("."))
    if names := sorted(name for name in found if not any(fnmatchcase(name, each) for each in written)):
        raise ConfigError(
            f"{output}: holds other files ({names[0]}{', …' if len(names) > 1 else ''}). Name another output "
            "directory, or empty this one."
        )


def finished_corpus(output: Path, wanted: dict[str, Any], files: Files) -> dict[str, Any] | None:
    """The manifest of a finished corpus of this input and these options. Raises DataError if it is another one."""
    if finished := finished_manifest(output, "corpus", wanted):
        require_same_inputs(LocalDirectory(output), "corpus", files)
    return finished


def remove_work(output: Path) -> None:
    """Remove what only an unfinished run needs."""
    shutil.rmtree(output / WORK, ignore_errors=True)
    for lock in output.glob(".lock*"):
        lock.unlink(missing_ok=True)
    LocalDirectory(output).remove_leftovers()
