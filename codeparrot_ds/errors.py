"""Errors that a user can mend. Each carries one message that says what is wrong, where, and how to mend it.

The command line prints the message without a traceback and exits with 1 (`EXIT_USER_ERROR`). Any other
exception is a defect of this package and keeps its traceback.
"""

from collections.abc import Sequence

EXIT_USER_ERROR = 1
EXIT_CRASHED = 70  # sysexits.h EX_SOFTWARE: of ranks; what a user cannot mend, so that starting again may help
EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: schedulers may queue the job again


class UserError(Exception):
    """Base of the errors below; never raised itself."""


class ConfigError(UserError):
    """A recipe, a DeepSpeed JSON, an option or the machine's set-up is wrong."""


class DataError(UserError):
    """A corpus, a tokenizer or a shard is missing, incomplete or damaged."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, damaged, hostile, or belongs to another run."""


class ClusterError(UserError):
    """A hostfile or a host is wrong."""


class TrainingError(UserError):
    """A run that goes wrong in a way that only its owner can judge, and was stopped."""


def list_problems(subject: str, problems: Sequence[str], mend: str = "") -> str:
    """One message for all `problems` found in `subject` (inline for one, a list for several) and how to `mend` them."""
    if len(problems) == 1:
        return f"{subject}: {problems[0]}" + (f". {mend}" if mend else "")
    lines = [f"{subject}: {len(problems)} problems", *(f"  - {problem}" for problem in problems)]
    return "\n".join([*lines, mend] if mend else lines)
