"""Speed, memory and correctness on one GPU, in minutes and without a network: ours compared with its peers.

Usage: python benchmarks/gpu.py --part first|second|third [--seconds N] [--output FILE.jsonl] [--nanogpt DIR] [--tiny]
       python benchmarks/gpu.py --from FILE.jsonl ... [--fill PAGE.md]

- first (150 s): versions and the GPU's ceilings; whether it computes the same as the CPU, and whether the commands of a
  run work there; a step of GPT-2 xl (1,529.6 M parameters), with a profile.
- second (330 s): nanoGPT (from DIR, a clone; skipped without it), ours next to it, HF Trainer + DeepSpeed; xl's step in
  other configurations, each change disabled alone, predicted memory compared with measured.
- third (240 s): ZeRO-3, DeepSpeed's own optimizer step, memory of more configurations up to the first one that should
  not fit, and checkpoints.

Each item is a separate process, started without a launcher and killed when its share of the time is used up; unused
time goes to the processes after it. Each cell is appended to FILE.jsonl as soon as it is measured; the output of the
processes is in FILE.log. At the end the tables for all of FILE.jsonl are printed. The exit code is 1 if a process or a
correctness cell failed. `--tiny` uses tiny models, and a CPU if there is no GPU, to check that the benchmark works.
"""

import argparse
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from gpu_tables import fill, tables

from codeparrot_ds.planning.tune import run_group
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.system.gpus import local_gpus, peak_flops_of
from codeparrot_ds.system.network import free_port

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
XL = ROOT / "launch" / "recipes" / "codeparrot-xl.yaml"
TINY = [f"model.{key}" for key in ("n_layer=2", "n_embd=64", "n_head=2", "vocab_size=512", "seq_len=64")]
WARM_UP, STEPS = 3, 4  # of the peers
LAST_SECONDS = 2.0  # for the tables
MARGIN_SECONDS = 3.0  # between a process's deadline and SIGKILL


@dataclass(frozen=True)
class Child:
    """One process of a part.

    Attributes:
        program: file name in benchmarks/.
        seconds: its share of the part's time.
        settings: job keys specific to this program.
    """

    name: str
    program: str
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)


PARTS = {
    "first": (
        Child("ceilings", "gpu_ceilings.py", 25),
        Child("correctness", "gpu_correctness.py", 70),
        Child("first", "gpu_step.py", 55, {"cells": "first"}),
    ),
    "second": (
        Child("nanogpt", "peers/gpu_nanogpt.py", 160),
        Child("beside", "gpu_step.py", 40, {"cells": "beside"}),
        Child("trainer", "peers/step_trainer.py", 35),
        Child("second", "gpu_step.py", 95, {"cells": "second"}),
    ),
    "third": (
        Child("zero3", "gpu_step.py", 65, {"cells": "zero3"}),
        Child("deepspeed", "gpu_step.py", 35, {"cells": "deepspeed"}),
        Child("memory", "gpu_step.py", 45, {"cells": "memory"}),
        Child("checkpoint", "gpu_checkpoint.py", 95),
    ),
}
PEERS = ("nanogpt", "trainer")


