"""Check every host before training: one table row per host, and for each failed check the problem and its fix."""

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
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

from codeparrot_ds.doctor import probe
from codeparrot_ds.doctor.judge import Expected, Report, judge
from codeparrot_ds.errors import DataError
from codeparrot_ds.hosts.ssh import ssh_command
from codeparrot_ds.run.directory import RunDirectory, step_of
from codeparrot_ds.run.ds_config import load_ds_config, required_ops, resolve, swap_bytes_per_parameter
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.run.space import checkpoint_room_bytes, checkpoints_to_come
from codeparrot_ds.shards.format import Manifest

_FACTS_SECONDS = 15.0
_MEASURE_SECONDS = 10.0
_IMPORT_SECONDS = 120.0  # from a cold disk
_ALL_REDUCE_SECONDS = 60
_ALL_REDUCE_BYTES = 1 << 24
# What a rank imports; of a package of ours, all its modules. The others are those that functions import.
_IMPORTS = (
    *("codeparrot_ds.train", "codeparrot_ds.training", "codeparrot_ds.export.background"),
    *("deepspeed", "transformers.models.gpt2.modeling_gpt2", "safetensors.torch", "tokenizers", "pyarrow.parquet"),
)
_MAX_ROUNDS = 15  # of link measurements: all pairs of 16 hosts, a subset for more
_SLOW_LINK = 0.4  # fraction of the median bandwidth


def examine(
    slots: Mapping[str, int],
    recipe: Recipe | None,
    *,
    port: int,
    cpu: bool,
    environment: Mapping[str, str] | None = None,
) -> Report:
    """Check all hosts in parallel.

    Args:
        slots: slots of each host.
        recipe: recipe to be trained there, or None.
        port: master port of the rendezvous.
        cpu: whether ranks compute on CPU cores, so that slots need no GPU.
        environment: variables that the ranks will get.
    """
    started = time.monotonic()
    ops: list[str] = []
    wanted: dict[str, Any] = {"names": list(slots), "shards": [], "ops": ops, "port": port, "runs": str(Path.cwd())}
    needs: dict[str, int] = {}
    token = None
    imports = list(_IMPORTS)
    if recipe is not None:
        ds_config = resolve(load_ds_config(recipe.engine.deepspeed), recipe, sum(slots.values()))
        ops += required_ops(ds_config)
        needs = disk_needs(recipe, ds_config, slots)
        wanted["shards"] = [str(path.resolve()) for path in recipe.data.sources]
        wanted["files"] = _files(recipe)
        imports += ["torch.utils.tensorboard"] if recipe.logging.tensorboard else []
        wanted["runs"] = str(RunDirectory(recipe.run_directory).checkpoints.resolve())  # may be a link to another disk
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
            files = wanted.get("files", {})
            expected = Expected(here, slots, wanted["shards"], ops, needs, token is not None, cpu, shared_disk, files)
            report = Report([judge(each.host, answer, expected) for each, answer in zip(probes, answers, strict=True)])
            alive = [each for each, answer in zip(probes, answers, strict=True) if "error" not in answer]
            _import(report, alive, imports)
            _measure_links(report, alive)
            if len(alive) > 1 and len(alive) == len(probes) and not report.red:
                _measure_all_reduce(report, alive, port + 1)
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    report.seconds = time.monotonic() - started
    return report


def _files(recipe: Recipe) -> dict[str, dict[str, int]]:
    """Size (bytes) of each file that every rank reads, by directory; those of the shards are in their manifests."""
    found: dict[str, dict[str, int]] = {}
    directories = [recipe.model.init_from] if recipe.model.init_from is not None else []
    for source in recipe.data.sources:
        with contextlib.suppress(DataError):  # not on this machine: reported as such
            shards = Manifest.read(source).shards
            sizes = {f"{each.name}{suffix}": file["bytes"] for each in shards for suffix, file in each.files.items()}
            found[str(source.resolve())] = sizes
        directories.append(source / "tokenizer")
    for directory in directories:
        files = sorted(directory.iterdir()) if directory.is_dir() else []
        found[str(directory.resolve())] = {each.name: each.stat().st_size for each in files if each.is_file()}
    return found


