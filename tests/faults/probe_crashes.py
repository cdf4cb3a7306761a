"""Build shards repeatedly, each time killed before a different file operation, and report failed recoveries.

Run as `python -m tests.faults.probe_crashes TOKENIZER SCRATCH SHARD_TOKENS INPUT...`; prints one JSON object. This is a
separate process without threads, so that each build is a fork of it and takes milliseconds.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

from codeparrot_ds.errors import UserError
from codeparrot_ds.shards import preload
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.shards.verify import verify
from codeparrot_ds.system.files import MANIFEST
from tests.shard_commands import files_of

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}  # Python audit events, raised before the operation
assert preload.LIBRARIES


class Command(NamedTuple):
    """Parameters of a build."""

    inputs: list[str]
    tokenizer: Path
    shard_tokens: int


def build_until(crash_at: int, command: Command, output: Path) -> tuple[int, str]:
    """Build in a fork that SIGKILLs itself before its operation number `crash_at` on files in `output`.

    Returns:
        The wait status, and the operation reached.
    """
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event not in EVENTS or not str(arguments[0]).startswith(str(output)):
                return
            count += 1
            if count == crash_at:
                os.write(writer, f"{event} {arguments[0]}".encode())
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            build(
                command.inputs,
                command.tokenizer,
                output,
                BuildOptions(shard_tokens=command.shard_tokens, valid_fraction=0.2, on_bad_document="skip", workers=1),
            )
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    with open(reader, "rb") as pipe:
        return status, pipe.read().decode().replace(str(output), "OUTPUT")


def main(command: Command, scratch: Path) -> None:
    """Crash at the first operation, the second and so on, until a build completes."""
    status, _ = build_until(0, command, scratch / "whole")
    assert status == 0
    whole = files_of(scratch / "whole")
    crashes, wrong = 0, []
    while True:
        output = scratch / "crashed"
        status, operation = build_until(crashes + 1, command, output)
        if status == 0:
            break
        assert os.WIFSIGNALED(status), status
        crashes += 1
        problem = None
        if (output / MANIFEST).exists():
            try:
                verify(output, deep=True)
            except UserError as error:
                problem = f"its manifest lies: {error}"
        status, _ = build_until(0, command, output)
        found = files_of(output)
        if status != 0:
            problem = "the same command does not go through after it"
        elif found != whole:
            problem = f"files that differ or are left over: {sorted({k for k, _ in whole.items() ^ found.items()})}"
        if problem:
            wrong.append(f"killed before {operation}: {problem}")
        shutil.rmtree(output)
    print(json.dumps({"crashes": crashes, "wrong": wrong}, indent=1))


if __name__ == "__main__":
    main(Command(sys.argv[4:], Path(sys.argv[1]), int(sys.argv[3])), Path(sys.argv[2]))
