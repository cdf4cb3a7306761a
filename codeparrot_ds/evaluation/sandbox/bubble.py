"""One bubblewrap sandbox, in which programs run one after the other, each in namespaces of its own."""

import json
import math
import os
import secrets
import select
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.evaluation.sandbox import zygote
from codeparrot_ds.evaluation.sandbox.outcome import Limits, Outcome, Verdict
from codeparrot_ds.evaluation.sandbox.seccomp import seccomp_filter

_PROGRAM_TRIES = 2  # of a program whose sandbox ended
_START_SECONDS = 60.0
_CLOSE_SECONDS = 1.0
_ANSWER_SECONDS = 30.0  # after the end of a program's time
_PACKAGES = "/packages"
_SETTINGS = {  # /proc/sys file -> (value that forbids user namespaces, command that allows them)
    "user/max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=15000"),
    "kernel/unprivileged_userns_clone": ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    "kernel/apparmor_restrict_unprivileged_userns": (
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
    ),
}


class SandboxEndedError(Exception):
    """The sandbox's process has ended or does not answer."""


def bubblewrap() -> str:
    """Path of bubblewrap's program. Raises ConfigError if it is not installed."""
    if sys.platform != "linux":
        raise ConfigError("Generated programs run only in a sandbox, which needs Linux. Score on a Linux machine.")
    found = shutil.which("bwrap")
    if found is None:
        raise ConfigError(
            "Generated programs run only in a sandbox, which needs bubblewrap. Install it: apt-get install bubblewrap "
            "(Debian, Ubuntu) or dnf install bubblewrap (Fedora, RHEL)."
        )
    return found


@cache
def bubblewrap_version() -> str:
    """Version of the installed bubblewrap, e.g. "0.8.0". Raises ConfigError if there is none."""
    done = subprocess.run([bubblewrap(), "--version"], capture_output=True, encoding="utf-8", check=False)
    return done.stdout.removeprefix("bubblewrap ").strip()


