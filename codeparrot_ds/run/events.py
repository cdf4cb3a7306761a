"""What happened to a run and when, and what its model wrote at each evaluation: files beside its metrics."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CPU_INFO = Path("/proc/cpuinfo")


def record_event(path: Path, event: str, **facts: Any) -> None:
    """Append an event to an events.jsonl, with the time (Unix). A full disk is reported by what needs the space."""
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.time(), "event": event, **facts}) + "\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file that several processes append to. Skips lines truncated by a crash."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                if isinstance(row := json.loads(line), dict):
                    yield row


def cpu_name() -> str:
    """The model and number of this machine's processors, e.g. "AMD EPYC 9B45, 2 cores"."""
    name = platform.machine()
    with contextlib.suppress(OSError):
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    count = os.cpu_count() or 1
    return f"{name}, {count} core{'' if count == 1 else 's'}"
