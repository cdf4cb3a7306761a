"""What became of a run: what its rank 0 wrote last, whether anyone trains it now, and its attempts."""

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from codeparrot_ds.run.directory import RunDirectory

_SHOWN_ATTEMPTS = 5


@dataclass(frozen=True)
class RunStatus:
    """One run.

    Attributes:
        facts: of status.json. A `state` of "running" is what rank 0 wrote when it started.
        in_use: whether a process trains it now.
        attempts: of `codeparrot-ds launch`, oldest first.
    """

    facts: dict[str, Any]
    in_use: bool
    attempts: list[dict[str, Any]]

    @property
    def state(self) -> str:
        """In a word or a few."""
        state = str(self.facts["state"])
        if state == "running" and not self.in_use:
            return "dead: it was running, and no process trains it now; the same command goes on from its checkpoint"
        return state

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """(name, value), for a table."""
        rows = [("state", self.state), *((key, str(value)) for key, value in self.facts.items() if key != "state")]
        for number, attempt in list(enumerate(self.attempts, start=1))[-_SHOWN_ATTEMPTS:]:
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt["began"]))
            steps = f"steps {attempt['from_step']} to {attempt['to_step']}"
            what = f"{began}, {attempt['seconds']:,.0f} s, {steps}: {attempt['state']}, {attempt['reason']}"
            rows.append((f"attempt {number}", what))
        return rows


def run_status(run: RunDirectory) -> RunStatus:
    """Look at a run directory. Raises DataError when nothing was ever trained there."""
    attempts = []
    for line in run.launches.read_text().splitlines() if run.launches.exists() else []:
        with contextlib.suppress(ValueError):  # one that a crash has cut short
            attempts.append(json.loads(line))
    # All ranks may have died before the first could say that it runs.
    facts = {"state": "never started"} if attempts and not run.status_file.exists() else run.read_status()
    return RunStatus(facts, run.in_use(), attempts)
