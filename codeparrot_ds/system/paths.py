"""Paths as users write them, and as they are written to files.

Python decodes the names of files by the locale: a name in UTF-8 is another text under Latin-1 or C. What is written to
a file must not depend on it, so there a name is the text of its bytes in UTF-8.
"""

import glob
import os
from pathlib import Path

Address = str | Path


def is_remote(address: Address) -> bool:
    """Whether `address` is an fsspec URL rather than a path."""
    return isinstance(address, str) and "://" in address


def text_of(path: str | Path) -> str:
    """A path of this process as text: its bytes as UTF-8; those that are not UTF-8 become lone surrogates."""
    try:
        return os.fsencode(path).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # not from the file system or the command line: text already
        return str(path)


def bytes_of(text: str) -> bytes:
    """The path that `text_of` gives as `text`."""
    return text.encode("utf-8", "surrogateescape")


def path_of(text: str | Path) -> Path:
    """The result of `text_of`, or a path in a file, as a path of this process."""
    return Path(os.fsdecode(bytes_of(str(text))))


def printable_name(name: str) -> str:
    """`name` with bytes that are not valid UTF-8 escaped, so that it can be printed."""
    return name.encode(errors="backslashreplace").decode()


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
        return printable_name(text_of(path.absolute()))
    return printable_name(text_of(os.path.relpath(path, Path(directory).resolve())))


def found_address(stored: str, directory: Address) -> str:
    """Where the result of `stored_address` leads. Files of older versions named paths relative to the working
    directory, which still holds for those that are there."""
    if is_remote(stored) or stored.startswith("hub:") or is_remote(directory):
        return stored
    stored = str(path_of(stored))
    found = os.path.normpath(Path(directory).resolve() / stored)
    return stored if not _is_there(found) and _is_there(stored) else found


def _is_there(path: str) -> bool:
    return os.path.lexists(path) or (glob.has_magic(path) and any(glob.iglob(path)))  # noqa: PTH207 (may be absolute)
