"""Train `codeparrot-xl` (1,529.6 M parameters) on one CPU rank with its optimizer on disk, and resume.

Usage: python benchmarks/xl.py [--directory DIR] [--shards DIR] [--keep]
Prints a table and JSON. Needs 45 GB on the disk of DIR, 20 GB of memory, and up to an hour. Uses no GPU. By default the
shards are built from this machine's own Python source. Sequences have 256 tokens, one per step.

Runs four steps with a checkpoint after the third. Then the fourth step's checkpoint is removed, as if the run had been
killed before completing it, and the same command resumes from the third: loss, gradient norm and validation loss must
be bit-identical.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import MemorySampler

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
VOCAB_SIZE, SEQ_LEN = 32_768, 256
SAVED_STEP, LAST_STEP = 3, 4


class SizeSampler(threading.Thread):
    """Peak disk usage of the files below a directory in bytes, sampled once a second."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self._directory, self._stop_asked = directory, threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        """Sample until `finish` is called."""
        while not self._stop_asked.wait(1.0):
            self.peak_bytes = max(self.peak_bytes, bytes_below(self._directory))

    def finish(self) -> None:
        """Stop sampling and wait for the thread."""
        self._stop_asked.set()
        self.join()


def bytes_below(directory: Path) -> int:
    """Disk usage of the files below `directory`; files deleted in the meantime are skipped."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += Path(parent, name).stat().st_blocks * 512
            except OSError:
                continue
    return total


