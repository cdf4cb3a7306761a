"""The job of one program of `benchmarks/gpu.py`: its task, its deadline, and where its rows go.

A program is started as `python PROGRAM.py JOB.json`. It appends one JSON line per cell as soon as the cell is measured,
so a program that is killed loses no finished cell.
"""

import argparse
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Job:
    """A job file written by `gpu.py`.

    Attributes:
        output: JSON lines file to append to.
        deadline: in `time.monotonic()` seconds; nothing long should start shortly before it.
        tiny: use sizes that a CPU can handle.
        on_cpu: whether there is no GPU.
        settings: keys specific to this program.
    """

    output: Path
    deadline: float
    tiny: bool
    on_cpu: bool
    settings: dict[str, Any]
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read the job from a file. Its time counts from the start of this process, because imports take seconds."""
        body = json.loads(path.read_text(encoding="utf-8"))
        age = time.time() - psutil.Process().create_time()
        known = Path(body.pop("output")), time.monotonic() - age + body.pop("deadline_seconds")
        return cls(*known, body.pop("tiny"), body.pop("on_cpu"), body)

    @classmethod
    def from_command_line(cls) -> "Job":
        """Read the job that the first command-line argument names."""
        parser = argparse.ArgumentParser()
        parser.add_argument("job", type=Path, metavar="JOB.json")
        return cls.read(parser.parse_args().job)

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, **row: Any) -> None:
        """Append a row and print it for the log. Thread-safe."""
        line = json.dumps(row)
        with self._lock:
            with open(self.output, "a", encoding="utf-8") as file:
                file.write(line + "\n")
            print(line, file=sys.stderr, flush=True)
