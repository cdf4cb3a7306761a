"""Shared by peers that can run without a launcher: the environment of one rank, and an incremental report."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def become_one_rank() -> None:
    """Without a launcher, set the environment of rank 0 of 1, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    of_one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in of_one.items():
        os.environ.setdefault(name, value)


class Report:
    """Measurements so far, rewritten after each step, so that they survive if the run is killed.

    Keys:
        ends: Unix time in seconds at the end of each optimizer step, after the GPU has finished it.
        step_seconds: duration of each step; the first starts when `begin` is called.
        first_peak_bytes: peak GPU tensor memory until the end of the first step; null on CPUs.
        peak_bytes: peak over later steps, as the first peak includes model construction; null before the second.
        out_of_memory: true if that ended the run; absent otherwise.
    """

    def __init__(self, output: str) -> None:
        self._output = Path(output)
        self._begun = time.time()
        self.body: dict[str, Any] = {"ends": [], "step_seconds": [], "first_peak_bytes": None, "peak_bytes": None}

    def begin(self) -> None:
        """Mark the start of the first step."""
        self._begun = time.time()

    def step_ended(self) -> None:
        """Wait for the GPU, record the time and the peak, and write the report."""
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        ends = self.body["ends"]
        ends.append(time.time())
        self.body["step_seconds"].append(ends[-1] - (ends[-2] if len(ends) > 1 else self._begun))
        if on_gpu:
            self.body["peak_bytes" if len(ends) > 1 else "first_peak_bytes"] = torch.cuda.max_memory_allocated()
            if len(ends) == 1:
                torch.cuda.reset_peak_memory_stats()
        self.write()

    def write(self, **more: Any) -> None:
        """Add `more` to the report and write it to its file."""
        self.body |= more
        if os.environ.get("RANK", "0") == "0":
            beside = self._output.with_name(f"{self._output.name}.tmp")
            beside.write_text(json.dumps(self.body))
            beside.replace(self._output)


@contextmanager
def memory_may_run_out(report: Report) -> Iterator[None]:
    """Catch any out-of-memory error of the GPU, end the block, and record it in the report."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError, or an error of cuBLAS or the compiler
        text = str(error)
        if not (isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text):
            raise
        print(text, flush=True)
        report.write(out_of_memory=True)