def make_shards(directory: Path) -> Path:
    """Build shards of this machine's Python source, in sequences of `SEQ_LEN` tokens."""
    corpus, tokenizer, shards = (directory / name for name in ("corpus", "tokenizer", "shards"))
    for command in (
        ["corpus", "collect", "--installed-python", "--max-file-size", "64kB", "--sample", "60MB", "-o", corpus],
        ["tokenizer", "train", corpus, "--vocab-size", VOCAB_SIZE, "--max-seq-len", SEQ_LEN, "-o", tokenizer],
        ["shards", "build", corpus, "--tokenizer", tokenizer, "--valid-fraction", "0.02", "-o", shards],
    ):
        subprocess.run([BIN / "codeparrot-ds", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return shards


@dataclass
class Launch:
    """A `deepspeed` command that has succeeded.

    Attributes:
        lines: seconds since the start, and text, of each output line.
        peak_pss_bytes, peak_rss_bytes: peak memory of all its processes together.
        swap_bytes: peak usage of the swap directory.
        rows: metrics.jsonl at the end.
    """

    wall_seconds: float
    lines: list[tuple[float, str]]
    peak_pss_bytes: int
    peak_rss_bytes: int
    swap_bytes: int
    rows: list[dict[str, Any]]

    def seconds_until(self, text: str) -> float:
        """Time of the first line that contains `text`. Raises RuntimeError if there is none."""
        for seconds, line in self.lines:
            if text in line:
                return seconds
        raise RuntimeError(f"the run never printed {text!r}")

    def train_rows(self) -> list[dict[str, Any]]:
        """Map each step to its row."""
        return [row for row in self.rows if row["kind"] == "train"]


def launch(directory: Path, shards: Path) -> Launch:
    """Train to the last step, resuming from the newest checkpoint. Raises RuntimeError if the run fails."""
    overrides = {
        "runs": directory / "runs",
        "data.shards": shards,
        "model.seq_len": SEQ_LEN,
        "batch.global_batch_size": 1,
        "batch.micro_batch_size": 1,
        "schedule.name": "constant",
        "schedule.steps": LAST_STEP,
        "schedule.warmup_steps": 0,
        "engine.deepspeed": ROOT / "ds_configs" / "zero3_nvme.json",
        "engine.nvme": directory / "nvme",
        "evaluation.sequences": 1,
        "checkpoints.every_steps": SAVED_STEP,
        "checkpoints.keep_last": 2,
        "logging.every_steps": 1,
        "logging.tensorboard": "false",
    }
    recipe = ROOT / "launch" / "recipes" / "codeparrot-xl.yaml"
    deepspeed = [str(BIN / "deepspeed"), "--quiet", "--num_gpus", "1"]
    command = [*deepspeed, "--module", "codeparrot_ds.train", str(recipe)]
    command += [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    print("$", " ".join(command), flush=True)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    memory, swap = MemorySampler(process.pid, interval_seconds=0.5), SizeSampler(directory / "nvme")
    memory.start()
    swap.start()
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append((time.monotonic() - started, line.rstrip()))
        print(f"{lines[-1][0]:7.1f} s  {lines[-1][1]}", flush=True)
    returncode = process.wait()
    memory.finish()
    swap.finish()
    if returncode:
        raise RuntimeError(f"the run ended with {returncode}, see above")
    rows = [json.loads(row) for row in (run_directory(directory) / "metrics.jsonl").read_text().splitlines()]
    wall_seconds = time.monotonic() - started
    return Launch(wall_seconds, lines, memory.peak_pss_bytes, memory.peak_rss_bytes, swap.peak_bytes, rows)


def run_directory(directory: Path) -> Path:
    """Path of the run directory."""
    return directory / "runs" / "codeparrot-xl"


def checkpoint(directory: Path, step: int) -> Path:
    """Path of the checkpoint after `step` steps."""
    return run_directory(directory) / "checkpoints" / f"step-{step:08d}"


def saving_seconds(launched: Launch, step: int) -> float:
    """Save time after `step`, parsed from a log line such as "step 3: checkpoint runs/… (31.0 s)"."""
    line = next(line for _, line in launched.lines if line.startswith(f"step {step}: checkpoint "))
    return float(line.rsplit("(", 1)[1].split()[0])


def check(first: Launch, resumed: Launch) -> list[str]:
    """List the deviations from the expected result."""
    before, after = first.train_rows(), resumed.train_rows()
    problems = []
    if not abs(before[0]["loss"] - math.log(VOCAB_SIZE)) < 0.5:
        problems.append(f"the first loss is {before[0]['loss']}, far from ln {VOCAB_SIZE}")
    if [row["step"] for row in after] != list(range(LAST_STEP)) or after[:SAVED_STEP] != before[:SAVED_STEP]:
        problems.append("the resumed run did not take exactly the steps after its checkpoint")
    wanted, found = before[SAVED_STEP], after[SAVED_STEP]
    problems += [
        f"{key} of step {SAVED_STEP} is {found[key]}, not {wanted[key]}"
        for key in ("loss", "gradient_norm", "batch_digest", "samples_seen", "learning_rate")
        if found[key] != wanted[key]
    ]
    if valid_loss(first) != valid_loss(resumed):
        problems.append(f"the last validation loss is {valid_loss(resumed)}, not {valid_loss(first)}")
    return problems


def valid_loss(launched: Launch) -> float:
    """The last validation loss in nats per token."""
    return float([row["loss_valid"] for row in launched.rows if row["kind"] == "valid"][-1])


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--directory", type=Path, help="parent of the working directory; default: a temporary directory"
    )
    parser.add_argument("--shards", type=Path, help="shards with a vocabulary of 32,768 tokens")
    parser.add_argument("--keep", action="store_true", help="keep the directory")
    options = parser.parse_args()
    directory = (options.directory or Path(tempfile.mkdtemp(prefix="codeparrot-xl-"))).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        shards = options.shards or make_shards(directory)
        first = launch(directory, shards.resolve())
        manifest = json.loads((checkpoint(directory, SAVED_STEP) / "manifest.json").read_text())
        shutil.rmtree(checkpoint(directory, LAST_STEP))
        resumed = launch(directory, shards.resolve())
    finally:
        if not options.keep:
            shutil.rmtree(directory, ignore_errors=True)
    rows = first.train_rows()
    result = {
        "parameters": manifest["parameters"],
        "losses": [row["loss"] for row in rows],
        "step_seconds": [round(row["step_seconds"], 1) for row in rows],
        "rank_peak_rss_bytes": max(row["peak_memory_bytes"] for row in rows),
        "all_peak_rss_bytes": first.peak_rss_bytes,
        "all_peak_pss_bytes": first.peak_pss_bytes,
        "resumed_rank_peak_rss_bytes": resumed.train_rows()[-1]["peak_memory_bytes"],
        "resumed_all_peak_pss_bytes": resumed.peak_pss_bytes,
        "swap_bytes": first.swap_bytes,
        "checkpoint_bytes": sum(file["bytes"] for file in manifest["files"].values()),
        "saving_seconds": saving_seconds(first, SAVED_STEP),
        "saving_last_seconds": saving_seconds(first, LAST_STEP),
        "seconds_until_training": round(first.seconds_until("M parameters, ZeRO-3"), 1),
        "seconds_until_resumed": round(resumed.seconds_until("resuming from"), 1),
        "resumed_step_seconds": round(resumed.train_rows()[-1]["step_seconds"], 1),
        "loss_of_step_3": [launched.train_rows()[SAVED_STEP]["loss"] for launched in (first, resumed)],
        "loss_valid": [valid_loss(first), valid_loss(resumed)],
        "wall_seconds": [round(first.wall_seconds, 1), round(resumed.wall_seconds, 1)],
        "problems": check(first, resumed),
    }
    print()
    for key, value in result.items():
        shown = f"{value / 1e9:.2f} GB" if key.endswith("_bytes") else value
        print(f"{key.removesuffix('_bytes').replace('_', ' '):32} {shown}")
    print(json.dumps(result))
    sys.exit(1 if result["problems"] else 0)


if __name__ == "__main__":
    main()
