"""Time for which a checkpoint blocks training, compared with writing the same bytes to disk. Prints a table and JSON.

Usage: python benchmarks/checkpoint.py [--directory DIR] [--stage 1] [--n-layer 6] [--n-embd 768]
Needs no GPU. Two CPU ranks train a model of this width on this machine's Python source, with a checkpoint every fourth
step: once written in the background, once with training waiting for it. Then one process per rank writes the same
number of bytes to the same disk, in 16 MB pieces and with an fsync, to measure the disk alone.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
RANKS, STEPS, EVERY = 2, 16, 4
_SAVED = re.compile(r"step (\d+): checkpoint .* \(([\d.]+) s, training waited ([\d.]+) s\)")
_PIECE = os.urandom(1 << 24)


def make_shards(directory: Path) -> Path:
    """Build shards from a sample of this machine's Python source."""
    corpus, tokenizer, shards = (directory / name for name in ("corpus", "tokenizer", "shards"))
    for command in (
        ["corpus", "collect", "--installed-python", "--max-file-size", "64kB", "--sample", "10MB", "-o", corpus],
        ["tokenizer", "train", corpus, "--vocab-size", 8192, "--max-seq-len", 128, "-o", tokenizer],
        ["shards", "build", corpus, "--tokenizer", tokenizer, "--valid-fraction", "0.02", "-o", shards],
    ):
        subprocess.run([BIN / "codeparrot-ds", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return shards


def train(directory: Path, shards: Path, options: argparse.Namespace, background: bool) -> dict[str, Any]:
    """Train, and parse the log of rank 0."""
    settings = {
        "name": f"background-{background}".lower(),
        "runs": directory / "runs",
        "data.shards": shards,
        "model.vocab_size": 8192,
        "model.seq_len": 128,
        "model.n_layer": options.n_layer,
        "model.n_embd": options.n_embd,
        "model.n_head": options.n_embd // 64,
        "model.activation_checkpointing": "full",
        "batch.global_batch_size": 4,
        "schedule.steps": STEPS,
        "schedule.warmup_steps": 1,
        "engine.deepspeed": ROOT / "ds_configs" / f"zero{options.stage}.json",
        "engine.precision": "fp32",
        "engine.float32_matmul_precision": "highest",
        "evaluation.sequences": 2,
        "evaluation.every_steps": 1000,
        "checkpoints.every_steps": EVERY,
        "checkpoints.keep_last": 1,
        "checkpoints.background": background,
        "logging.every_steps": 1,
    }
    command = [BIN / "deepspeed", "--quiet", "--num_gpus", RANKS, "--module", "codeparrot_ds.train"]
    command += [ROOT / "launch" / "recipes" / "quickstart.yaml"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, check=True, timeout=1800)
    run = directory / "runs" / settings["name"]
    saved = [match for match in map(_SAVED.search, (run / "logs" / "rank_00000.log").read_text().splitlines()) if match]
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Training always waits for the last checkpoint of a run.
    middle = [(float(match[2]), float(match[3])) for match in saved if int(match[1]) < STEPS]
    return {
        "checkpoint_bytes": sum(file["bytes"] for file in manifest["files"].values()),
        "parameters": manifest["parameters"],
        "seconds": statistics.median(whole for whole, _ in middle),
        "waited_seconds": statistics.median(waited for _, waited in middle),
        "last_seconds": float(saved[-1][2]),
        "step_seconds": statistics.median(row["step_seconds"] for row in rows if row["kind"] == "train"),
    }


def write_to_disk(directory: Path, size: int) -> float:
    """Seconds to write `size` bytes as one file per rank, in parallel, and fsync them."""

    def write(path: Path) -> None:
        with open(path, "wb", buffering=0) as file:
            for _ in range(size // RANKS // len(_PIECE)):
                file.write(_PIECE)
            os.fsync(file.fileno())

    started = time.monotonic()
    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(write, [directory / f"raw-{number}" for number in range(RANKS)]))
    return time.monotonic() - started


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--directory", type=Path, help="parent of the working directory; default: a temporary directory"
    )
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--n-layer", type=int, default=6)
    parser.add_argument("--n-embd", type=int, default=768)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.directory)).resolve()
    try:
        shards = make_shards(directory)
        beside = train(directory, shards, options, background=True)
        waiting = train(directory, shards, options, background=False)
        disk = [write_to_disk(directory, beside["checkpoint_bytes"]) for _ in range(3)]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    raw = statistics.median(disk)
    size = beside["checkpoint_bytes"]
    print(f"\nZeRO-{options.stage}, {beside['parameters'] / 1e6:.1f} M parameters, {size / 1e9:.2f} GB per checkpoint")
    print(f"{'':34}{'total s':>9}{'training waited s':>19}{'of disk time':>13}{'step s':>9}")
    for name, row in (("written in the background", beside), ("training waits", waiting)):
        share = f"{row['waited_seconds'] / raw:.2f}"
        print(f"{name:34}{row['seconds']:9.2f}{row['waited_seconds']:19.2f}{share:>13}{row['step_seconds']:9.2f}")
    print(f"{'the same bytes, flushed':34}{raw:9.2f}   {size / raw / 1e6:,.0f} MB/s")
    print(json.dumps({"background": beside, "waiting": waiting, "disk_seconds": disk}))


if __name__ == "__main__":
    main()
