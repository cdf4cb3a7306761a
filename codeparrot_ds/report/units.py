"""Numbers and settings as text."""

import json
from typing import Any


def shown(value: float, style: str = "number") -> str:
    """A value as text, in the `style` of its chart."""
    if style == "percent":
        return f"{value:.2f} %"
    if style == "bytes":
        return size(value)
    if style == "small":
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def size(count: float) -> str:
    """Bytes as text with a decimal prefix."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def large(count: float) -> str:
    """A count as text with three digits: 3.40 M."""
    for unit in ("", " k", " M", " G"):
        if abs(count) < 999.5:
            return f"{count:,.0f}" if not unit else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.3g} T"


def duration(seconds: float) -> str:
    """Seconds as text with two units: "2 h 05 min"."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def plain(value: Any) -> str:
    """A setting as YAML writes it on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | tuple) else str(value)