def _import(report: Report, probes: Sequence["_Probe"], modules: Sequence[str]) -> None:
    """Import on every host what its ranks import."""
    by_host = {each.host: each for each in report.hosts}
    with ThreadPoolExecutor(max(1, len(probes))) as pool:
        answers = pool.map(lambda each: each.ask("imports", list(modules), _IMPORT_SECONDS), probes)
        for each, answer in zip(probes, answers, strict=True):
            host = by_host[each.host]
            if "error" in answer and "software" not in host.red:
                fix = "install the packages of constraints.txt there again"
                host.bad("software", "no import", f"its ranks cannot start ({answer['error']}): {fix}.")


def disk_needs(recipe: Recipe, ds_config: Mapping[str, Any], slots: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes that a run needs on any host, on the disks of its directory ("runs") and offload ("swap")."""
    published = RunDirectory(recipe.run_directory).checkpoint_directories()
    to_come = checkpoints_to_come(recipe, step_of(published[-1]) if published else 0, len(published))
    of_host = Fraction(max(slots.values()), sum(slots.values()))  # largest share of ranks of any host
    on_disk = Fraction(1) if recipe.checkpoints.shared_disk else of_host
    zero_stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    parameters = recipe.model.parameters
    return {
        "runs": checkpoint_room_bytes(recipe, zero_stage, parameters, to_come, on_disk),
        "swap": int(parameters * of_host) * swap_bytes_per_parameter(ds_config),
    }


class _Probe:
    """codeparrot_ds/doctor/probe.py running on one host, over ssh."""

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
            start_new_session=True,  # only the caller handles Ctrl-C
        )
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.write(source)
            self._process.stdin.flush()

    def ask(self, command: str, argument: Any, seconds: float) -> dict[str, Any]:
        """Send a command and return the answer, or {"error"} if it does not arrive within `seconds`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        asked = time.time()
        try:
            self._process.stdin.write(json.dumps([command, argument]).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_error(timer)}
        except (OSError, ValueError) as error:
            answer = {"error": self._last_error(timer) or str(error)}
        finally:
            timer.cancel()
        if command == "facts" and "error" not in answer:
            now = time.time()
            answer["asked_seconds"] = now - self._started
            # It read its clock somewhere in this interval; any time outside it is certainly skew.
            answer["skew_seconds"] = float(answer["time"]) - min(max(float(answer["time"]), asked), now)
        return answer

    def _last_error(self, timer: threading.Timer) -> str:
        self._process.kill()
        _, errors = self._process.communicate()
        lines = errors.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "timed out"

    def end(self) -> None:
        """Terminate the probe."""
        self._process.kill()
        self._process.communicate()


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Yield every pair of `count` hosts once, in rounds with each host in at most one pair (round-robin tournament)."""
    places = list(range(count + count % 2))
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = [(places[i], places[-1 - i]) for i in range(half)]
        yield [pair for pair in pairs if max(pair) < count]
        places = [places[0], places[-1], *places[1:-1]]


def _measure_links(report: Report, probes: Sequence[_Probe]) -> None:
    """Measure the bandwidth of each pair in both directions, and report links far slower than the median."""
    by_host = {each.host: each for each in report.hosts}
    failures: dict[tuple[str, str], str] = {}
    with ThreadPoolExecutor(max(1, len(probes))) as pool:
        for pairs in itertools.islice(rounds(len(probes)), _MAX_ROUNDS):
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
        (a, b): f"the link from {a} to {b} runs at {rate * 8e-9:,.2f} Gb/s, the median is {usual * 8e-9:,.2f} Gb/s"
        for (a, b), rate in report.bandwidth.items()
        if rate < _SLOW_LINK * usual
    }
    blamed = blame(bad)
    for name, host in by_host.items():
        if "ssh" in host.red:
            continue
        if name in blamed:
            fix = "check its cable, its interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) and the firewall"
            cut = any(pair in failures for pair in blamed[name])
            host.bad("links", "cut" if cut else "slow", f"{'; '.join(bad[pair] for pair in blamed[name])}: {fix}.")
        else:
            own = [rate for pair, rate in report.bandwidth.items() if name in pair]
            host.good("links", f"{min(own) * 8e-9:,.1f} Gb/s" if own else "")


def blame(pairs: Iterable[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Return the hosts that explain why these pairs fail, each with the pairs that it explains.

    The host in most pairs is blamed for them, then the host in most of the remaining pairs. On a tie of two, such as
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
