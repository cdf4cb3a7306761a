"""The record of the files that a finished directory was made from, so that a later call notices that they changed.

It is kept beside the manifest and not in it, because it depends on where and when the files were written: the same
content has the same manifest everywhere.
"""

import json
from collections.abc import Iterable

from codeparrot_ds.errors import DataError
from codeparrot_ds.system.jobs import say
from codeparrot_ds.system.storage import Directory

INPUTS_RECORD = "inputs.json"
_SHOWN = 3

Files = dict[str, tuple[int, str]]  # name -> size (bytes), and modification time (ns), tag or digest


def encode_record(files: Files) -> bytes:
    """The content of the record: one file to a line."""
    rows = (f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in sorted(files.items()))
    return ("{\n" + ",\n".join(rows) + "\n}\n").encode()


def require_same_inputs(directory: Directory, kind: str, files: Files) -> None:
    """Raise DataError when the finished `directory` was made from other files than `files`, or from older versions.

    A directory without a record, from an earlier version of this package, is accepted with a note.
    """
    if not directory.exists(INPUTS_RECORD):
        say(f"note: {directory}: an older version made it without recording its input files: not checked for changes.")
        return
    try:
        stored = json.loads(directory.read(INPUTS_RECORD))
        recorded: Files = {name: (int(size), str(version)) for name, (size, version) in stored.items()}
    except (ValueError, TypeError, AttributeError):
        raise DataError(
            f"{directory}/{INPUTS_RECORD}: damaged. Remove it if the input files have not changed since."
        ) from None
    changes = [
        *_describe("changed", (name for name in files if name in recorded and files[name] != recorded[name])),
        *_describe("new", files.keys() - recorded.keys()),
        *_describe("no longer there", recorded.keys() - files.keys()),
    ]
    if changes:
        raise DataError(
            f"{directory}: contains finished {kind} of other input files ({'; '.join(changes)}). Name another output "
            "directory, or remove this one."
        )


def _describe(what: str, names: Iterable[str]) -> list[str]:
    listed = sorted(names)
    if not listed:
        return []
    shown = ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "")
    return [f"{len(listed):,} {what}: {shown}"]
