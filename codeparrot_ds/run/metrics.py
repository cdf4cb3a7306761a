"""Read a run's metrics.jsonl."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import DataError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. Skips a last line truncated by a crash; other bad lines raise DataError."""
    return list(iterate_metrics(path))


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of `read_metrics`, without holding all of them: those of a long run take a gigabyte."""
    if not path.exists():
        return
    bad: DataError | None = None
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if bad is not None:
                raise bad
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                bad = DataError(f"{path}:{number}: not a valid metrics line ({error}). Fix or remove it.")
                continue
            yield row
