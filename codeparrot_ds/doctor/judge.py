"""Evaluate the facts of a host: one table row per host, and for each failed check the problem and its fix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

COLUMNS = ("ssh", "name", "software", "slots", "clock", "disk", "memory", "data", "shared", "compiler", "port", "links")


_CLOCK_SECONDS = 2.0


_MIN_TEMPORARY_BYTES = 1 << 30


_MIN_MEMORY_BYTES = 4 << 30


_SHOWN_FILES = 5  # of those that differ in a directory


@dataclass
class HostReport:
    """Check results of one host.

    Attributes:
        host: name in the hostfile.
        cells: short text of each column.
        red: columns of failed checks, with the problem and its fix.
        facts: output of codeparrot_ds/doctor/probe.py; an "error" alone if the host could not be queried.
    """

    host: str
    cells: dict[str, str] = field(default_factory=dict)
    red: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def good(self, column: str, shown: str) -> None:
        """Record a passed check."""
        self.cells[column] = shown

    def bad(self, column: str, shown: str, problem: str) -> None:
        """Record a failed check."""
        self.cells[column] = shown
        self.red[column] = problem


@dataclass
class Report:
    """Check results of all hosts.

    Attributes:
        hosts: one report per host.
        bandwidth: (from, to) -> bytes/s of the links measured.
        all_reduce: bytes/s of a short all-reduce over all hosts, or None.
        seconds: duration of the checks.
    """

    hosts: list[HostReport]
    bandwidth: dict[tuple[str, str], float] = field(default_factory=dict)
    all_reduce: float | None = None
    seconds: float = 0.0

    @property
    def red(self) -> dict[str, str]:
        """Hosts with failed checks, and their problems."""
        return {found.host: "; ".join(found.red.values()) for found in self.hosts if found.red}

    def table(self) -> list[str]:
        """Return the lines of a table, followed by the problems."""
        rows = [["host", *COLUMNS]]
        rows += [
            [each.host, *(f"{'! ' if name in each.red else ''}{each.cells.get(name, '')}" for name in COLUMNS)]
            for each in self.hosts
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{each.host}: {problem}" for each in self.hosts for problem in each.red.values()]
        if self.bandwidth:
            (pair, slowest) = min(self.bandwidth.items(), key=lambda item: item[1])
            lines.append(
                f"links: {len(self.bandwidth)} measured, median {median(self.bandwidth.values()) * 8e-9:,.2f} Gb/s, "
                f"slowest {pair[0]} to {pair[1]} {slowest * 8e-9:,.2f} Gb/s"
            )
        if self.all_reduce is not None:
            lines.append(f"all-reduce over all hosts: {self.all_reduce * 8e-9:,.2f} Gb/s of data reduced")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "hosts": [
                {"host": each.host, "cells": each.cells, "red": each.red, "facts": each.facts} for each in self.hosts
            ],
            "bandwidth": [[*pair, value] for pair, value in self.bandwidth.items()],
            "all_reduce": self.all_reduce,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Expected:
    """Requirements of a job on its hosts.

    Attributes:
        here: facts of this machine, which the hosts must match.
        slots: slots of each host.
        shards: shard directories that every host must have.
        ops: DeepSpeed operators that will be compiled.
        disk_bytes: free bytes needed in "runs" and "swap".
        token: whether a file was written to the run directory to test which hosts see it.
        cpu: whether ranks compute on CPU cores.
        shared_disk: whether the hosts must see that file.
        files: size (bytes) of each file that every rank reads, by directory and name.
    """

    here: Mapping[str, Any]
    slots: Mapping[str, int]
    shards: Sequence[str] = ()
    ops: Sequence[str] = ()
    disk_bytes: Mapping[str, int] = field(default_factory=dict)
    token: bool = False
    cpu: bool = False
    shared_disk: bool = True
    files: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def judge(host: str, facts: Mapping[str, Any], expected: Expected) -> HostReport:
    """Evaluate one host, except its links. `facts` holds only "error" if the host could not be queried."""
    report = HostReport(host, facts=dict(facts))
    if "error" in facts:
        fix = f"`ssh {host} true` must work without a prompt, and this environment's Python must exist there"
        report.bad("ssh", "no", f"cannot be queried ({facts['error']}): {fix}.")
        return report
    report.good("ssh", f"{facts['asked_seconds']:.1f} s")
    here = expected.here
    unknown = [name for name, address in facts["addresses"].items() if address is None]
    loopback = [n for n, a in facts["addresses"].items() if n != host and a is not None and a.startswith("127.")]
    if unknown or loopback:
        what = f"cannot resolve {', '.join(unknown)}" if unknown else f"resolves {', '.join(loopback)} to loopback"
        report.bad("name", "unknown", f"{what}: add the addresses of all hosts to DNS or to its /etc/hosts.")
    else:
        report.good("name", facts["hostname"])
    _judge_software(report, facts, here)
    _judge_slots(report, facts, expected)
    skew = facts["skew_seconds"]
    if abs(skew) > _CLOCK_SECONDS:
        report.bad("clock", f"{skew:+.1f} s", f"its clock is off by {skew:+.1f} s: enable NTP (chrony, timesyncd).")
    else:
        report.good("clock", f"{skew:+.1f} s")
    _judge_room(report, facts, expected)
    _judge_data(report, facts, expected)
    lacking = [tool for tool in ("compiler", "ninja") if not facts[tool]] if expected.ops else []
    ready = all(facts["ops"].values())
    if lacking and not ready:
        report.bad("compiler", "none", f"DeepSpeed compiles {', '.join(expected.ops)}: install g++ and ninja there.")
    else:
        report.good("compiler", "ready" if ready else "will build")
    if facts["port_free"]:
        report.good("port", "free")
    else:
        report.bad("port", "taken", "the rendezvous port is in use there: stop the job that uses it.")
    return report


def _judge_software(report: HostReport, facts: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    ours = {"python": here["python"], **here["packages"], "driver": _driver(here)}
    theirs = {"python": facts["python"], **facts["packages"], "driver": _driver(facts)}
    if ours["driver"] is None:  # started from a machine without GPUs
        ours["driver"] = theirs["driver"]
    names = dict.fromkeys([*ours, *theirs])
    different = [f"{n} {theirs.get(n)}, here {ours.get(n)}" for n in names if theirs.get(n) != ours.get(n)]
    if different:
        report.bad("software", "differs", f"{'; '.join(different)}: install the same versions there (constraints.txt).")
    elif facts["source"] != here["source"]:
        report.bad("software", "differs", "its codeparrot_ds source differs from the one here: update that checkout.")
    else:
        report.good("software", f"torch {theirs['torch']}")


def _driver(facts: Mapping[str, Any]) -> str | None:
    return facts["gpus"][0][1] if facts["gpus"] else None


def _judge_slots(report: HostReport, facts: Mapping[str, Any], expected: Expected) -> None:
    slots, gpus = expected.slots[report.host], len(facts["gpus"])
    if not expected.cpu and gpus < slots:
        report.bad(
            "slots",
            f"{slots} of {gpus}",
            f"its hostfile entry has slots={slots}, but it has {gpus} GPUs: lower its slots.",
        )
    else:
        report.good("slots", str(slots) if expected.cpu else f"{slots} of {gpus}")


def _judge_room(report: HostReport, facts: Mapping[str, Any], expected: Expected) -> None:
    free = {**facts["disk_bytes"], "temporary": facts["temporary_bytes"]}
    needed = {"temporary": _MIN_TEMPORARY_BYTES, **expected.disk_bytes}
    problems = [
        f"its {name} directory is not writable"
        if free[name] is None
        else f"{free[name] / 1e9:,.1f} GB free for its {name} directory, {needed[name] / 1e9:,.1f} GB needed"
        for name in needed
        if name in free and (free[name] is None or free[name] < needed[name])
    ]
    if problems:
        report.bad("disk", "full", f"{'; '.join(problems)}: free some space there.")
    else:
        report.good("disk", f"{min(free.values()) / 1e9:,.0f} GB")
    memory = facts["memory_bytes"]
    if memory is not None and memory < _MIN_MEMORY_BYTES:
        report.bad(
            "memory",
            f"{memory / 1e9:,.1f} GB",
            f"{memory / 1e9:,.1f} GB of memory available: stop the processes that use it.",
        )
    else:
        report.good("memory", "?" if memory is None else f"{memory / 1e9:,.0f} GB")


def _judge_data(report: HostReport, facts: Mapping[str, Any], expected: Expected) -> None:
    problems = [
        f"{path}/manifest.json is missing"
        if facts["shards"][path] is None
        else f"{path}/manifest.json differs from the one here"
        for path in expected.shards
        if facts["shards"][path] is None or facts["shards"][path] != expected.here["shards"][path]
    ]
    for directory, files in facts.get("files", {}).items():
        sizes = expected.files[directory]
        wrong = [
            f"{name} is missing" if size is None else f"{name} has {size:,} bytes, not {sizes[name]:,}"
            for name, size in files
        ]
        if wrong:
            more = f" and {len(wrong) - _SHOWN_FILES:,} more" if len(wrong) > _SHOWN_FILES else ""
            problems.append(f"{directory}: {', '.join(wrong[:_SHOWN_FILES])}{more}")
    if problems:
        report.bad("data", "differs", f"{'; '.join(problems)}: place the same shards at the same path.")
    else:
        report.good("data", "same" if expected.shards else "")
    sees = facts["sees"] if expected.token else None
    if sees is False and expected.shared_disk:
        fix = "put `runs` on a shared disk, or set checkpoints.shared_disk=false"
        report.bad("shared", "no", f"it does not see the run directory of this machine: {fix}.")
    else:
        report.good("shared", {True: "yes", False: "own disk", None: ""}[sees])
