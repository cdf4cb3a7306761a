"""Memory and disk of `corpus clean` as the corpus grows, on synthetic documents.

components DOCUMENTS: the steps after the first on signatures made up for that many documents: a third are copies of
another with a few tokens changed, one component has 11,000 documents. Each step is a process of its own.

clean DOCUMENTS: the whole command with the default rules on that many documents of 1.2 kB of made-up Python, of which
3 in 10 are near-duplicates and 1 in 20 are copies but for white space. Disk is the largest size of the output directory
with the work in progress, and of the signatures and sets in it.

Memory is the peak of the summed PSS of all processes, and of the largest RSS of one for the steps. Prints JSON.

Usage: python benchmarks/clean_scale.py components 5_000_000 [--until STEP] [--work DIRECTORY]
       python benchmarks/clean_scale.py clean 100_000 1_000_000 [--workers 2] [--work DIRECTORY]
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from measure import measure

from codeparrot_ds.corpus import decisions
from codeparrot_ds.corpus.measured import AllMeasured, Found, write_measured
from codeparrot_ds.corpus.near_duplicates import Signatures

BANDS, TOKENS, PART = 21, 30, 100_000
LARGEST = 11_000  # documents of one component
STEPS = ("exact duplicates", "candidates", "components", "extremes")
CLEAN = """
import sys
from pathlib import Path
from codeparrot_ds.corpus.clean import CleanOptions, clean
clean([sys.argv[1]], Path(sys.argv[2]), CleanOptions(workers=int(sys.argv[3])))
"""


def make_signatures(work: Path, documents: int) -> None:
    """Write what the first step would have, for documents that do not exist; the names are those of the first task."""
    rng = np.random.default_rng(0)
    count = min(PART, documents)
    for part in range(documents // count):
        sets = rng.integers(1, 1 << 63, (count, TOKENS)).astype(np.uint64)
        keys = rng.integers(1, 1 << 63, (BANDS, count)).astype(np.uint64)
        copies = rng.choice(np.arange(1, count), count // 3, replace=False)
        originals = (rng.random(len(copies)) * copies).astype(np.int64)
        sets[copies, 1:] = sets[originals, 1:]
        for band in range(BANDS):
            agreed = rng.random(len(copies)) < 0.4
            keys[band, copies[agreed]] = keys[band, originals[agreed]]
        if part == 0:
            sets[-LARGEST:, 1:], keys[:3, -LARGEST:] = sets[0, 1:], keys[:3, :1]
        sets.sort(axis=1)
        directory = work / f"measured-{part:05d}"
        if part == 0:
            found = [Found(bytes(16), bytes(16), 1200, f"{number}.py", "r", "", "") for number in range(count)]
            ends = np.arange(1, count + 1, dtype=np.int64) * TOKENS
            write_measured(directory, found, Signatures(keys, sets.reshape(-1), ends), {"documents": count})
        else:
            shutil.copytree(work / "measured-00000", directory, ignore=shutil.ignore_patterns("*.u64"))
            keys.tofile(directory / "keys.u64")
            sets.tofile(directory / "sets.u64")
        for name in ("digest", "bare_digest"):
            np.save(directory / f"{name}.npy", rng.integers(0, 1 << 63, (count, 2)).astype(np.uint64))


def run_step(work: Path, step: str) -> None:
    """Run one step of `corpus clean` as the command does."""
    directories, compared = sorted(work.glob("measured-*")), work / "compared.npy"
    edges = [work / f"edges-{band:03d}.npy" for band in range(BANDS)]
    if step == "exact duplicates":
        measured = AllMeasured(directories)
        decisions.save(compared, decisions.compared_documents(measured, decisions.keep_one_of_equals(measured)))
    elif step == "candidates":
        for band, path in enumerate(edges):
            decisions.write_edges(decisions.BandTask(band, directories, compared, path))
    elif step == "components":
        members, starts = decisions.find_components(len(np.load(compared, mmap_mode="r")), edges)
        decisions.save(work / "members.npy", members)
        decisions.save(work / "starts.npy", starts)
        sizes = np.diff(starts)
        print(json.dumps({"components": len(sizes), "documents": int(sizes.sum()), "largest": int(sizes.max())}))
    else:
        for number, (first, last) in enumerate(decisions.group_components(np.load(work / "starts.npy"))):
            inputs = (directories, compared, work / "members.npy", work / "starts.npy")
            output = work / f"removed-{number:05d}.npy"
            decisions.remove_similar(decisions.GroupTask(number, first, last, 0.85, *inputs, output))
        print(json.dumps({"removed": sum(len(np.load(path)) for path in work.glob("removed-*.npy"))}))


def components(work: Path, documents: int, steps: Sequence[str]) -> None:
    """Measure steps after the first."""
    make_signatures(work, documents)
    for step in steps:
        log = work / "log"
        spent = measure([sys.executable, __file__, "step", step, "--work", work], log, interval_seconds=0.01)
        row = {
            "step": step,
            "documents": documents,
            "peak_rss_mb": round(spent.peak_rss_bytes / 1e6),
            "cpu_seconds": round(spent.cpu_seconds, 1),
        }
        print(json.dumps(row | {"output": log.read_text().strip()}), flush=True)


def texts(count: int, rng: np.random.Generator) -> Iterator[str]:
    """Made-up Python of about 1.2 kB."""
    lines = 26
    template = "def function_%d(value):\n" + "    name_%d = name_%d + value_%d\n" * lines
    numbers = rng.integers(0, 1_000_000, (count, 1 + 3 * lines))
    kinds = rng.random(count)
    for i in range(count):
        if i and kinds[i] < 0.35:
            numbers[i] = numbers[rng.integers(i)]
        if kinds[i] < 0.3:
            numbers[i, rng.integers(1 + 3 * lines, size=3)] += 1_000_000
        text = template % tuple(numbers[i].tolist())
        yield text.replace("\n", "\n\n") if 0.3 <= kinds[i] < 0.35 else text


class DiskSampler(threading.Thread):
    """Largest size of a directory, and of the signatures and sets in it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self._directory, self._done = directory, threading.Event()
        self.peak = self.signatures = 0

    def run(self) -> None:
        """Sample until `finish` is called."""
        while not self._done.wait(0.5):
            total = signatures = 0
            for place, _, names in os.walk(self._directory):
                for name in names:
                    try:
                        size = os.stat(os.path.join(place, name)).st_size  # noqa: PTH116, PTH118 (called often)
                    except OSError:
                        continue
                    total += size
                    signatures += size if name in ("keys.u64", "sets.u64") else 0
            self.peak, self.signatures = max(self.peak, total), max(self.signatures, signatures)

    def finish(self) -> None:
        """Stop sampling and wait for the thread."""
        self._done.set()
        self.join()


