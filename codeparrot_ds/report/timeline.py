"""What happened to a run over wall-clock time: attempts, checkpoints, faults, changes of the recipe."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from codeparrot_ds.report.blocks import Block, Mark, Span, Table, Text, TimeLine
from codeparrot_ds.report.units import duration
from codeparrot_ds.run.changes import describe
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.events import read_lines

_MARKS = 400  # on the time line
_ROWS = 100  # of a table
_TICKS = 4
_UNUSUAL = {"go back": "went back", "loss spike": "loss spike", "skipped": "skipped steps"}  # events, as shown
_DOCUMENTS = 3  # named for a skipped step


@dataclass(frozen=True)
class Attempt:
    """A start of a run until its end.

    Attributes:
        began, ended: time (Unix).
        steps: first and last step; None if not known.
        state: "finished", "preempted", "failed", ..., "running", or "no end recorded".
        reason: why it ended; may be empty.
        where: hosts, or ranks and device.
    """

    began: float
    ended: float
    steps: tuple[int | None, int | None]
    state: str
    reason: str
    where: str


@dataclass(frozen=True)
class Event:
    """Something that happened at one moment: its time (Unix), what, the step, and details."""

    time: float
    what: str
    step: int | None
    details: str


@dataclass(frozen=True)
class History:
    """What is recorded of a run over time.

    Attributes:
        attempts, events: oldest first.
        start: facts of the newest start: hardware, versions; {} if not recorded.
    """

    attempts: Sequence[Attempt]
    events: Sequence[Event]
    start: dict[str, Any]

    @property
    def seconds(self) -> float | None:
        """Wall-clock time of all attempts; None if not recorded."""
        return sum(each.ended - each.began for each in self.attempts) if self.attempts else None


def read_history(run: RunDirectory, running: bool) -> History:
    """Read the history of a run; `running` tells whether a process is training it now. Skips what it cannot read."""
    recorded = [row for row in read_lines(run.events) if _seconds(row.get("time")) is not None]
    attempts = [found for row in read_lines(run.launches) if (found := _launched(row))]
    attempts += _unsupervised(recorded, attempts, running)
    changes = (row for row in read_lines(run.recipe_changes) if _seconds(row.get("time")) is not None)
    events = [event for row in recorded if (event := _event(row))]
    events += [Event(row["time"], "recipe change", _step(row), _described(row.get("changes"))) for row in changes]
    starts = [row for row in recorded if row.get("event") == "start"]
    return History(
        sorted(attempts, key=lambda each: each.began),
        sorted(events, key=lambda each: each.time),
        starts[-1] if starts else {},
    )


def _launched(row: dict[str, Any]) -> Attempt | None:
    """An attempt of `codeparrot-ds launch`."""
    began, seconds = _seconds(row.get("began")), _seconds(row.get("seconds"))
    if began is None or seconds is None:
        return None
    hosts = row.get("hosts")
    where = ", ".join(map(str, hosts)) if isinstance(hosts, list) else ""
    reason = str(row.get("reason") or "")
    if row.get("host") and str(row["host"]) not in reason:
        reason += f" (host {row['host']})"
    if row.get("doing") and row.get("state") == "failed":
        reason += f", during {row['doing']}"
    steps = (_integer(row.get("from_step")), _integer(row.get("to_step")))
    return Attempt(began, began + seconds, steps, str(row.get("state")), reason, where)


def _unsupervised(recorded: Sequence[dict[str, Any]], known: Sequence[Attempt], running: bool) -> list[Attempt]:
    """Attempts that started outside those `known`: of bare `deepspeed`, and one that has not ended."""
    starts = [i for i, row in enumerate(recorded) if row.get("event") == "start"]
    found = []
    for i, following in pairwise([*starts, len(recorded)]):
        rows = recorded[i:following]
        began = rows[0]["time"]
        if any(each.began <= began <= each.ended for each in known):
            continue
        end = next((row for row in rows if row.get("event") == "end"), None)
        open_end = running and following == len(recorded) and end is None
        state = "running" if open_end else "no end recorded" if end is None else str(end.get("state"))
        reason = "" if end is None else str(end.get("reason") or end.get("error") or "")
        last = max((step for row in rows if (step := _step(row)) is not None), default=None)
        ended = time.time() if open_end else max(row["time"] for row in rows)
        where = f"{rows[0].get('world_size', '?')} ranks, {rows[0].get('device', '?')}"
        found.append(Attempt(began, max(ended, began), (_step(rows[0]), last), state, reason, where))
    return found


def _event(row: dict[str, Any]) -> Event | None:
    what, step = row.get("event"), _step(row)
    if what == "checkpoint":
        took, waited = (_seconds(row.get(key)) for key in ("seconds", "waited_seconds"))
        details = "" if took is None else f"{duration(took)} until on disk"
        if waited is not None:
            details += f", training waited {duration(waited)}"
        return Event(row["time"], "checkpoint", step, details)
    name = _UNUSUAL.get(str(what))
    return Event(row["time"], name, step, str(row.get("reason", ""))) if name else None


def _described(changes: Any) -> str:
    try:
        return describe({key: (before, after) for key, (before, after) in changes.items()})
    except (AttributeError, TypeError, ValueError):
        return str(changes)


def _seconds(value: Any) -> float | None:
    """A time or duration as recorded; None for anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) and 0 <= value < 1e11 else None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _step(row: dict[str, Any]) -> int | None:
    return _integer(row.get("step"))


