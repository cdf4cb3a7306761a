"""Markdown tables of the results of `benchmarks/gpu.py`. A key missing from a row gives an empty cell."""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PEERS = {"trainer": "HF Trainer + DeepSpeed", "nanogpt": "nanoGPT"}
KERNELS = 20


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """Format a Markdown table."""
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]


def tables(rows: list[Row]) -> dict[str, list[str]]:
    """Map the name of each table to its lines; tables without rows are omitted."""
    makers: dict[str, Callable[[list[Row]], tuple[list[str], list[list[str]]]]] = {
        "versions": _versions,
        "ceilings": _ceilings,
        "correctness": _correctness,
        "step": _steps,
        "changes": _changes,
        "memory": _memory,
        "peers": _peers,
        "profile": _profile,
        "checkpoint": _checkpoints,
    }
    made = {name: maker(rows) for name, maker in makers.items()}
    return {name: markdown(head, cells) for name, (head, cells) in made.items() if cells}


def fill(page: Path, found: dict[str, list[str]]) -> None:
    """Insert tables between a page's marks, `<!-- gpu:NAME -->` and `<!-- gpu:end -->`; other tables are unchanged."""
    text = page.read_text(encoding="utf-8")
    for name, lines in found.items():
        before, mark, after = text.partition(f"<!-- gpu:{name} -->\n")
        if not mark:
            sys.exit(f"{page}: no mark <!-- gpu:{name} -->; add it, and <!-- gpu:end --> on a line below it.")
        text = before + mark + "\n".join(lines) + "\n" + after[after.index("<!-- gpu:end -->") :]
    page.write_text(text, encoding="utf-8")


def tokens_per_second(row: Row) -> float | None:
    """Tokens per second, from the median step."""
    if not row.get("step_seconds") or not row.get("tokens_per_step"):
        return None
    return float(row["tokens_per_step"]) / statistics.median(row["step_seconds"])


def device_of(row: Row) -> str:
    """Short device name: `H100` for `NVIDIA H100 80GB HBM3`."""
    words = str(row.get("device", "")).split()
    return next((word for word in words if any(map(str.isdigit, word))), " ".join(words))


def size_of(row: Row) -> str:
    """Micro-batch and accumulation, e.g. `16 x 4`."""
    return f"{row.get('micro_batch', '')} x {row.get('accumulation', '')}"


def as_it_is(row: Row) -> bool:
    """Whether nothing is changed, compiled or recomputed."""
    return not row.get("change") and not row.get("compile") and row.get("recompute", "none") == "none"


def way_of(row: Row) -> list[str]:
    """Cells for ZeRO stage, recomputation and compilation."""
    return [_stage(row), row.get("recompute", "none"), "yes" if row.get("compile") else ""]


def _of(rows: list[Row], part: str) -> list[Row]:
    return [row for row in rows if row.get("part") == part]


def _stage(row: Row) -> str:
    return "" if row.get("stage") is None else f"ZeRO-{row['stage']}"


def _gigabytes(row: Row, key: str) -> str:
    return f"{row[key] / 1e9:.2f}" if row.get(key) else ""


def _speed(row: Row) -> list[str]:
    """Cells for tokens/s, ms per step and MFU."""
    speed = tokens_per_second(row)
    if speed is None:
        return ["out of memory" if row.get("out_of_memory") else str(row.get("error", ""))[:80], "", ""]
    known = row.get("flops_per_token") and row.get("peak_flops") and row.get("device") != "cpu"
    mfu = f"{speed * row['flops_per_token'] / row['peak_flops']:.1%}" if known else ""
    return [f"{speed:,.0f}", f"{statistics.median(row['step_seconds']) * 1e3:,.1f}", mfu]


SPEED = ["tokens/s", "ms a step", "MFU"]


def _ratio(speed: float | None, to: float | None) -> str:
    return f"{speed / to:.3f}" if speed and to else ""


