"""Documents to token ids: ours and peers on the same input in one session. Prints a table, writes JSON.

Usage: python benchmarks/preprocess.py [CORPUS] [TOKENIZER] [--text-mb N] [--workers N] [--output FILE.json]

Every pipeline is measured as a whole command, from JSON Lines to ids on disk, including interpreter start, imports and
all its processes, pinned to as many cores as there are workers. The floor is gunzip, parse and encode in sequence,
without start-up, in the same number of processes. MB are 10^6 bytes, of UTF-8 text or of memory.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from documents import CorpusFile, Documents, choose_files, link_corpus, unpack
from environments import environment, plain_env
from measure import Measurement, measure
from pipelines import DRIVERS, Peer, Task, megatron_checkout, megatron_version, peers

EOS_ID = 0
LARGE_COPIES = 10
LARGE_ROUNDS = 5
_OUR_PACKAGES = ("codeparrot-ds", "tokenizers", "fastokens", "msgspec", "isal", "numpy", "pyarrow", "xxhash")


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        runs: measurements, of which the median is shown.
        tokens: number written, end tokens included.
        differing_documents: number of our documents missing from its ids; None if not compared.
        half_cpu_seconds: CPU seconds on the first half of the files; None if not run on them.
    """

    pipeline: str
    runs: list[Measurement]
    tokens: int
    differing_documents: int | None = None
    note: str = ""
    half_cpu_seconds: float | None = None

    def median(self, field: str) -> float:
        """Median over the runs of one field of Measurement."""
        return statistics.median(getattr(run, field) for run in self.runs)


class Ours:
    """Runs our command repeatedly, each time into a fresh output directory.

    Attributes:
        cache: a user's cache directory, filled by the first run with a tokenizer.
    """

    def __init__(self, tokenizer: Path, directory: Path) -> None:
        self._tokenizer, self._directory, self._runs = tokenizer, directory, itertools.count(1)
        self.cache = directory / "cache"

    def build(
        self,
        documents: Documents,
        workers: int,
        *,
        cache: Path | None = None,
        encoder: str = "auto",
        interval_seconds: float | None = 0.05,
        cores: Sequence[int] = (),
    ) -> tuple[Measurement, Path]:
        """Run `shards build` once with a user's cache directory; returns its measurement and the shards."""
        output = self._directory / f"shards-{next(self._runs)}"
        cache = cache or self.cache
        cache.mkdir(exist_ok=True)
        measured = measure(
            our_command(
                *("shards", "build", documents.directory, "-o", output),
                *("--tokenizer", self._tokenizer, "--workers", workers, "--encoder", encoder),
            ),
            output.with_suffix(".log"),
            env=dict(os.environ) | {"XDG_CACHE_HOME": str(cache)},
            cores=cores or cores_for(workers),
            interval_seconds=interval_seconds,
        )
        return measured, output

    def measure(
        self,
        documents: Documents,
        workers: int,
        *,
        interval_seconds: float | None = 0.05,
        cores: Sequence[int] = (),
    ) -> Measurement:
        """Run `build` with the tokenizer already proved in the first run, and delete the shards."""
        measured, output = self.build(documents, workers, interval_seconds=interval_seconds, cores=cores)
        shutil.rmtree(output)
        return measured

    def measure_apart(self, documents: Documents, jobs: int) -> Measurement:
        """Run `jobs` independent one-worker builds concurrently, one core each.

        This is the throughput of the cores without serial sections or waiting, an upper bound for the same number of
        workers. The wall time is that of the slowest.
        """
        with ThreadPoolExecutor(jobs) as threads:
            each = list(
                threads.map(
                    lambda core: self.measure(documents, 1, interval_seconds=None, cores=[core]), cores_for(jobs)
                )
            )
        return Measurement(max(m.wall_seconds for m in each), sum(m.cpu_seconds for m in each), 0, 0, 0.0)