def time_line(history: History) -> list[Block]:
    """The history as a time line and tables; empty if nothing is recorded."""
    attempts, events = history.attempts, history.events
    times = [*(t for each in attempts for t in (each.began, each.ended)), *(each.time for each in events)]
    if not times:
        return []
    begin, end = min(times), max(times)
    scale = 100 / max(end - begin, 1e-9)

    def at(moment: float) -> float:
        return round((moment - begin) * scale, 3)

    shown = _evenly(events, _MARKS)
    spans = [
        Span(at(a.began), round((a.ended - a.began) * scale, 3), a.state, f"attempt {i}: {a.state}. {a.reason}")
        for i, a in enumerate(attempts, start=1)
    ]
    marks = [Mark(at(e.time), e.what, f"{e.what}, step {_or_dash(e.step)}: {e.details}") for e in shown]
    ticks = [(100 * i / _TICKS, duration((end - begin) * i / _TICKS) if i else "0") for i in range(_TICKS + 1)]
    label = f"{_count(len(attempts), 'attempt')} and {_count(len(events), 'event')} over {duration(end - begin)}"
    blocks: list[Block] = [TimeLine(label, spans, marks, ticks)]
    if len(shown) < len(events):
        blocks.append(Text(f"{len(shown):,} of {len(events):,} events are drawn, evenly spaced. events.jsonl has all."))
    rows = [
        [str(number), moment(a.began), duration(a.ended - a.began), _between(a.steps), a.state, a.reason, a.where]
        for number, a in enumerate(attempts, start=1)
    ]
    columns = ["attempt", "began (UTC)", "took", "steps", "ended", "reason", "where"]
    blocks += _tables("Attempts", columns, rows, frozenset({0, 2}), False)
    described = [[moment(e.time), duration(e.time - begin), e.what, _or_dash(e.step), e.details] for e in events]
    columns = ["time (UTC)", "after", "event", "step", "details"]
    return blocks + _tables("Checkpoints and other events", columns, described, frozenset({1, 3}), len(described) > 8)


def incidents(path: Path) -> list[Block]:
    """Skipped steps and loss spikes, with the documents of their samples, from incidents.jsonl."""
    rows: list[list[str]] = []
    count = 0
    for row in read_lines(path):
        count += 1
        if len(rows) < _ROWS:
            rows.append([_or_dash(_step(row)), str(row.get("reason", "")), _documents(row.get("samples"))])
    if not rows:
        return []
    table = Table(["step", "reason", "documents"], rows, frozenset({0}), "Loss spikes and skipped steps", count > 8)
    return [table] if count == len(rows) else [table, _more(count, len(rows), path.name)]


def _documents(samples: Any) -> str:
    try:
        names = [
            " ".join(str(document[key]) for key in ("repository", "path") if document.get(key))
            for sample in samples
            for document in sample["documents"]
        ]
    except (KeyError, TypeError, AttributeError):
        return ""
    names = list(dict.fromkeys(filter(None, names)))
    more = f" and {len(names) - _DOCUMENTS:,} more" if len(names) > _DOCUMENTS else ""
    return ", ".join(names[:_DOCUMENTS]) + more


def _tables(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: frozenset[int], folded: bool
) -> list[Block]:
    if not rows:
        return []
    table = Table(columns, rows[-_ROWS:], numbers, caption, folded)
    return [table] if len(rows) <= _ROWS else [table, _more(len(rows), _ROWS, "launches.jsonl and events.jsonl")]


def _more(count: int, shown: int, where: str) -> Text:
    return Text(f"{shown:,} of {count:,} are listed; {where} in the run directory has all.")


def _evenly(events: Sequence[Event], most: int) -> Sequence[Event]:
    """At most `most` events: all that are no checkpoints, as far as they fit, and evenly spaced checkpoints."""
    if len(events) <= most:
        return events
    rare = [each for each in events if each.what != "checkpoint"][-most:]
    frequent = [each for each in events if each.what == "checkpoint"]
    room = min(max(most - len(rare), 0), len(frequent))
    kept = [frequent[i * len(frequent) // room] for i in range(room)]
    return sorted([*rare, *kept], key=lambda each: each.time)


def moment(unix: float) -> str:
    """A time as text, in UTC, which does not depend on this machine."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(unix))


def _between(steps: Iterable[int | None]) -> str:
    first, last = steps
    return f"{_or_dash(first)} to {_or_dash(last)}"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
