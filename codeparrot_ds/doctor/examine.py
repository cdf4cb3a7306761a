"""Look at every host before money is spent: one row a host, and for each red cell what is wrong and how to mend it."""

import contextlib
import inspect
import itertools
import json
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

from codeparrot_ds.doctor import probe
from codeparrot_ds.hosts.ssh import ssh_command
from codeparrot_ds.run.directory import RunDirectory, step_of
from codeparrot_ds.run.ds_config import load_ds_config, required_ops, swap_bytes_per_parameter
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.run.space import checkpoint_room_bytes, checkpoints_to_come

COLUMNS = ("ssh", "name", "software", "slots", "clock", "disk", "memory", "data", "shared", "compiler", "port", "links")
_FACTS_SECONDS = 15.0
_MEASURE_SECONDS = 10.0
_ALL_REDUCE_SECONDS = 60  # with imports from a cold disk
_ALL_REDUCE_BYTES = 1 << 24
_MOST_ROUNDS = 15  # of links measured: all pairs of 16 hosts; of more hosts, a part
_CLOCK_SECONDS = 2.0
_SLOW_LINK = 0.4  # of the median
_LEAST_TEMPORARY_BYTES = 1 << 30
_LEAST_MEMORY_BYTES = 4 << 30


@dataclass
class HostReport:
    """What was found of one host.

    Attributes:
        host: as the hostfile names it.
        cells: by column, a word or two.
        red: by column, what is wrong and how to mend it.
        facts: as codeparrot_ds/doctor/probe.py gave them; empty when it could not be reached.
    """

    host: str
    cells: dict[str, str] = field(default_factory=dict)
    red: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def good(self, column: str, shown: str) -> None:
        """Fill a cell in."""
        self.cells[column] = shown

    def bad(self, column: str, shown: str, problem: str) -> None:
        """Fill a cell in, in red."""
        self.cells[column] = shown
        self.red[column] = problem


@dataclass
class Report:
    """All hosts.

    Attributes:
        bandwidth: (from, to) -> bytes/s of the links that were measured.
        all_reduce: bytes/s of a short all-reduce over all hosts, or None.
    """

    hosts: list[HostReport]
    bandwidth: dict[tuple[str, str], float] = field(default_factory=dict)
    all_reduce: float | None = None
    seconds: float = 0.0

    @property
    def red(self) -> dict[str, str]:
        """Hosts with something red, and what."""
        return {found.host: "; ".join(found.red.values()) for found in self.hosts if found.red}

    def table(self) -> list[str]:
        """Lines of a table, and what is red below it."""
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
        """Plain values, for JSON."""
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
    """What a job needs of its hosts.

    Attributes:
        here: facts of this machine, which the others must match.
        ops: DeepSpeed operators that will be compiled.
        disk_bytes: needed in "runs" and "swap".
        token: a file was put into the run directory for the hosts to see.
        shared_disk: they must see it.
    """

    here: Mapping[str, Any]
    slots: Mapping[str, int]
    shards: Sequence[str] = ()
    ops: Sequence[str] = ()
    disk_bytes: Mapping[str, int] = field(default_factory=dict)
    token: bool = False
    cpu: bool = False
    shared_disk: bool = True


