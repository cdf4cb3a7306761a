"""Turn a page into one HTML file that needs no network and lets nothing run but its own script.

Everything on a page may come from outside: paths, licences, reasons, generated text. Jinja2 escapes all of it, control
and bidirectional characters are shown as escapes, and the Content-Security-Policy admits only the digests of the
styles and scripts that are part of this package.
"""

import base64
import hashlib
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from codeparrot_ds import __version__
from codeparrot_ds.report.blocks import Chart, Charts, Page, Series, describe
from codeparrot_ds.report.curves import BUCKETS, thin
from codeparrot_ds.system.printable import printable

UPLOT = "1.6.32"  # in page/uPlot; docs/report.md tells how to update it
_DIGITS = 6  # significant ones of a drawn value
_FILES = resources.files("codeparrot_ds.report") / "page"


def render(page: Page, moment: str) -> str:
    """Return the page as HTML.

    Args:
        page: the page.
        moment: when it was made, as text.
    """
    style = _read("uPlot/uPlot.min.css") + "\n" + _read("page.css")
    scripts = [_read("uPlot/uPlot.iife.min.js"), _read("page.js")]
    sections = [section for section in page.sections if section.blocks]
    charts = [
        chart for section in sections for block in section.blocks if isinstance(block, Charts) for chart in block.charts
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_shown
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["describe"] = describe
    return environment.from_string(_read("page.html")).render(
        page=page,
        sections=sections,
        policy=_policy(style, scripts),
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        drawn=[_data(chart) for chart in charts],
        thinned=any(len(series.curve) > 2 * BUCKETS for chart in charts for series in chart.series),
        buckets=BUCKETS,
        licence=_read("uPlot/LICENSE"),
        uplot=UPLOT,
        version=__version__,
        moment=moment,
    )


def _read(name: str) -> str:
    return (_FILES / name).read_text(encoding="utf-8").strip()


def _policy(style: str, scripts: list[str]) -> str:
    """Nothing is loaded from anywhere; only these styles and scripts apply."""
    allowed = " ".join(_source(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_source(style)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(chart: Chart) -> dict[str, Any]:
    """What page.js draws."""
    return {
        "title": chart.title,
        "unit": chart.unit,
        "style": chart.style,
        "scales": chart.scales,
        "series": [_points(series) for series in chart.series],
    }


def _points(series: Series) -> dict[str, Any]:
    curve = thin(series.curve)
    values = [float(f"{value:.{_DIGITS}g}") if abs(value) < float("inf") else None for value in curve.values.tolist()]
    drawn = {"label": printable(series.label), "role": series.role, "run": series.run}
    return {**drawn, "x": curve.steps.tolist(), "y": values}


def _shown(value: Any) -> Any:
    """`value`; text without characters that a reader cannot see, or that change the order of others."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
