"""Peak memory and time of `codeparrot-ds convert`, compared with DeepSpeed's `zero_to_fp32` and a file copy.

Usage: python benchmarks/convert.py [--directory DIR] [--n-layer 36] [--n-embd 1280]
       python benchmarks/convert.py --run RUN      ours alone, on the newest checkpoint of an existing run

Prints a table and JSON. Needs no GPU. Without --run, two CPU ranks train a model of this size for one step (bf16,
ZeRO-3 with offload to host memory) and save it. Then each converter produces fp32 files from it, and a copy reads and
writes exactly the bytes that a conversion must: the files with weights, and a result. Files are dropped from the page
cache before each measurement. Ours and the copy alternate for --rounds rounds; medians and the range of ratios are
printed. DeepSpeed writes PyTorch pickles, because its safetensors output fails on the tied embeddings.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from checkpoint import make_shards
from measure import Measurement, measure

from codeparrot_ds.system.files import drop_from_cache, flush_to_disk

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
_PIECE_BYTES = 1 << 24


def train(directory: Path, options: argparse.Namespace) -> Path:
    """Train a model for one step on two ranks and save it. Returns the run directory."""
    settings = {
        "name": "converted",
        "runs": directory / "runs",
        "data.shards": make_shards(directory),
        "model.vocab_size": 8192,
        "model.seq_len": 128,
        "model.n_layer": options.n_layer,
        "model.n_embd": options.n_embd,
        "model.n_head": options.n_embd // 64,
        "model.activation_checkpointing": "full",
        "batch.global_batch_size": 2,
        "batch.micro_batch_size": 1,
        "schedule.steps": 1,
        "schedule.warmup_steps": 0,
        "engine.deepspeed": ROOT / "ds_configs" / "zero3_offload.json",
        "engine.precision": "bf16",
        "engine.float32_matmul_precision": "highest",
        "evaluation.sequences": 2,
        "checkpoints.background": "false",
    }
    command = [BIN / "deepspeed", "--quiet", "--num_gpus", 2, "--module", "codeparrot_ds.train"]
    command += [ROOT / "launch" / "recipes" / "quickstart.yaml"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, check=True, timeout=1800)
    return directory / "runs" / "converted"


def drop_all_from_cache(directory: Path) -> None:
    """Drop every file below `directory` from the page cache."""
    for path in filter(Path.is_file, directory.rglob("*")):
        flush_to_disk(path)
        drop_from_cache(path)


def copy_seconds(read: list[Path], write_bytes: int, directory: Path) -> float:
    """Seconds to read all of `read`, and to write and fsync `write_bytes` bytes."""
    piece = bytearray(_PIECE_BYTES)
    started = time.monotonic()
    with open(directory / "copy", "wb", buffering=0) as target:
        for path in read:
            with open(path, "rb", buffering=0) as source:
                while size := source.readinto(piece):
                    if write_bytes > 0:
                        target.write(memoryview(piece)[: min(size, write_bytes)])
                        write_bytes -= size
        os.fsync(target.fileno())
    seconds = time.monotonic() - started
    (directory / "copy").unlink()
    return seconds


def row(name: str, taken: list[Measurement], copied: list[float]) -> str:
    """A table row: medians over the rounds, and the range of the ratios."""
    ratios = [each.wall_seconds / seconds for each, seconds in zip(taken, copied, strict=True)]
    cells = [
        f"{max(each.peak_pss_bytes for each in taken) / 1e9:10.2f}",
        f"{median(each.wall_seconds for each in taken):9.1f}",
        f"{median(each.cpu_seconds for each in taken):9.1f}",
        f"{median(ratios):14.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
    ]
    return f"{name:34}{''.join(cells)}"


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--directory", type=Path, help="parent of the working directory; default: a temporary directory"
    )
    parser.add_argument("--run", type=Path, help="an existing run directory to convert")
    parser.add_argument("--n-layer", type=int, default=36)
    parser.add_argument("--n-embd", type=int, default=1280)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="convert-", dir=options.directory)).resolve()
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    results: dict[str, Any] = {}
    try:
        run = options.run.resolve() if options.run else train(directory, options)
        newest = sorted((run / "checkpoints").glob("step-*"))[-1]
        manifest = json.loads((newest / "manifest.json").read_text())
        parameters = manifest["parameters"]
        print(f"\n{parameters / 1e6:,.1f} M parameters, {manifest['world_size']} ranks, offload {manifest['offload']}")
        print(f"{'':34}{'peak GB':>10}{'wall s':>9}{'CPU s':>9}{'wall / copy':>14}")
        weights = [newest / name for name in manifest["files"] if name.endswith(("optim_states.pt", ".swp"))]
        for dtype in options.dtypes.split(","):
            output = directory / dtype
            needed = 4 * parameters
            read = weights if manifest["offload"] != "nvme" else _of_weights(newest, needed)
            command = [str(BIN / "codeparrot-ds"), "convert", str(run), str(output), "--dtype", dtype, "--sequences"]
            copied: list[float] = []
            names = [f"ours, {dtype}", f"ours, {dtype}, run on 1 sequence"]
            taken: dict[str, list[Measurement]] = {name: [] for name in names}
            for _ in range(options.rounds):
                drop_all_from_cache(newest)
                copied.append(copy_seconds(read, needed if dtype == "float32" else needed // 2, directory))
                for sequences, name in enumerate(names):
                    drop_all_from_cache(newest)
                    taken[name].append(measure([*command, str(sequences)], directory / "log", env=environment))
                    shutil.rmtree(output)
            for name in names:
                print(row(name, taken[name], copied), flush=True)
                results[name] = [vars(each) for each in taken[name]]
            results[f"copy for {dtype}"] = copied
            print(f"{f'reading and writing the same, {dtype}':44}{median(copied):9.1f}", flush=True)
        if not options.run:
            drop_all_from_cache(newest)
            script = [
                sys.executable,
                "-m",
                "deepspeed.utils.zero_to_fp32",
                str(newest.parent),
                str(directory / "theirs"),
            ]
            theirs = measure([*script, "-t", newest.name], directory / "log", env=environment)
            print(row("DeepSpeed's zero_to_fp32", [theirs], [median(results["copy for float32"])]))
            results["zero_to_fp32"] = vars(theirs)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(json.dumps(results))


def _of_weights(checkpoint: Path, needed: int) -> list[Path]:
    """Offloaded files with weights, `needed` bytes in all; the other two thirds hold AdamW's moments."""
    found, total = [], 0
    for path in sorted(checkpoint.rglob("*.swp")):
        if total < needed:
            found.append(path)
            total += path.stat().st_size
    return found


if __name__ == "__main__":
    main()