def our_command(*arguments: object) -> list[str]:
    """Arguments of a command of our package, run by this interpreter."""
    return [sys.executable, "-m", "codeparrot_ds.cli", *map(str, arguments)]


def read_ours(shards: Path) -> np.ndarray:
    """All ids of a shard directory, [tokens] uint16."""
    return np.concatenate([np.fromfile(file, "<u2") for file in sorted(shards.glob("*.bin"))])


def compare_shards(shards: Path, others: Path) -> str:
    """State that two shard directories have identical files; RuntimeError if they do not."""
    names = sorted(str(path.relative_to(shards)) for path in shards.rglob("*") if path.is_file())
    if names != sorted(str(path.relative_to(others)) for path in others.rglob("*") if path.is_file()):
        raise RuntimeError(f"{shards} and {others} contain different files")
    for name in names:
        if (shards / name).read_bytes() != (others / name).read_bytes():
            raise RuntimeError(f"{name} differs between fastokens and tokenizers")
    return f"all {len(names)} files equal those of fastokens, byte for byte"


def cores_for(workers: int) -> list[int]:
    """The first `workers` of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))[:workers]


def document_digests(ids: np.ndarray) -> Counter[bytes]:
    """Count the documents in `ids`, [tokens] uint16 with an end token after every document, by digest."""
    ends = np.flatnonzero(ids == EOS_ID) + 1
    return Counter(
        xxhash.xxh3_128_digest(ids[start:end].data) for start, end in zip([0, *ends[:-1]], ends, strict=True)
    )


def run_peer(peer: Peer, task: Task, half: Task | None, ours: Counter[bytes], work: Path) -> tuple[Row, dict[str, str]]:
    """Run a peer once, and once on half of the documents if given. Returns its row and its package versions.

    Documents are compared regardless of order. We treat a literal end token in a text as text; a peer that reads it as
    the end splits the document in two, and the document counts as differing.
    """
    made = environment(work / "environments" / peer.environment, peer.packages, peer.at_start)

    def run(one: Task) -> Measurement:
        # A separate empty cache: datasets.map would otherwise reuse the results of an earlier run.
        env = plain_env(HF_HOME=f"{one.output}-cache", HF_HUB_OFFLINE="1")
        command = [str(made.python), *peer.command(one)]
        return measure(command, one.output.with_suffix(".log"), env=env, cores=cores_for(one.workers))

    half_cpu_seconds = run(half).cpu_seconds if half else None
    measured = run(task)
    ids = peer.read(task.output)
    missing = (ours - document_digests(ids)).total()
    return Row(peer.title, [measured], len(ids), missing, peer.note, half_cpu_seconds), made.versions


def measure_floor(documents: Documents, half: Documents | None, tokenizer: Path, workers: int, log: Path) -> Row:
    """Measure the floor on all documents, `workers` concurrent processes on one core each; `half` are the first files.

    The concurrency matches our workers, because cores share caches and memory, and hyperthreads share a core.
    """
    cores = cores_for(workers)
    jobs = []
    for i, core in enumerate(cores):
        out = open(log.with_suffix(f".{i}.log"), "w+", encoding="utf-8")  # noqa: SIM115 (read below)
        arguments = (DRIVERS / "floor.py", tokenizer / "tokenizer.json", core, *documents.files[i::workers])
        jobs.append((out, subprocess.Popen([sys.executable, *map(str, arguments)], stdout=out)))
    files: list[dict[str, Any]] = [{}] * len(documents.files)
    for i, (out, job) in enumerate(jobs):
        if job.wait() != 0:
            raise RuntimeError(f"the floor failed, see {out.name}")
        out.seek(0)
        files[i::workers] = json.loads(out.read().splitlines()[-1])
        out.close()
    wall = max(sum(file["wall_seconds"] for file in files[i::workers]) for i in range(workers))
    one = Measurement(wall, sum(file["cpu_seconds"] for file in files), 0, 0, 0.0)
    half_cpu_seconds = sum(file["cpu_seconds"] for file in files[: len(half.files)]) if half else None
    tokens = sum(file["tokens"] for file in files)
    note = "gunzip, parse, encode in series on every core at once; no start-up, no end tokens, nothing written"
    return Row(f"floor, {workers} at once", [one], tokens, None, note, half_cpu_seconds)


def marginal_cpu_seconds(row: Row) -> float | None:
    """CPU seconds for the second half of the files alone, start-up excluded; None if lost in noise."""
    if row.half_cpu_seconds is None:
        return None
    slope = row.median("cpu_seconds") - row.half_cpu_seconds
    return slope if slope > 0 else None


def share_of_floor(floor: Row, ours: Row) -> dict[str, float | None]:
    """Floor / ours in CPU seconds, for the whole command and for the second half of the files alone."""
    of_floor, of_ours = marginal_cpu_seconds(floor), marginal_cpu_seconds(ours)
    return {
        "whole_command": floor.median("cpu_seconds") / ours.median("cpu_seconds"),
        "marginal": of_floor / of_ours if of_floor and of_ours else None,
    }


def check_large(
    ours: Ours, chosen: list[CorpusFile], documents: Documents, tokenizer: Path, workers: int
) -> dict[str, Any]:
    """Measure ours and the floor on many copies of the documents, where start-up is negligible.

    Gives memory, scaling and the share of the floor. Memory is sampled in one run; times are taken in other runs, round
    by round, without the sampler.
    """
    many = link_corpus(chosen, documents.directory.with_name("corpus-copies"), LARGE_COPIES)
    runs = {"once": [ours.measure(documents, workers)], "copies, memory": [ours.measure(many, workers)]}
    for _ in range(LARGE_ROUNDS):
        for n in (workers, 1):
            runs.setdefault(f"copies, workers {n}", []).append(ours.measure(many, n, interval_seconds=None))
        runs.setdefault(f"copies, {workers} jobs of 1", []).append(ours.measure_apart(many, workers))
        floor = measure_floor(many, None, tokenizer, workers, many.directory.with_suffix(".floor"))
        runs.setdefault("floor", []).extend(floor.runs)
    print(f"\n{LARGE_COPIES} copies of each file, {many.text_bytes / 1e6:,.0f} MB of text, medians")
    print(f"{'':<22} {'wall s':>8} {'CPU s':>8} {'peak MB':>8} {'RSS MB':>8}")
    for name, each in runs.items():
        fields = ("wall_seconds", "cpu_seconds", "peak_pss_bytes", "peak_rss_bytes")
        wall, cpu, pss, rss = (statistics.median(getattr(run, field) for run in each) for field in fields)
        print(f"{name:<22} {wall:8.2f} {cpu:8.2f} {pss / 1e6:8,.0f} {rss / 1e6:8,.0f}")

    def paired(field: str, one: str, other: str) -> list[float]:
        return [getattr(a, field) / getattr(b, field) for a, b in zip(runs[one], runs[other], strict=True)]

    both, apart = f"copies, workers {workers}", f"copies, {workers} jobs of 1"
    shares = paired("cpu_seconds", "floor", both)
    shares_alone = paired("cpu_seconds", "floor", "copies, workers 1")
    speedups = paired("wall_seconds", "copies, workers 1", both)
    most = [workers * ratio for ratio in paired("wall_seconds", "copies, workers 1", apart)]
    for text, ratios in (
        (f"floor / ours in CPU s, {workers} workers", shares),
        ("floor / ours in CPU s, 1 worker", shares_alone),
        (f"{workers} workers against 1, times as fast", speedups),
        (f"{workers} jobs of 1 worker at once against 1 such job, times as fast", most),
        ("the first in the second", [one / other for one, other in zip(speedups, most, strict=True)]),
    ):
        print(f"{text}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return {
        "text_bytes": many.text_bytes,
        "runs": {name: [asdict(run) for run in each] for name, each in runs.items()},
        "floor_share_cpu": shares,
        "floor_share_cpu_1_worker": shares_alone,
        "speedup_over_1_worker": speedups,
        "speedup_of_jobs_apart": most,
    }


def print_table(rows: list[Row], second_half_bytes: int) -> None:
    """Print one row per pipeline, and notes below. CPU ratios are relative to the first row."""
    head = ("pipeline", "wall s", "CPU s", "peak MB", "tokens", "CPU ratio", "CPU ms/MB", "ids differ in")
    print("\n{:<38} {:>8} {:>8} {:>8} {:>12} {:>9} {:>9} {:>13}".format(*head))
    reference = rows[0].median("cpu_seconds")
    for row in rows:
        wall, cpu, peak = (row.median(field) for field in ("wall_seconds", "cpu_seconds", "peak_pss_bytes"))
        slope = marginal_cpu_seconds(row)
        marginal = "" if slope is None else f"{slope * 1e3 / (second_half_bytes / 1e6):.1f}"
        differ = "" if row.differing_documents is None else f"{row.differing_documents:,} docs"
        print(
            f"{row.pipeline:<38} {wall:8.2f} {cpu:8.2f} {peak / 1e6:8,.0f} {row.tokens:12,} "
            f"{cpu / reference:9.2f} {marginal:>9} {differ:>13}"
        )
    print("  CPU ms/MB: marginal, of the second half of the files alone; start-up drops out")
    for row in rows:
        if row.note:
            print(f"  {row.pipeline}: {row.note}")


def machine() -> dict[str, Any]:
    """The machine and software that the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def our_versions() -> dict[str, str]:
    """Versions of our package and of the installed dependencies of its preprocessing."""
    installed = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    return {name: installed[name] for name in _OUR_PACKAGES if name in installed}


