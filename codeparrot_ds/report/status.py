"""State of a run: the last status of its rank 0, whether a process is training it now, and its attempts."""

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from codeparrot_ds.run.directory import RunDirectory

_SHOWN_ATTEMPTS = 5


@dataclass(frozen=True)
class RunStatus:
    """Status of one run.

    Attributes:
        facts: content of status.json. Rank 0 writes the `state` "running" when it starts.
        in_use: whether a process is training the run now.
        attempts: attempts of `codeparrot-ds launch`, oldest first.
    """

    facts: dict[str, Any]
    in_use: bool
    attempts: list[dict[str, Any]]

    @property
    def state(self) -> str:
        """State of the run in a few words."""
        state = str(self.facts["state"])
        if state == "running" and not self.in_use:
            return "dead: it was running, but no process is training it now; run the same command to resume"
        return state

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs for a table."""
        facts = {key: str(value) for key, value in self.facts.items() if key != "state" and value is not None}
        rows = [("state", self.state), *facts.items()]
        for number, attempt in list(enumerate(self.attempts, start=1))[-_SHOWN_ATTEMPTS:]:
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt["began"]))
            steps = f"steps {attempt['from_step']} to {attempt['to_step']}"
            what = f"{began}, {attempt['seconds']:,.0f} s, {steps}: {attempt['state']}, {attempt['reason']}"
            rows.append((f"attempt {number}", what))
        return rows


def run_status(run: RunDirectory) -> RunStatus:
    """Read the status of a run directory. Raises DataError if nothing was ever trained there."""
    attempts = []
    for line in run.launches.read_text(encoding="utf-8").splitlines() if run.launches.exists() else []:
        with contextlib.suppress(ValueError):  # a line truncated by a crash
            attempts.append(json.loads(line))
    # All ranks may have died before rank 0 wrote its status.
    facts = {"state": "never started"} if attempts and not run.status_file.exists() else run.read_status()
    return RunStatus(facts, run.in_use(), attempts)