class Benchmark:
    """A part being measured."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self._options, self._directory = options, directory
        self._on_cpu = not local_gpus()
        self._deadline = time.monotonic() + options.seconds - LAST_SECONDS
        self.failed: list[str] = []

    @property
    def left(self) -> float:
        """Remaining seconds."""
        return self._deadline - time.monotonic()

    def measure(self, children: list[Child]) -> None:
        """Run the processes one after another, each with its share of the remaining time."""
        for number, child in enumerate(children):
            share = self.left * child.seconds / sum(each.seconds for each in children[number:])
            if child.name not in PEERS:
                self.run(child, child.settings, share)
            elif child.name == "nanogpt" and self._options.nanogpt is None:
                print("nanogpt: skipped, because --nanogpt names no clone", file=sys.stderr, flush=True)
            else:
                self.peer(child, share)

    def peer(self, child: Child, seconds: float) -> None:
        """Run a peer at our micro-batch, and again at half of it if the peer runs out of memory."""
        end = time.monotonic() + seconds
        micro_batch, accumulation = (2, 2) if self._options.tiny else (self.micro_batch(), 4)
        for size in (micro_batch, micro_batch // 2):
            row = self.peer_at(child, size, accumulation, end - time.monotonic())
            if row is not None:
                self.add(row)
            if row is None or not row["out_of_memory"]:
                return

    def micro_batch(self) -> int:
        """Micro-batch 16, or 8 if ours has run out of memory at 16."""
        rows = read_rows([self._options.output])
        ran_out = [row for row in rows if row.get("part") == "step" and row.get("out_of_memory") and is_plain(row)]
        return 8 if any(row.get("micro_batch") == 16 for row in ran_out) else 16

    def peer_at(self, child: Child, micro_batch: int, accumulation: int, seconds: float) -> dict[str, Any] | None:
        """Run a peer and return its row; None if it reported no step."""
        model = load_recipe(XL, TINY if self._options.tiny else []).model
        output = self._directory / f"{child.name}-{micro_batch}.json"
        settings = {
            "model": model.model_dump(mode="json", include={"vocab_size", "seq_len", "n_layer", "n_embd", "n_head"}),
            "steps": WARM_UP + STEPS,
            "micro_batch": micro_batch,
            "accumulation": accumulation,
        }
        if child.name == "nanogpt":
            settings |= {"nanogpt": str(self._options.nanogpt.resolve()), "compile": not self._on_cpu}
        self.run(child, settings, seconds, output)
        found = json.loads(output.read_text()) if output.exists() else {}
        took = found.get("step_seconds") or [b - a for a, b in itertools.pairwise(found.get("ends", []))]
        ran_out = bool(found.get("out_of_memory"))
        if not took and not ran_out:
            return None
        device = "cpu" if self._on_cpu else local_gpus()[0][0]
        return {
            "part": "peer",
            "who": child.name,
            "stage": None if child.name == "nanogpt" else 1,
            "compile": settings.get("compile", False),
            "micro_batch": micro_batch,
            "accumulation": accumulation,
            "step_seconds": [] if ran_out else took[min(WARM_UP, len(took) - 1) :],
            "tokens_per_step": micro_batch * accumulation * model.seq_len,
            "peak_bytes": found.get("peak_bytes"),
            "flops_per_token": model.flops_per_token,
            "peak_flops": peak_flops_of(device),
            "device": device,
            "out_of_memory": ran_out,
        }

    def run(self, child: Child, settings: dict[str, Any], seconds: float, output: Path | None = None) -> None:
        """Run a process for at most `seconds`. Peers get only their settings and their own output file."""
        if seconds < 2 * MARGIN_SECONDS:
            print(f"{child.name}: skipped, time is up", file=sys.stderr, flush=True)
            self.failed.append(f"{child.name} (skipped)")
            return
        job = {**settings, "output": str((output or self._options.output).resolve())}
        if output is None:
            limits = {"deadline_seconds": seconds - MARGIN_SECONDS, "tiny": self._options.tiny, "on_cpu": self._on_cpu}
            job |= limits
        path = self._directory / f"{child.name}.json"
        path.write_text(json.dumps(job))
        log, started = self._options.output.with_suffix(".log"), time.monotonic()
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"\n{child.name}: {json.dumps(job)}\n")
            before = file.tell()
        code = run_group([sys.executable, str(BENCHMARKS / child.program), str(path)], self.environment(), log, seconds)
        took = time.monotonic() - started
        self.add({"part": "child", "name": child.name, "seconds": round(took, 1), "exit": code})
        print(f"{child.name}: {took:.0f} of {seconds:.0f} s, exit {code}", file=sys.stderr, flush=True)
        if code != 0:
            self.failed.append(f"{child.name} ({'time is up' if code is None else f'exit {code}'})")
            lines = log.read_bytes()[before:].decode(errors="replace").splitlines()[-15:]
            print(*(f"  {line[:300]}" for line in lines), sep="\n", file=sys.stderr, flush=True)

    def environment(self) -> dict[str, str]:
        """Environment of a process that is the only rank. The compile cache is shared within the part."""
        of_one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        allocator = "expandable_segments:True"
        environment = {
            **os.environ,
            **of_one,
            "MASTER_PORT": free_port(),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTORCH_ALLOC_CONF": allocator,
            "PYTORCH_CUDA_ALLOC_CONF": allocator,  # its name before torch 2.9
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(self._directory),  # also where a killed process leaves its temporary files
            "TORCHINDUCTOR_CACHE_DIR": str(self._directory / "inductor"),
            "TRITON_CACHE_DIR": str(self._directory / "triton"),
        }
        if self._on_cpu:
            environment["DS_ACCELERATOR"] = "cpu"
            environment.setdefault("OMP_NUM_THREADS", "1")
        return environment

    def add(self, row: dict[str, Any]) -> None:
        """Append a row on a line of its own, even if a process was killed while writing one."""
        with open(self._options.output, "ab+") as file:
            if file.tell() and not self._options.output.read_bytes().endswith(b"\n"):
                file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")


def is_plain(row: dict[str, Any]) -> bool:
    """Whether this is ours at ZeRO-1 in the reference configuration: nothing changed or recomputed."""
    return row.get("stage") == 1 and not row.get("change") and row.get("recompute", "none") == "none"


def read_rows(paths: list[Path]) -> list[dict[str, Any]]:
    """Read the rows of all files; an incomplete line from a killed process is skipped with a message."""
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                print(f"{path}:{number}: not a whole line of JSON, skipped", file=sys.stderr, flush=True)
    return rows


def interrupt(*_: Any) -> NoReturn:
    """On SIGTERM, still end the running process and print the tables."""
    raise KeyboardInterrupt


def main() -> None:
    """Measure, print the tables, fill the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--seconds", type=float, help="time limit of the part; default 150, 330 and 240")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", default=Path("gpu.jsonl"), help="appended to")
    parser.add_argument("--tiny", action="store_true", help="use tiny models, to check that the benchmark works")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a clone of github.com/karpathy/nanoGPT")
    parser.add_argument("--only", metavar="NAME", help="run only this process of the part")
    parser.add_argument("--fill", type=Path, metavar="PAGE.md", help="put the tables into this page")
    parser.add_argument(
        "--from",
        dest="sources",
        type=Path,
        nargs="+",
        metavar="FILE.jsonl",
        help="measure nothing, build the tables from these rows",
    )
    options = parser.parse_args()
    if (options.part is None) == (options.sources is None):
        parser.error("give --part or --from")
    failed: list[str] = []
    if options.part is not None:
        children = [child for child in PARTS[options.part] if options.only in (None, child.name)]
        if not children:
            parser.error(f"--only {options.only}: choose from {', '.join(child.name for child in PARTS[options.part])}")
        if not options.tiny and not local_gpus():
            sys.exit("no GPU found. Use --tiny to check on a CPU that the benchmark works.")
        if options.seconds is None:
            options.seconds = sum(child.seconds for child in PARTS[options.part])
        options.output.parent.mkdir(parents=True, exist_ok=True)
        before = len(read_rows([options.output]))
        signal.signal(signal.SIGTERM, interrupt)
        with tempfile.TemporaryDirectory(prefix="codeparrot-gpu-", ignore_cleanup_errors=True) as directory:
            benchmark = Benchmark(options, Path(directory))
            failed = benchmark.failed
            try:
                benchmark.measure(children)
            except KeyboardInterrupt:
                failed.append("interrupted")
        of_this_part = read_rows([options.output])[before:]
        failed += [row["cell"] for row in of_this_part if row.get("part") == "correctness" and not row.get("ok")]
    found = tables(read_rows(options.sources or [options.output]))
    for name, lines in found.items():
        print(f"\n{name}", *lines, sep="\n")
    if options.fill is not None:
        fill(options.fill, found)
    sys.stdout.flush()
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
