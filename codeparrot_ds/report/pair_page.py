"""The page of two runs: their curves in the same charts, what differs in their recipes, what `compare` finds."""

from codeparrot_ds.errors import UserError
from codeparrot_ds.report.blocks import (
    Block,
    Chart,
    Charts,
    Facts,
    Figure,
    Page,
    Section,
    Series,
    Table,
    Text,
    figures_of,
)
from codeparrot_ds.report.compare import Comparison, compare
from codeparrot_ds.report.compare_text import STEP_COLUMNS, as_rows, step_rows
from codeparrot_ds.report.curves import smoothed
from codeparrot_ds.report.run_facts import RunFacts
from codeparrot_ds.report.run_page import SMALL, derived, lines
from codeparrot_ds.report.summary import Summary
from codeparrot_ds.report.units import duration, large, plain
from codeparrot_ds.run.changes import ENGINE


def pair_page(runs: tuple[RunFacts, RunFacts], summaries: tuple[Summary, Summary]) -> Page:
    """The page of two runs, which need not be comparable step by step: then it says why."""
    a, b = runs
    comparison: Comparison | None = None
    found: list[Block]
    try:
        comparison = compare(a.run, b.run)
        found = [
            Facts([(name.strip(), value) for name, value in as_rows(comparison) if not _is_key(name)]),
            _steps(comparison),
        ]
    except UserError as error:
        found = [Text(str(error), warning=True)]
    titles = [each.run.path.absolute().name for each in runs]
    if titles[0] == titles[1]:
        titles = [str(each.run.path) for each in runs]
    return Page(
        title=f"{titles[0]} and {titles[1]}",
        subject="two runs",
        summary=f"A is {a.run.path}, B is {b.run.path}",
        state="" if comparison is None else "same" if comparison.same else "different",
        figures=_figures(runs, summaries),
        sections=(
            Section("Curves", _curves(runs)),
            Section("Side by side", [_side_by_side(runs, summaries)]),
            Section("Step by step", found),
            Section("Recipes", [_recipes(runs)]),
            Section(
                "What is not on this page",
                [Text(f"{n}: {m}") for n, run in zip("AB", runs, strict=True) for m in run.missing],
            ),
        ),
    )


def _is_key(name: str) -> bool:
    return name.startswith("  ") and "." in name  # the recipes have a table of their own


def _figures(runs: tuple[RunFacts, RunFacts], summaries: tuple[Summary, Summary]) -> list[Figure]:
    figures = []
    held_out = [run.held_out and (run.held_out.sequences, run.held_out.tokens, run.held_out.bytes) for run in runs]
    other = "" if held_out[0] == held_out[1] else ", over other sequences"
    for name, letter in (("validation loss", "loss_valid"), ("bits per byte", "bits_per_byte")):
        a, b = (getattr(each, letter) for each in summaries)
        for side, value in (("A", a), ("B", b)):
            if value is not None:
                figures.append(Figure(f"{name}, {side}", f"{value:.4f}"))
        if a is not None and b is not None:
            figures.append(
                Figure(f"{name}, B minus A", f"{b - a:+.4f}", f"{100 * (b / a - 1):+.1f} %{other}" if a else "")
            )
    return figures


def _curves(runs: tuple[RunFacts, RunFacts]) -> list[Block]:
    loss = []
    for number, (name, run) in enumerate(zip("AB", runs, strict=True)):
        curve, valid = run.curves.loss, run.curves.get("loss_valid")
        if len(curve):
            loss += [Series(f"{name}, training", curve, "faint", number)]
            loss += [Series(f"{name}, smoothed", smoothed(curve)[0], "smooth", number)]
        if len(valid):
            loss.append(Series(f"{name}, validation", valid, "points", number))
    charts = [Chart("Loss", "nats per token", loss, wide=True, scales=True)] if loss else []
    for key, title, unit, style in SMALL:
        curves = [(name, derived(run.curves, key)) for name, run in zip("AB", runs, strict=True)]
        found = [(name, curve) for name, curve in curves if len(curve.finite())]
        series = [each for name, curve in found for each in lines(name, key, curve, "AB".index(name))]
        if series:
            charts.append(Chart(title, unit, series, style))
    return [Charts(charts, figures_of(charts))] if charts else [Text("No step is recorded yet.")]


def _side_by_side(runs: tuple[RunFacts, RunFacts], summaries: tuple[Summary, Summary]) -> Table:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else f"{value:{form}}"

    rows = []
    for name, show in (
        ("state", lambda s, r: s.state),
        ("steps", lambda s, r: f"{s.step:,}"),
        ("parameters", lambda s, r: "-" if s.parameters is None else large(s.parameters)),
        ("ranks", lambda s, r: str(r.status.facts.get("world_size", "-"))),
        ("hardware", lambda s, r: str(r.history.start.get("hardware", "-"))),
        ("validation loss", lambda s, r: number(s.loss_valid, ".4f")),
        ("perplexity", lambda s, r: number(s.perplexity_valid, ",.1f")),
        ("bits per byte", lambda s, r: number(s.bits_per_byte, ".4f")),
        ("tokens per second, median", lambda s, r: number(s.tokens_per_second, ",.0f")),
        ("wall time", lambda s, r: "-" if s.seconds is None else duration(s.seconds)),
        ("attempts", lambda s, r: f"{len(r.history.attempts):,}"),
        ("shards", lambda s, r: ", ".join(map(str, r.shards)) or "-"),
    ):
        rows.append([name, *(show(s, r) for s, r in zip(summaries, runs, strict=True))])
    return Table(["", "A", "B"], rows)


def _steps(comparison: Comparison) -> Table:
    caption = "Steps around the first difference, and evenly spaced ones"
    return Table(STEP_COLUMNS, step_rows(comparison), frozenset({0, 2, 3, 4}), caption)


def _recipes(runs: tuple[RunFacts, RunFacts]) -> Block:
    a, b = (run.settings for run in runs)
    keys = [*a, *(key for key in b if key not in a)]
    rows = [
        [key.replace(ENGINE, "DeepSpeed: ", 1), *(plain(side[key]) if key in side else "-" for side in (a, b))]
        for key in keys
        if a.get(key) != b.get(key) or (key in a) != (key in b)
    ]
    if not rows:
        return Text("The recipes and the DeepSpeed JSON are the same.")
    return Table(["key", "A", "B"], rows, caption=f"{len(rows)} of {len(keys)} keys differ")
