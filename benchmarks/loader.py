"""Random sequences per second, ours and peers, on one core from the page cache. Prints a table, writes JSON.

Usage: python benchmarks/loader.py [SHARDS] [--work DIR] [--output FILE.json]

Without SHARDS, ids are random. Each figure is measured in its own process, pinned to the same core; readers alternate
in each round. Also measured: the time to open many shards, and to seek in a permutation of many sequences.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from environments import TORCH, environment, plain_env

PEERS = Path(__file__).resolve().parent / "peers"
SEQ_LEN = 1024  # tokens
SEQUENCES = 64  # a batch
SHARDS_TO_OPEN, TOKENS_EACH = 200, 100_000
SEEK_SEQUENCES, SEEK_POSITION, SEEK_COUNT = 1_000_000_000, 999_999_000, 512
_PACKAGES = (TORCH, "numpy", "datasets")
_WAYS = {
    "np.memmap, stacked": "memmap",
    "nanoGPT get_batch": "nanogpt",
    "datasets, numpy": "datasets-numpy",
    "datasets, torch": "datasets-torch",
}


def call(
    python: Path | str, script: str, *arguments: object, core: int | None = None, cache: Path | None = None
) -> Any:
    """Run a driver, optionally pinned to a core, and return the JSON on its last line; None if it prints nothing.

    Args:
        python: interpreter to use.
        script: file name of the driver in benchmarks/peers.
        arguments: its command-line arguments.
        core: core to pin it to.
        cache: Hugging Face cache directory, for drivers that run in a peer's environment.
    """
    command = [str(python), str(PEERS / script), *map(str, arguments)]
    if core is not None:
        # A new interpreter sets the affinity and execs the command, so that its threads inherit it.
        pin = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.argv[2], sys.argv[2:])"
        command = [sys.executable, "-I", "-S", "-c", pin, str(core), *command]
    env = plain_env(HF_HUB_OFFLINE="1", HF_HOME=str(cache)) if cache else None
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout.splitlines()
    return json.loads(lines[-1]) if lines else None


def flat_ids(shards: Path, target: Path) -> Path:
    """Concatenate all training ids of a shard directory into one file, as nanoGPT stores them."""
    with open(target, "wb") as out:
        for file in sorted(shards.glob("train-*.bin")):
            with open(file, "rb") as ids:
                shutil.copyfileobj(ids, out, 1 << 20)
    return target


def compare(options: argparse.Namespace, work: Path, run: Path) -> dict[str, Any]:
    """Run all measurements, print and return them."""
    core = min(os.sched_getaffinity(0))
    shards = options.shards
    if shards is None:
        shards = run / "shards"
        call(sys.executable, "ours_loader.py", "write", shards, 4, int(options.tokens_m * 1e6))
    peers = environment(work / "environments" / "loader", _PACKAGES)
    ids = flat_ids(shards, run / "ids.bin")
    arrow = run / "arrow"
    call(peers.python, "random_sequences.py", "arrow", ids, SEQ_LEN, arrow, cache=run)

    rates: dict[str, list[float]] = {title: [] for title in ("ours", *_WAYS)}
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        ours = call(sys.executable, "ours_loader.py", "batches", shards, SEQ_LEN, SEQUENCES, options.seconds, core=core)
        rates["ours"].append(ours["sequences_per_second"])
        for title, way in _WAYS.items():
            source = arrow if way.startswith("datasets") else ids
            arguments = (way, source, SEQ_LEN, SEQUENCES, options.seconds)
            result = call(peers.python, "random_sequences.py", *arguments, core=core, cache=run)
            rates[title].append(result["sequences_per_second"])
    medians = {title: statistics.median(values) for title, values in rates.items()}
    tokens = ids.stat().st_size // np.dtype(np.uint16).itemsize
    print(f"{tokens:,} tokens; batches of {SEQUENCES} random sequences of {SEQ_LEN:,} tokens; {options.rounds} rounds")
    print(f"\n{'reader':<22} {'sequences/s':>12} {'lowest':>10} {'highest':>10} {'ours / it':>10}")
    for title, rate in medians.items():
        low, high = min(rates[title]), max(rates[title])
        print(f"{title:<22} {rate:12,.0f} {low:10,.0f} {high:10,.0f} {medians['ours'] / rate:10.1f}")

    many = run / "many-shards"
    call(sys.executable, "ours_loader.py", "write", many, SHARDS_TO_OPEN, SHARDS_TO_OPEN * TOKENS_EACH)
    opened = call(sys.executable, "ours_loader.py", "open", many, SEQ_LEN, core=core)
    sought = call(sys.executable, "ours_loader.py", "seek", SEEK_SEQUENCES, SEEK_POSITION, SEEK_COUNT, core=core)
    print(
        f"\nopen {SHARDS_TO_OPEN} shards: {opened['median_seconds'] * 1e3:.2f} ms, "
        f"the first time {opened['first_seconds'] * 1e3:.2f} ms"
    )
    print(
        f"seek to {SEEK_POSITION:,} of {SEEK_SEQUENCES:,} and take {SEEK_COUNT}: "
        f"{sought['median_seconds'] * 1e3:.2f} ms, {sought['peak_growth_bytes'] / 1e3:,.0f} kB more memory"
    )
    return {
        "tokens": tokens,
        "sequences_per_second": rates,
        "medians": medians,
        "open": {"shards": SHARDS_TO_OPEN, **opened},
        "seek": {"sequences": SEEK_SEQUENCES, "position": SEEK_POSITION, "count": SEEK_COUNT, **sought},
        "versions": peers.versions,
    }


def main() -> None:
    """Parse the command line, run the benchmark, clean up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shards", type=Path, nargs="?", help="a finished shard directory; default: random ids")
    parser.add_argument("--tokens-m", type=float, default=64, help="million tokens of random ids")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="reading time per figure")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the peers' environment here for reuse")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="loader-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix="run-", dir=work))
    try:
        result = compare(options, work, run)
    finally:
        shutil.rmtree(run if options.work else work)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