def examine(
    slots: Mapping[str, int],
    recipe: Recipe | None,
    *,
    port: int,
    cpu: bool,
    environment: Mapping[str, str] | None = None,
) -> Report:
    """Check all hosts at once.

    Args:
        slots: of each host.
        recipe: what is to be trained there, or None.
        port: the master's, for the rendezvous.
        cpu: ranks compute on CPU cores, so slots need no GPU.
        environment: what ranks will find in theirs.
    """
    started = time.monotonic()
    ops: list[str] = []
    wanted: dict[str, Any] = {"names": list(slots), "shards": [], "ops": ops, "port": port, "runs": str(Path.cwd())}
    needs: dict[str, int] = {}
    token = None
    if recipe is not None:
        ds_config = load_ds_config(recipe.engine.deepspeed)  # what is "auto" there does not matter here
        ops += required_ops(ds_config)
        needs = disk_needs(recipe, ds_config, slots)
        wanted["shards"] = [str(path.resolve()) for path in recipe.data.sources]
        wanted["runs"] = str(recipe.run_directory.resolve())
        wanted["swap"] = str(recipe.swap_directory) if recipe.swap_directory else None
        recipe.run_directory.mkdir(parents=True, exist_ok=True)
        token = recipe.run_directory.resolve() / f".doctor-{secrets.token_hex(8)}"
        token.touch()
        wanted["see"] = str(token)
    try:
        with contextlib.ExitStack() as stack:
            with ThreadPoolExecutor(len(slots)) as pool:
                probes = list(pool.map(lambda host: _Probe(host, environment or {}), slots))
                for each in probes:
                    stack.callback(each.end)
                answers = list(pool.map(lambda each: each.ask("facts", wanted, _FACTS_SECONDS), probes))
            here = probe.facts(wanted)
            shared_disk = recipe is None or recipe.checkpoints.shared_disk
            expected = Expected(here, slots, wanted["shards"], ops, needs, token is not None, cpu, shared_disk)
            report = Report([judge(each.host, answer, expected) for each, answer in zip(probes, answers, strict=True)])
            alive = [each for each, answer in zip(probes, answers, strict=True) if "error" not in answer]
            _measure_links(report, alive)
            if len(alive) > 1 and len(alive) == len(probes) and not report.red:
                _measure_all_reduce(report, alive, port + 1)
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    report.seconds = time.monotonic() - started
    return report


def disk_needs(recipe: Recipe, ds_config: Mapping[str, Any], slots: Mapping[str, int]) -> dict[str, int]:
    """Bytes that a run needs on the disk of its directory, "runs", and of what it offloads, "swap", on any host."""
    published = RunDirectory(recipe.run_directory).checkpoint_directories()
    to_come = checkpoints_to_come(recipe, step_of(published[-1]) if published else 0, len(published))
    of_host = Fraction(max(slots.values()), sum(slots.values()))  # the most ranks that any host has
    on_disk = Fraction(1) if recipe.checkpoints.shared_disk else of_host
    zero_stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    parameters = recipe.model.parameters
    return {
        "runs": checkpoint_room_bytes(recipe, zero_stage, parameters, to_come, on_disk),
        "swap": int(parameters * of_host) * swap_bytes_per_parameter(ds_config),
    }


def judge(host: str, facts: Mapping[str, Any], expected: Expected) -> HostReport:
    """One host's row, without its links. `facts` has "error" alone where the host could not be asked."""
    report = HostReport(host, facts=dict(facts))
    if "error" in facts:
        mend = f"`ssh {host} true` must work without a prompt, and the Python of this environment must be there"
        report.bad("ssh", "no", f"cannot be asked ({facts['error']}): {mend}.")
        return report
    report.good("ssh", f"{facts['asked_seconds']:.1f} s")
    here = expected.here
    unknown = [name for name, address in facts["addresses"].items() if address is None]
    loopback = [n for n, a in facts["addresses"].items() if n != host and a is not None and a.startswith("127.")]
    if unknown or loopback:
        what = f"has no address for {', '.join(unknown)}" if unknown else f"takes {', '.join(loopback)} for itself"
        report.bad("name", "unknown", f"{what}: put all hosts with their addresses into DNS or its /etc/hosts.")
    else:
        report.good("name", facts["hostname"])
    _judge_software(report, facts, here)
    _judge_slots(report, facts, expected)
    skew = facts["skew_seconds"]
    if abs(skew) > _CLOCK_SECONDS:
        report.bad("clock", f"{skew:+.1f} s", f"its clock is {skew:+.1f} s off: switch NTP on (chrony, timesyncd).")
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
        report.bad("port", "taken", "the rendezvous port is in use there: end the job that holds it.")
    return report


