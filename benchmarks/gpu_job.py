"""The job of one part program of `benchmarks/gpu.py`: what it is to do, until when, and where its rows go.

A part program is started as `python PROGRAM.py JOB.json`. It appends one JSON line for each cell as soon as it is
measured, so that a program that is ended has lost nothing.
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
    """What `gpu.py` has written down.

    Attributes:
        output: JSON lines, appended to.
        deadline: by `time.monotonic()`; nothing that takes long should start shortly before it.
        tiny: sizes that a CPU can take.
        on_cpu: there is no GPU here.
        settings: keys that this program alone knows.
    """

    output: Path
    deadline: float
    tiny: bool
    on_cpu: bool
    settings: dict[str, Any]
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def read(cls, path: Path) -> "Job":
        """The job in this file. Its time has run since this process was started: imports take seconds."""
        body = json.loads(path.read_text())
        age = time.time() - psutil.Process().create_time()
        known = Path(body.pop("output")), time.monotonic() - age + body.pop("deadline_seconds")
        return cls(*known, body.pop("tiny"), body.pop("on_cpu"), body)

    @classmethod
    def from_command_line(cls) -> "Job":
        """The job that the first argument names."""
        parser = argparse.ArgumentParser()
        parser.add_argument("job", type=Path, metavar="JOB.json")
        return cls.read(parser.parse_args().job)

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, **row: Any) -> None:
        """Append a row, from any thread; it is also printed, for the log."""
        line = json.dumps(row)
        with self._lock:
            with open(self.output, "a") as file:
                file.write(line + "\n")
            print(line, file=sys.stderr, flush=True)
