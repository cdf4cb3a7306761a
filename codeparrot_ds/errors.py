"""User errors. Each carries one message that says what is wrong, where, and how to fix it.

The command line prints the message without a traceback and exits with 1 (`EXIT_USER_ERROR`). Any other
exception is a bug in this package: it keeps its traceback, and the exit code is 70 (`EXIT_CRASHED`).
"""

from collections.abc import Sequence

EXIT_USER_ERROR = 1
EXIT_CRASHED = 70  # sysexits.h EX_SOFTWARE: used by ranks for failures other than user errors; a restart may help
EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: schedulers may requeue the job
EXIT_CODES = {
    0: "success",
    EXIT_USER_ERROR: "an error that you can fix, or a difference or problem that was found",
    2: "wrong usage",
    EXIT_CRASHED: "a crash",
    EXIT_PREEMPTED: "training was stopped and has saved",
    130: "Ctrl-C",
    141: "the reader of a pipe has ended",
}


class UserError(Exception):
    """Base class of the errors below; never raised directly."""


class ConfigError(UserError):
    """A recipe, a DeepSpeed JSON, an option or the machine's setup is wrong."""


class DataError(UserError):
    """A corpus, a tokenizer or a shard is missing, incomplete or damaged."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, damaged, hostile, or belongs to another run."""


class ClusterError(UserError):
    """A hostfile or a host is misconfigured or unusable."""


class TrainingError(UserError):
    """A run was stopped because of a training problem that only its owner can judge."""


def list_problems(subject: str, problems: Sequence[str], fix: str = "") -> str:
    """One message for all `problems` found in `subject` (inline for one, a list for several) and how to `fix` them."""
    if len(problems) == 1:
        return f"{subject}: {problems[0]}" + (f". {fix}" if fix else "")
    lines = [f"{subject}: {len(problems)} problems", *(f"  - {problem}" for problem in problems)]
    return "\n".join([*lines, fix] if fix else lines)