def clean(work: Path, documents: int, workers: int) -> None:
    """Measure the whole command."""
    source, output = work / f"source-{documents}", work / f"clean-{documents}"
    source.mkdir()
    rng, text_bytes = np.random.default_rng(0), 0
    for part, start in enumerate(range(0, documents, PART)):
        with open(source / f"{part:03d}.jsonl", "w") as file:
            for number, text in enumerate(texts(min(PART, documents - start), rng), start):
                file.write(json.dumps({"content": text, "path": f"{number}.py", "repo_name": "r"}) + "\n")
                text_bytes += len(text)
    disk = DiskSampler(output)
    disk.start()
    command = [sys.executable, "-c", CLEAN, source, output, workers]
    spent = measure(list(map(str, command)), work / "log", interval_seconds=0.1)
    disk.finish()
    manifest = json.loads((output / "manifest.json").read_text())
    print(
        json.dumps(
            {
                "documents": documents,
                "text_mb": round(text_bytes / 1e6, 1),
                "workers": workers,
                "peak_pss_mb": round(spent.peak_pss_bytes / 1e6),
                "cpu_seconds": round(spent.cpu_seconds, 1),
                "wall_seconds": round(spent.wall_seconds, 1),
                "disk_peak_mb": round(disk.peak / 1e6, 1),
                "signatures_and_sets_mb": round(disk.signatures / 1e6, 1),
                "corpus_mb": round(sum(file.stat().st_size for file in output.iterdir()) / 1e6, 1),
                "removed": manifest["removed"],
            }
        ),
        flush=True,
    )


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("components", "clean", "step"))
    parser.add_argument("counts", nargs="+", metavar="DOCUMENTS")
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1], help="last step of `components`")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="directory for temporary files")
    options = parser.parse_args()
    if options.what == "step":
        run_step(options.work, options.counts[0])
        return
    for count in map(int, options.counts):
        with tempfile.TemporaryDirectory(dir=options.work) as directory:
            if options.what == "components":
                components(Path(directory), count, STEPS[: STEPS.index(options.until) + 1])
            else:
                clean(Path(directory), count, options.workers)


if __name__ == "__main__":
    main()