def _command(packages: Sequence[str]) -> list[str]:
    """The command line of a sandbox that sees nothing of this machine but the standard library and `packages`."""
    base = Path(sys.base_prefix)
    python = (base / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}").resolve()
    # --unshare-all alone silently does without a user namespace where those are forbidden; --unshare-user refuses.
    words = [bubblewrap(), "--unshare-user", "--unshare-all", "--die-with-parent", "--new-session"]
    # The zygote needs one capability, over its own namespaces, to give every program namespaces and a /tmp.
    words += ["--uid", "0", "--gid", "0", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--hostname", "sandbox"]
    for library in map(Path, ("/usr/lib", "/usr/lib64", "/lib", "/lib64")):
        if library.is_symlink():
            words += ["--symlink", str(library.readlink()), str(library)]
        elif library.is_dir():
            words += ["--ro-bind", str(library), str(library)]
    for name in sorted({"lib", sys.platlibdir}):
        if (base / name).is_dir():
            words += ["--ro-bind", str(base / name), f"/python/{name}"]
    words += ["--ro-bind", str(python), "/python/bin/python3", "--ro-bind", zygote.__file__, "/zygote.py"]
    for path in _package_files(packages):
        words += ["--ro-bind", str(path), f"{_PACKAGES}/{path.name}"]
    for device in ("/dev/null", "/dev/urandom"):
        words += ["--dev-bind", device, device]
    environment = {"LD_LIBRARY_PATH": "/python/lib", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["LD_BIND_NOW"] = "1"  # symbols bound later would be pages copied in every process
    for name, value in environment.items():
        words += ["--setenv", name, value]
    return [
        *words,
        "--dir",
        "/tmp",
        "--chdir",
        "/tmp",
        "--remount-ro",
        "/",
        "/python/bin/python3",
        "-SsPB",
        "/zygote.py",
    ]


def _package_files(packages: Sequence[str]) -> list[Path]:
    """The directories or files of installed packages, with the libraries that wheels place beside them."""
    found = []
    for name in packages:
        spec = find_spec(name) if name.isidentifier() else None
        places = [*(spec.submodule_search_locations or []), spec.origin] if spec else []
        paths = [Path(place) for place in places if place is not None and Path(place).exists()]
        if not paths:
            raise ConfigError(f"package {name!r} is not installed here, so programs cannot import it. Install it.")
        found += [*paths[:1], *filter(Path.is_dir, [paths[0].with_name(f"{name}.libs")])]
    return found


def _why_not(stderr: str) -> str:
    """The error message for a sandbox that does not start."""
    mends = []
    for name, (value, command) in _SETTINGS.items():
        file = Path("/proc/sys", name)
        if file.exists() and file.read_text(encoding="utf-8").strip() == value:
            mends.append(command)
    if mends:
        mend = f"The kernel's settings forbid user namespaces. Run as root: {' && '.join(mends)}"
    else:
        mend = (
            "It needs user namespaces and Linux 5.8. In a container, start that with --security-opt "
            "seccomp=unconfined --security-opt apparmor=unconfined"
        )
    lines = [line for line in stderr.splitlines() if line.strip()]
    return f"The sandbox for generated programs does not start ({lines[-1] if lines else 'no message'}). {mend}."


class Bubble:
    """A running sandbox, to be closed. It ends with the thread that created it, however that ends."""

    def __init__(self, limits: Limits, packages: Sequence[str] = ()) -> None:
        self._limits, self._packages = limits, tuple(packages)
        self._killed = False
        self._start()

    def _start(self) -> None:
        """Start bubblewrap and wait until it is ready. Raises ConfigError if it does not start."""
        limits = self._limits
        self._process = subprocess.Popen(
            _command(self._packages),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            bufsize=0,
        )
        config = {
            "rlimits": {
                "RLIMIT_AS": limits.memory,
                "RLIMIT_CPU": math.ceil(limits.timeout) + 1,  # in case the zygote is late
                "RLIMIT_FSIZE": limits.files,
                "RLIMIT_NOFILE": 64,
                "RLIMIT_STACK": 8 << 20,
                **dict.fromkeys(("RLIMIT_CORE", "RLIMIT_MSGQUEUE", "RLIMIT_MEMLOCK"), 0),
            },
            "timeout": limits.timeout,
            "files": limits.files,
            "filter": seccomp_filter().hex(),
            "paths": [_PACKAGES] if self._packages else [],
            "packages": self._packages,
        }
        try:
            ready = self._ask(config, _START_SECONDS)
            assert ready == {"kind": "ready"}, ready
        except SandboxEndedError:
            self._process.kill()
            assert self._process.stderr is not None
            message = self._process.stderr.read().decode(errors="replace")
            self.close()
            raise ConfigError(_why_not(message)) from None
        except BaseException:
            self.close()
            raise

    def _ask(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a job and return the answer. Raises SandboxEndedError if there is none after `seconds`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        data = json.dumps(job).encode()
        data = struct.pack("<I", len(data)) + data
        try:
            while data:
                data = data[self._process.stdin.write(data) :]
        except BrokenPipeError:
            raise SandboxEndedError from None
        answer, wanted = b"", 4
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while len(answer) < wanted:
            piece = os.read(self._process.stdout.fileno(), wanted - len(answer)) if poll.poll(1000 * seconds) else b""
            if not piece:
                raise SandboxEndedError
            answer += piece
            if wanted == len(answer) == 4:
                wanted += struct.unpack("<I", answer)[0]
        return json.loads(answer[4:])

    def run(self, program: str, seconds: float | None = None, second_run: bool = True) -> Outcome:
        """Run a program, and once more if it passes: with a last line that raises an exception.

        A program that passes without reaching its end does so a second time, which unmasks it.

        Args:
            program: Python source.
            seconds: CPU time to allow it; the limit if None.
            second_run: whether to do that; False only to measure what it costs.

        Raises:
            ConfigError: this machine cannot run the sandbox.
            SandboxEndedError: another thread called `kill`.
        """
        limits = self._limits
        first = self._run_once(program, seconds or limits.timeout)
        if not first.passed or not second_run:
            return first
        secret = secrets.token_hex(16)
        second = self._run_once(f"{program}\nraise Exception({secret!r})", limits.timeout)
        if second.verdict == Verdict.FAILED and (second.error, second.message) == ("Exception", secret):
            return replace(first, cpu_seconds=first.cpu_seconds + second.cpu_seconds)
        if second.passed:
            return replace(second, verdict=Verdict.FORGED, message="it passes without having reached its end")
        return second

    def _run_once(self, program: str, seconds: float) -> Outcome:
        job = {"program": program, "secret": secrets.token_hex(16), "seconds": seconds}
        for _ in range(_PROGRAM_TRIES):
            try:
                answer = self._ask(job, max(10 * seconds, 2.0) + _ANSWER_SECONDS)
            except SandboxEndedError:
                if self._killed:
                    raise
                self.close()
                self._start()
                continue
            kind = answer.pop("kind")
            if kind == "unconfined":
                raise ConfigError(f"The sandbox cannot confine a program ({answer['message']}). It needs Linux 5.8.")
            return Outcome(Verdict(kind), **answer)
        return Outcome(Verdict.DIED, "its sandbox ended")

    def kill(self) -> None:
        """End the sandbox now, from any thread; it is still to be closed."""
        self._killed = True
        self._process.kill()

    def close(self) -> None:
        """End the sandbox and everything in it."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.close()  # an idle zygote ends now
        try:
            process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()