def _versions(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    found: list[Row] = []
    for row in _of(rows, "versions"):
        if row not in found:
            found.append(row)
    keys = dict.fromkeys(key for row in found for key in row if key not in ("part", "GPU"))
    head = ["", *(str(row.get("GPU", "")) for row in found)]
    return head, [[key, *(str(row.get(key, "")) for row in found)] for key in keys]


def _ceilings(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    cells = []
    for row in _of(rows, "ceiling"):
        value = row.get("value")
        found = f"{value:,.1f}" if isinstance(value, float) else str(value or row.get("error", ""))
        milliseconds = f"{row['seconds'] * 1e3:,.3f}" if "seconds" in row else ""
        cells.append(
            [device_of(row), row.get("what", ""), row.get("shape", ""), milliseconds, found, row.get("unit", "")]
        )
    return ["on", "what", "shape", "ms", "found", ""], cells


def _correctness(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    cells = []
    for row in _of(rows, "correctness"):
        found = row.get("found", "")
        found = f"{found:.4f}" if isinstance(found, float) else " ".join(str(found).replace("|", "/").split())[:200]
        cells.append([row.get("cell", ""), "pass" if row.get("ok") else "**FAIL**", found, str(row.get("wanted", ""))])
    return ["cell", "", "found", "wanted"], cells


def _steps(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    head = ["on", "cell", "ZeRO", "recomputing", "compiled", *SPEED, "peak GB", "reserved GB"]
    cells = []
    for row in _of(rows, "step"):
        if not row.get("change"):
            memory = [_gigabytes(row, key) for key in ("peak_bytes", "reserved_bytes")]
            cells.append([device_of(row), row.get("cell", size_of(row)), *way_of(row), *_speed(row), *memory])
    return head, cells


def _changes(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Each change, compared with the last preceding unchanged cell of the same size."""
    references: dict[Any, Row] = {}
    cells = []
    for row in _of(rows, "step"):
        key = (device_of(row), row.get("stage"), size_of(row))
        if as_it_is(row):
            references[key] = row
        elif key in references:
            ratio = _ratio(tokens_per_second(row), tokens_per_second(references[key]))
            recomputing = f"recomputing: {row['recompute']}" if row.get("recompute", "none") != "none" else ""
            change = ", ".join(filter(None, [row.get("change"), "compiled" if row.get("compile") else "", recomputing]))
            names = [device_of(row), change, f"{_stage(row)}, {size_of(row)}"]
            cells.append([*names, *_speed(row), _gigabytes(row, "peak_bytes"), ratio])
    return ["on", "change", "of", *SPEED, "peak GB", "tokens/s : as it is"], cells


def _memory(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    head = [
        "on",
        "cell",
        "change",
        "ZeRO",
        "recomputing",
        "compiled",
        "predicted GB",
        "peak GB",
        "off by",
        "should fit",
        "fits",
    ]
    cells = []
    for row in _of(rows, "step"):
        predicted, peak = row.get("predicted_peak_bytes"), row.get("peak_bytes")
        if not predicted:
            continue
        ran_out = bool(row.get("out_of_memory"))
        off = f"{predicted / peak - 1:+.1%}" if peak and not ran_out else ""
        measured = "" if ran_out else _gigabytes(row, "peak_bytes")
        fits = "no" if ran_out else "yes" if row.get("step_seconds") else ""
        should = "yes" if row.get("fits") else "no"
        names = [device_of(row), row.get("cell", size_of(row)), row.get("change", ""), *way_of(row)]
        cells.append([*names, _gigabytes(row, "predicted_peak_bytes"), measured, off, should, fits])
    return head, cells


def _peers(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """The peers, then our most recent cells of the same sizes, measured within the same minutes."""
    head = ["on", "who", "micro-batch", "ZeRO", "compiled", *SPEED, "peak GB", "ours : theirs"]
    cells = []
    shown: list[Row] = []
    for peer in _of(rows, "peer"):
        same = [
            row
            for row in _of(rows, "step")
            if size_of(row) == size_of(peer) and device_of(row) == device_of(peer) and row.get("stage") == 1
            and not row.get("change") and row.get("recompute", "none") == "none" and tokens_per_second(row)
        ]  # fmt: skip
        ours = list({bool(row.get("compile")): row for row in same}.values())
        best = max(ours, key=lambda row: tokens_per_second(row) or 0.0, default=None)
        ratio = _ratio(tokens_per_second(best) if best else None, tokens_per_second(peer))
        shown += [row for row in ours if row not in shown]
        cells.append([*_who(peer, PEERS.get(peer.get("who", ""), str(peer.get("who")))), ratio])
    return head, cells + [[*_who(row, "ours"), ""] for row in shown]


def _checkpoints(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    cells = []
    for row in _of(rows, "checkpoint"):
        seconds = [f"{row[key]:.2f}" for key in ("waited_seconds", "seconds")]
        cells.append([device_of(row), row["memory"], _gigabytes(row, "bytes"), *seconds])
    return ["on", "host memory", "GB", "training waits, s", "written after, s"], cells


def _who(row: Row, who: str) -> list[str]:
    stage, _, compiled = way_of(row)
    return [device_of(row), who, size_of(row), stage, compiled, *_speed(row), _gigabytes(row, "peak_bytes")]


def _profile(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """The kernels of the last profile that take the most time."""
    profiles: list[list[Row]] = [row["operators"] for row in _of(rows, "profile") if row.get("operators")]
    operators = profiles[-1] if profiles else []
    total = sum(each["microseconds"] for each in operators) or 1.0
    cells = [_kernel(each["name"], each["calls"], each["microseconds"], total) for each in operators[:KERNELS]]
    if rest := operators[KERNELS:]:
        calls, took = (sum(each[key] for each in rest) for key in ("calls", "microseconds"))
        cells.append(_kernel(f"{len(rest)} others", calls, took, total))
    if operators:
        cells.append(_kernel("all", sum(each["calls"] for each in operators), total, total))
    return ["kernel or operator", "calls", "ms", "share"], cells


def _kernel(name: str, calls: int, microseconds: float, total: float) -> list[str]:
    return [name.replace("|", "/")[:80], f"{calls:,}", f"{microseconds / 1e3:,.2f}", f"{microseconds / total:.1%}"]
