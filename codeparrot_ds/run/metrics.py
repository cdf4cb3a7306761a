"""metrics.jsonl of a run."""

import json
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import DataError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out. Raises DataError for others."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(f"{path}:{number}: not a line of metrics ({error}). Mend or remove it.") from None
    return rows
