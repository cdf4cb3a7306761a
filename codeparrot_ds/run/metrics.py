"""Read a run's metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import DataError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. Skips a last line truncated by a crash; other bad lines raise DataError."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(f"{path}:{number}: not a valid metrics line ({error}). Fix or remove it.") from None
    return rows
