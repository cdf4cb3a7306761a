"""Wall time, CPU time and peak memory of a command including all its descendants. Linux only.

The command runs under a small supervisor process that is a subreaper: orphaned descendants become its children, so it
can wait for all of them and the kernel credits it with their CPU time. Memory is sampled by the process that imports
this module; neither that process nor the supervisor is included in the measurement.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_GRACE_SECONDS = 30.0  # for descendants that outlive the command
_LARGEST_SAMPLER_SHARE = 0.1  # of one core: reading the page tables of gigabytes takes tens of milliseconds


@dataclass(frozen=True)
class Measurement:
    """Resources used by one run of a command.

    Attributes:
        wall_seconds: until the command itself ended.
        cpu_seconds: user and system time of the command and all its descendants.
        peak_pss_bytes: largest sum of proportional set sizes over all processes; shared pages count once.
        peak_rss_bytes: largest sum of resident set sizes; shared pages count once per process.
        sampler_cpu_seconds: CPU time of the sampling itself, not included in `cpu_seconds`.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_pss_bytes: int
    peak_rss_bytes: int
    sampler_cpu_seconds: float


class MemorySampler(threading.Thread):
    """Peak memory of the descendants of a process, and of the process itself unless `with_root` is False.

    Attributes:
        peak_pss_bytes, peak_rss_bytes: largest sums so far.
        cpu_seconds: CPU time of this thread, set once it has ended.
    """

    def __init__(self, pid: int, interval_seconds: float = 0.05, with_root: bool = True) -> None:
        super().__init__(daemon=True)
        self._pid, self._interval_seconds, self._with_root = pid, interval_seconds, with_root
        self._stop_asked = threading.Event()
        self.peak_pss_bytes = self.peak_rss_bytes = 0
        self.cpu_seconds = 0.0

    def run(self) -> None:
        """Sample until `finish` is called."""
        pause = 0.0
        while not self._stop_asked.wait(pause):
            before = time.thread_time()
            pss = rss = 0
            for pid in descendants(self._pid):
                one_pss, one_rss = _memory(pid)
                pss, rss = pss + one_pss, rss + one_rss
            if self._with_root:
                one_pss, one_rss = _memory(self._pid)
                pss, rss = pss + one_pss, rss + one_rss
            self.peak_pss_bytes = max(self.peak_pss_bytes, pss)
            self.peak_rss_bytes = max(self.peak_rss_bytes, rss)
            pause = max(self._interval_seconds, (time.thread_time() - before) / _LARGEST_SAMPLER_SHARE)
        self.cpu_seconds = time.thread_time()

    def finish(self) -> None:
        """Stop sampling and wait for the thread."""
        self._stop_asked.set()
        self.join()


def descendants(pid: int) -> Iterator[int]:
    """Ids of all descendants of `pid`; processes that end in the meantime are skipped."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 (called every 50 ms; names suffice)
    except OSError:
        return
    for thread in threads:  # a child is listed with the thread that started it
        try:
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text(encoding="utf-8").split()
        except OSError:
            continue
        for child in map(int, children):
            yield child
            yield from descendants(child)


def _memory(pid: int) -> tuple[int, int]:
    """(PSS, RSS) of one process in bytes; zeros if it has exited."""
    pss = rss = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                pss = int(line.split()[1]) << 10
            elif line.startswith("Rss:"):
                rss = int(line.split()[1]) << 10
    except OSError:
        return 0, 0
    return pss, rss


def measure(
    command: Sequence[str | Path],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cores: Iterable[int] = (),
    interval_seconds: float | None = 0.05,
) -> Measurement:
    """Run `command` to completion and return its measurement.

    Args:
        command: program and arguments.
        log: file for its standard output and error.
        env: its environment; default: this process's.
        cores: cores to pin the command and its descendants to; default: all.
        interval_seconds: memory sampling interval; None disables sampling, which takes CPU time.

    Raises:
        RuntimeError: the command failed; the message ends with the last lines of its log.
    """
    reader, writer = os.pipe()
    held_to = ",".join(map(str, cores)) or "all"
    with open(log, "wb") as out:
        supervisor = subprocess.Popen(
            # -I -S: no site packages and no PYTHONPATH, so that the supervisor starts within milliseconds.
            [sys.executable, "-I", "-S", __file__, str(writer), held_to, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            pass_fds=(writer,),
        )
    os.close(writer)
    sampler = MemorySampler(supervisor.pid, interval_seconds or 0.05, with_root=False)
    if interval_seconds is not None:
        sampler.start()
    with open(reader, encoding="utf-8") as answer:
        report = answer.read()
    supervisor.wait()
    if interval_seconds is not None:
        sampler.finish()
    result = json.loads(report) if report else {"returncode": supervisor.returncode}
    if result["returncode"] != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise RuntimeError(f"{' '.join(map(str, command))}\nended with {result['returncode']}; {log} ends:\n{tail}")
    return Measurement(
        wall_seconds=result["wall_seconds"],
        cpu_seconds=result["cpu_seconds"],
        peak_pss_bytes=sampler.peak_pss_bytes,
        peak_rss_bytes=sampler.peak_rss_bytes,
        sampler_cpu_seconds=sampler.cpu_seconds,
    )


def _supervise(writer: int, held_to: str, command: list[str]) -> None:
    """Run `command`, wait for all descendants, and write the result to the file descriptor `writer` as JSON."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    if held_to != "all":
        os.sched_setaffinity(0, map(int, held_to.split(",")))
    started = time.monotonic()
    process = subprocess.Popen(command)
    while (waited := os.wait())[0] != process.pid:
        pass
    wall_seconds = time.monotonic() - started
    _wait_for_the_rest()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "returncode": os.waitstatus_to_exitcode(waited[1]),
        "wall_seconds": wall_seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    os.write(writer, json.dumps(result).encode())


def _wait_for_the_rest() -> None:
    """Wait for descendants that outlived the command; kill them after a grace period."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if ended == 0:
            if time.monotonic() > deadline:
                for pid in list(descendants(os.getpid())):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)


if __name__ == "__main__":
    _supervise(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