def _judge_software(report: HostReport, facts: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    ours = {"python": here["python"], **here["packages"], "driver": _driver(here)}
    theirs = {"python": facts["python"], **facts["packages"], "driver": _driver(facts)}
    if ours["driver"] is None:  # started from a machine without GPUs
        ours["driver"] = theirs["driver"]
    different = [f"{name} {theirs[name]}, here {ours[name]}" for name in ours if theirs[name] != ours[name]]
    if different:
        report.bad("software", "differs", f"{'; '.join(different)}: install the same there (constraints.txt).")
    elif facts["source"] != here["source"]:
        report.bad("software", "differs", "its codeparrot_ds has other source files than here: update that checkout.")
    else:
        report.good("software", f"torch {theirs['torch']}")


def _driver(facts: Mapping[str, Any]) -> str | None:
    return facts["gpus"][0][1] if facts["gpus"] else None


def _judge_slots(report: HostReport, facts: Mapping[str, Any], expected: Expected) -> None:
    slots, gpus = expected.slots[report.host], len(facts["gpus"])
    if not expected.cpu and gpus < slots:
        report.bad("slots", f"{slots} of {gpus}", f"the hostfile gives it slots={slots}, and it has {gpus} GPUs.")
    else:
        report.good("slots", str(slots) if expected.cpu else f"{slots} of {gpus}")


def _judge_room(report: HostReport, facts: Mapping[str, Any], expected: Expected) -> None:
    free = {**facts["disk_bytes"], "temporary": facts["temporary_bytes"]}
    needed = {"temporary": _LEAST_TEMPORARY_BYTES, **expected.disk_bytes}
    problems = [
        f"the disk of its {name} directory cannot be written to"
        if free[name] is None
        else f"{free[name] / 1e9:,.1f} GB free for its {name} directory, {needed[name] / 1e9:,.1f} GB needed"
        for name in needed
        if name in free and (free[name] is None or free[name] < needed[name])
    ]
    if problems:
        report.bad("disk", "full", f"{'; '.join(problems)}: make room there.")
    else:
        report.good("disk", f"{min(free.values()) / 1e9:,.0f} GB")
    memory = facts["memory_bytes"]
    if memory is not None and memory < _LEAST_MEMORY_BYTES:
        report.bad(
            "memory", f"{memory / 1e9:,.1f} GB", f"{memory / 1e9:,.1f} GB of memory available: end what takes it."
        )
    else:
        report.good("memory", "?" if memory is None else f"{memory / 1e9:,.0f} GB")


def _judge_data(report: HostReport, facts: Mapping[str, Any], expected: Expected) -> None:
    problems = [
        f"{path}/manifest.json is not there"
        if facts["shards"][path] is None
        else f"{path}/manifest.json differs from the one here"
        for path in expected.shards
        if facts["shards"][path] is None or facts["shards"][path] != expected.here["shards"][path]
    ]
    if problems:
        report.bad("data", "differs", f"{'; '.join(problems)}: put the same shards at the same path.")
    else:
        report.good("data", "same" if expected.shards else "")
    sees = facts["sees"] if expected.token else None
    if sees is False and expected.shared_disk:
        mend = "put `runs` on a shared disk, or set checkpoints.shared_disk=false"
        report.bad("shared", "no", f"it does not see the run directory of this machine: {mend}.")
    else:
        report.good("shared", {True: "yes", False: "own disk", None: ""}[sees])


class _Probe:
    """codeparrot_ds/doctor/probe.py at work on one host, over ssh."""

    def __init__(self, host: str, environment: Mapping[str, str]) -> None:
        self.host = host
        variables = [f"{name}={value}" for name, value in environment.items()]
        source = inspect.getsource(probe).encode()
        program = f"import sys; exec(compile(sys.stdin.buffer.read({len(source)}), 'probe', 'exec'))"
        self._started = time.time()
        self._process = subprocess.Popen(
            [*ssh_command(host), shlex.join(["env", *variables, sys.executable, "-u", "-c", program])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the caller
        )
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.write(source)
            self._process.stdin.flush()

    def ask(self, command: str, argument: Any, seconds: float) -> dict[str, Any]:
        """Its answer; {"error"} when it has none in time."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        asked = time.time()
        try:
            self._process.stdin.write(json.dumps([command, argument]).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words(timer)}
        except (OSError, ValueError) as error:
            answer = {"error": self._last_words(timer) or str(error)}
        finally:
            timer.cancel()
        if command == "facts" and "error" not in answer:
            now = time.time()
            answer["asked_seconds"] = now - self._started
            # It looked at its clock somewhere between; what lies beyond is skew for certain.
            answer["skew_seconds"] = float(answer["time"]) - min(max(float(answer["time"]), asked), now)
        return answer

    def _last_words(self, timer: threading.Timer) -> str:
        self._process.kill()
        _, said = self._process.communicate()
        lines = said.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no answer in time"

    def end(self) -> None:
        """No more questions."""
        self._process.kill()
        self._process.communicate()


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of `count` hosts once, in rounds with each host in at most one pair: a round-robin tournament."""
    places = list(range(count + count % 2))
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = [(places[i], places[-1 - i]) for i in range(half)]
        yield [pair for pair in pairs if max(pair) < count]
        places = [places[0], places[-1], *places[1:-1]]


def _measure_links(report: Report, probes: Sequence[_Probe]) -> None:
    """Bandwidth of each pair, first one way, then the other; names the links that are far slower than most."""
    by_host = {each.host: each for each in report.hosts}
    failures: dict[tuple[str, str], str] = {}
    with ThreadPoolExecutor(max(1, len(probes))) as pool:
        for pairs in itertools.islice(rounds(len(probes)), _MOST_ROUNDS):
            for flip in (False, True):
                ends = [(probes[b], probes[a]) if flip else (probes[a], probes[b]) for a, b in pairs]
                targets = [(by_host[a.host].facts["addresses"][b.host], by_host[b.host].facts) for a, b in ends]
                found = pool.map(
                    lambda pair, target: pair[0].ask("measure", [target[0], target[1]["listens"]], _MEASURE_SECONDS),
                    ends,
                    targets,
                )
                for (a, b), answer in zip(ends, found, strict=True):
                    if "error" in answer:
                        failures[a.host, b.host] = str(answer["error"])
                    else:
                        report.bandwidth[a.host, b.host] = float(answer["bandwidth"])
    usual = median(report.bandwidth.values()) if report.bandwidth else 0.0
    bad = {(a, b): f"{a} cannot reach {b} ({why})" for (a, b), why in failures.items()}
    bad |= {
        (a, b): f"the link from {a} to {b} carries {rate * 8e-9:,.2f} Gb/s, most carry {usual * 8e-9:,.2f}"
        for (a, b), rate in report.bandwidth.items()
        if rate < _SLOW_LINK * usual
    }
    blamed = blame(bad)
    for name, host in by_host.items():
        if "ssh" in host.red:
            continue
        if name in blamed:
            mend = "look at its cable, its interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) and the firewall"
            cut = any(pair in failures for pair in blamed[name])
            host.bad("links", "cut" if cut else "slow", f"{'; '.join(bad[pair] for pair in blamed[name])}: {mend}.")
        else:
            own = [rate for pair, rate in report.bandwidth.items() if name in pair]
            host.good("links", f"{min(own) * 8e-9:,.1f} Gb/s" if own else "")


def blame(pairs: Iterable[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Hosts that explain why these pairs fail, each with the pairs that it explains.

    The host in most of them is to blame for those, then the one in most of what is left. Where two are in as many, as
    the ends of a single link, both are named.
    """
    left, found = list(pairs), dict[str, list[tuple[str, str]]]()
    while left:
        counts = Counter(host for pair in left for host in pair)
        most = max(counts.values())
        worst = [host for host, count in counts.items() if count == most]
        for host in worst if len(worst) <= 2 else worst[:1]:
            found[host] = [pair for pair in left if host in pair]
        left = [pair for pair in left if not set(pair) & set(found)]
    return found


def _measure_all_reduce(report: Report, probes: Sequence[_Probe], port: int) -> None:
    first = probes[0].host
    address = next(each.facts["addresses"][first] for each in report.hosts if each.host == probes[-1].host)
    wanted = [
        {"address": address, "port": port, "rank": rank, "world_size": len(probes), "bytes": _ALL_REDUCE_BYTES}
        for rank in range(len(probes))
    ]
    with ThreadPoolExecutor(len(probes)) as pool:
        found = list(
            pool.map(
                lambda each, what: each.ask(
                    "all_reduce", {**what, "seconds": _ALL_REDUCE_SECONDS}, _ALL_REDUCE_SECONDS + 2
                ),
                probes,
                wanted,
            )
        )
    errors = {each.host: answer["error"] for each, answer in zip(probes, found, strict=True) if "error" in answer}
    for host in report.hosts:
        if host.host in errors:
            host.bad("links", "no all-reduce", f"an all-reduce over all hosts failed there ({errors[host.host]}).")
    if not errors:
        report.all_reduce = min(answer["bytes_per_second"] for answer in found)
