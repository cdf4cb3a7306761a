"""What a page consists of: plain data, which `render` turns into HTML. Texts may be hostile; nothing here is markup."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from codeparrot_ds.report.curves import Curve
from codeparrot_ds.report.units import shown


@dataclass(frozen=True)
class Figure:
    """One of the few large numbers at the top of a page, and what it means."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; a `warning` stands out."""

    kind: ClassVar[str] = "text"
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """A table; every row has as many cells as there are columns.

    Attributes:
        columns: headings.
        rows: cells as text.
        numbers: indices of the columns that hold numbers.
        caption: what it shows.
        folded: whether it is shown only on request.
    """

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        label: name, short.
        curve: all points.
        role: "line"; "points", for few values; "faint", behind its smoothed line; "smooth", that line.
        run: 0, or 1 for the second of two runs.
    """

    label: str
    curve: Curve
    role: str = "line"
    run: int = 0


@dataclass(frozen=True)
class Chart:
    """A chart over optimizer steps.

    Attributes:
        title, unit: of the values.
        series: at least one.
        style: format of a value, as page.js knows it: "number", "percent", "bytes", "small".
        wide: whether it takes the whole width.
        scales: whether the reader may choose between a linear and a logarithmic scale.
    """

    title: str
    unit: str
    series: Sequence[Series]
    style: str = "number"
    wide: bool = False
    scales: bool = False


@dataclass(frozen=True)
class Charts:
    """Charts with a common cursor, and a table of their figures."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]
    figures: Table


@dataclass(frozen=True)
class Bars:
    """Counts by name, as bars, relative to `total`."""

    kind: ClassVar[str] = "bars"
    caption: str
    columns: tuple[str, str]
    rows: Sequence[tuple[str, int]]
    total: int
    left_out: str = ""


@dataclass(frozen=True)
class Span:
    """A stretch of time: start and length in percent of the time line, its state, and what it was."""

    start: float
    length: float
    state: str
    title: str


@dataclass(frozen=True)
class Mark:
    """A moment: position in percent of the time line, its kind, and what happened."""

    at: float
    what: str
    title: str


@dataclass(frozen=True)
class TimeLine:
    """Attempts and events over wall-clock time; `ticks` are labelled positions in percent."""

    kind: ClassVar[str] = "timeline"
    label: str
    spans: Sequence[Span]
    marks: Sequence[Mark]
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model wrote after it, at several steps."""

    kind: ClassVar[str] = "sample"
    prompt: str
    completions: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Text in a fixed-width font, with the name of what it is."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


Block = Text | Table | Facts | Charts | Bars | TimeLine | Sample | Code


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The part after # in the address of this section."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: name of what it is about.
        subject: what that is: "run", "corpus", "tokenizer", "two runs".
        summary: one line.
        state: of a run; empty for others.
        figures: the large numbers.
        sections: in their order; those without blocks are left out.
    """

    title: str
    subject: str
    summary: str
    state: str = ""
    figures: Sequence[Figure] = ()
    sections: Sequence[Section] = field(default_factory=tuple)


def figures_of(charts: Sequence[Chart]) -> Table:
    """What the lines of charts show, as a table: for readers who cannot see them, and to copy."""
    rows = []
    for chart in charts:
        for series in chart.series:
            if series.role == "smooth":
                continue
            finite = series.curve.finite()
            values, steps = finite.values, finite.steps
            name = chart.title if series.label == chart.title else f"{chart.title}: {series.label}"
            if not len(values):
                rows.append([name, *["-"] * 5])
                continue
            low, high = int(values.argmin()), int(values.argmax())
            rows.append(
                [
                    f"{name} ({chart.unit})" if chart.unit else name,
                    shown(values[0], chart.style),
                    shown(values[-1], chart.style),
                    f"{shown(values[low], chart.style)} at {steps[low]:,}",
                    f"{shown(values[high], chart.style)} at {steps[high]:,}",
                    shown(float(np.median(values)), chart.style),
                ]
            )
    columns = ["curve", "first", "last", "lowest, at step", "highest, at step", "median"]
    return Table(columns, rows, frozenset(range(1, 6)), "The curves in figures", folded=True)


def describe(chart: Chart) -> str:
    """The text alternative of a chart."""
    parts = []
    for series in chart.series:
        finite = series.curve.finite()
        if series.role == "smooth" or not len(finite.values):
            continue
        first, last = (shown(finite.values[i], chart.style) for i in (0, -1))
        steps = f"{first} at step {finite.steps[0]:,}, {last} at step {finite.steps[-1]:,}"
        parts.append(f"{series.label}: {steps}")
    return f"{chart.title}{f', {chart.unit}' if chart.unit else ''}. {'; '.join(parts) or 'No finite value.'}"
