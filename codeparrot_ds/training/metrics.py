"""What a run reports: one log file a rank, metrics.jsonl and TensorBoard from rank 0, plain lines for the user."""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any, TextIO

from codeparrot_ds.files import write_atomically
from codeparrot_ds.recipe import Recipe
from codeparrot_ds.run_directory import RunDirectory

log = logging.getLogger("codeparrot_ds")


def open_log(run: RunDirectory, rank: int) -> None:
    """Send this rank's log to its own file, and rank 0's to the user as well."""
    run.logs.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.INFO)
    log.propagate = False
    file = logging.FileHandler(run.logs / f"rank_{rank:05d}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    user = logging.StreamHandler(sys.stderr)
    user.setFormatter(logging.Formatter("%(message)s"))
    user.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.addHandler(user)


class Metrics:
    """Writes rows to metrics.jsonl, TensorBoard and the log. Only rank 0 has one."""

    def __init__(self, run: RunDirectory, recipe: Recipe, first_step: int) -> None:
        """Append to what is there, after dropping the rows of steps that will be taken again."""
        _drop_rows_from(run.metrics, first_step)
        self._file: TextIO = open(run.metrics, "a")  # noqa: SIM115 (closed in close)
        self._board: Any = None
        if recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run.tensorboard), purge_step=first_step)
            self._board.add_text("recipe", f"```yaml\n{recipe.to_yaml()}```")

    def step(self, row: dict[str, Any]) -> None:
        """One optimizer step: `step` is the number of steps taken before it."""
        self._write({"kind": "train", **row}, row["step"])

    def evaluation(self, step: int, loss_valid: float, perplexity_valid: float) -> None:
        """One evaluation of the weights after `step` optimizer steps."""
        row = {"step": step, "loss_valid": loss_valid, "perplexity_valid": perplexity_valid}
        self._write({"kind": "valid", **row}, step)
        log.info("step %d: validation loss %.4f, perplexity %.1f", step, loss_valid, perplexity_valid)

    def _write(self, row: dict[str, Any], step: int) -> None:
        # JSON has no infinity: a perplexity that overflows is null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(f"{row['kind']}/{key}", value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _drop_rows_from(path: Path, first_step: int) -> None:
    """Keep what happened before the weights of `first_step`: those steps will be taken again."""
    kept = [
        row
        for row in read_metrics(path)
        if row["step"] < first_step or (row["kind"] == "valid" and row["step"] == first_step > 0)
    ]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
