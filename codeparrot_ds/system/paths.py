"""Paths as users write them, and as they are written to files."""

import glob
import os
from pathlib import Path

Address = str | Path


def is_remote(address: Address) -> bool:
    """Whether `address` is an fsspec URL rather than a path."""
    return isinstance(address, str) and "://" in address


def expand_user(path: Path) -> Path:
    """`path` with a leading `~` or `~user` replaced by the home directory; unchanged if there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises for an unknown user)


def expand_address(address: Address) -> Address:
    """`address` with a leading `~` of a path replaced by the home directory."""
    return address if is_remote(address) else type(address)(os.path.expanduser(address))  # noqa: PTH111 (see above)


def stored_address(address: str, directory: Address) -> str:
    """The form in which a file in `directory` names `address`: a relative path becomes relative to the directory."""
    if is_remote(address) or address.startswith("hub:"):
        return address
    path = expand_user(Path(address))
    if path.is_absolute() or is_remote(directory):
        return str(path.absolute())
    return os.path.relpath(path, Path(directory).resolve())


def found_address(stored: str, directory: Address) -> str:
    """Where the result of `stored_address` leads. Files of older versions named paths relative to the working
    directory, which still holds for those that are there."""
    if is_remote(stored) or stored.startswith("hub:") or is_remote(directory):
        return stored
    found = os.path.normpath(Path(directory).resolve() / stored)
    return stored if not _is_there(found) and _is_there(stored) else found


def _is_there(path: str) -> bool:
    return os.path.lexists(path) or (glob.has_magic(path) and any(glob.iglob(path)))  # noqa: PTH207 (may be absolute)