def compare(options: argparse.Namespace, work: Path, run: Path) -> dict[str, Any]:
    """Run all measurements, print and return them. Reusable files go to `work`, everything else to `run`."""
    corpus, tokenizer = options.corpus or work / "corpus", (options.tokenizer or work / "tokenizer").resolve()
    if not any(corpus.glob("documents-*.jsonl.gz")):
        subprocess.run(our_command("corpus", "collect", "--installed-python", "-o", corpus), check=True)
    if not (tokenizer / "tokenizer.json").exists():
        subprocess.run(our_command("tokenizer", "train", corpus, "-o", tokenizer), check=True)
    names = [name for name in options.peers.split(",") if name != "none"]
    megatron = megatron_checkout(options.megatron, work) if any("megatron" in name for name in names) else None
    known = peers(megatron)

    chosen = choose_files(corpus, options.text_mb)
    documents = link_corpus(chosen, run / "corpus")
    half = link_corpus(chosen[: len(chosen) // 2], run / "corpus-half")
    print(
        f"{documents.documents:,} documents, {documents.text_bytes / 1e6:.1f} MB of text in {len(chosen)} files, "
        f"{options.workers} workers",
        flush=True,
    )
    ours = Ours(tokenizer, run)
    ours.build(half, options.workers, cache=run / "other-cache")  # our package and the input into the page cache
    first, shards = ours.build(documents, options.workers)
    parts = {"half": half, "all": documents}
    builds: dict[tuple[str, int], list[Measurement]] = {}
    for _ in range(options.runs):  # round by round, so that a slow period of the machine affects all of them
        for workers in dict.fromkeys((options.workers, 1)):
            for part, input_documents in parts.items():
                builds.setdefault((part, workers), []).append(ours.measure(input_documents, workers))
    half_seconds = {n: statistics.median(run.cpu_seconds for run in builds["half", n]) for _, n in builds}
    floor = measure_floor(documents, half, tokenizer, options.workers, run / "floor")
    ids = read_ours(shards)
    rows = [
        Row("ours", builds["all", options.workers], len(ids), half_cpu_seconds=half_seconds[options.workers]),
        Row("ours, first run with this tokenizer", [first], len(ids)),
        Row("ours, 1 worker on 1 core", builds["all", 1], len(ids), half_cpu_seconds=half_seconds[1]),
        floor,
    ]
    if options.exact:
        slow, by_referee = ours.build(documents, options.workers, encoder="tokenizers")
        rows.append(Row("ours, --encoder tokenizers", [slow], len(ids), note=compare_shards(shards, by_referee)))
    versions: dict[str, Any] = {"ours": our_versions()}
    failures: dict[str, str] = {}  # of peers; the others are still measured
    ours_digests = document_digests(ids)
    tasks = {
        part: (input_documents, unpack(input_documents, run / f"{part}.jsonl"))
        for part, input_documents in parts.items()
    }
    for name in names:
        if name not in known:
            print(f"no peer {name!r}; available: {', '.join(known)}", file=sys.stderr)
            continue
        print(f"running {known[name].title}", file=sys.stderr, flush=True)
        task, half_task = (
            Task(*tasks[part], tokenizer, options.workers, run / f"peer-{name}-{part}") for part in ("all", "half")
        )
        try:
            row, versions[name] = run_peer(known[name], task, half_task if options.slopes else None, ours_digests, work)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            failures[name] = str(error)
            print(error, file=sys.stderr)
            continue
        rows.append(row)
    if megatron is not None:
        versions["Megatron-LM"] = megatron_version(megatron)

    print_table(rows, documents.text_bytes - half.text_bytes)
    share = share_of_floor(floor, rows[0])
    marginal = "lost in noise" if share["marginal"] is None else f"{share['marginal']:.0%}"
    print(f"floor / ours in CPU s: whole command {share['whole_command']:.0%}, marginal {marginal}")
    speedup = rows[2].median("wall_seconds") / rows[0].median("wall_seconds")
    print(f"{options.workers} workers against 1: {speedup:.2f} times as fast")
    large = check_large(ours, chosen, documents, tokenizer, options.workers) if options.large else None
    return {
        "documents": documents.documents,
        "text_bytes": documents.text_bytes,
        "half_text_bytes": half.text_bytes,
        "workers": options.workers,
        "rows": [asdict(row) for row in rows],
        "floor_share": share,
        "speedup_over_1_worker": speedup,
        "large": large,
        "failures": failures,
        "versions": versions,
        "machine": machine(),
    }


def main() -> None:
    """Parse the command line, run the benchmark, clean up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("corpus", type=Path, nargs="?", help="directory with documents-*.jsonl.gz; created if missing")
    parser.add_argument("tokenizer", type=Path, nargs="?", help="directory with tokenizer.json; trained if missing")
    parser.add_argument("--text-mb", type=float, default=250, help="use the first files up to about this much text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3, help="runs of ours; the median is shown")
    parser.add_argument(
        "--peers",
        default="megatron,megatron-fast,datasets,nanogpt",
        help="any of megatron, megatron-fast, datasets, nanogpt, datatrove; or none",
    )
    parser.add_argument("--slopes", action="store_true", help="run peers on half of the files too, for marginal costs")
    parser.add_argument("--megatron", type=Path, metavar="DIR", help="a checkout of Megatron-LM; cloned by default")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep environments, corpus and tokenizer here for reuse"
    )
    parser.add_argument("--keep", action="store_true", help="keep logs and outputs as well")
    parser.add_argument(
        "--exact", action="store_true", help="also run ours with the reference encoder alone: every id must be equal"
    )
    parser.add_argument("--large", action="store_true", help=f"also run ours on {LARGE_COPIES} copies of the input")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="preprocess-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix="run-", dir=work))
    try:
        result = compare(options, work, run)
    finally:
        if options.keep:
            print(f"kept in {run}", file=sys.stderr)
        else:
            shutil.rmtree(run if options.work else work)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
