"""Check that a GPU computes the same as the CPU, and that a run can be saved, resumed, converted and used there.

Usage: python benchmarks/gpu_correctness.py JOB.json, started by `benchmarks/gpu.py`
       python benchmarks/gpu_correctness.py --make-curve, on a CPU: writes benchmarks/gpu_curve.json

A tiny GPT-2 learns learnable sequences, so that a wrong gradient or update shows within 20 losses. One process builds
all engines, while others execute the commands of a real run on this machine's own Python files. Each cell is a row with
the value found and the value wanted; a failing cell does not stop the others.
"""

import gc
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_job import Job

from codeparrot_ds import trial
from codeparrot_ds.run.recipe import Recipe, load_recipe
from codeparrot_ds.train import end

ROOT = Path(__file__).resolve().parent.parent
CURVE = Path(__file__).with_name("gpu_curve.json")
RECIPE = ROOT / "launch" / "recipes" / "quickstart.yaml"
STEPS, TINY_STEPS = 20, 5
# Largest relative difference of a loss from the CPU's in fp32. On CPU cores other ZeRO stages differ by 1e-7 in fp32
# and by 2.5e-3 in bf16, and initial weights with relative noise of 1e-5 by 3e-6. Attention without its per-layer scale,
# the smallest error tried, gives 6e-4, and omitted weight decay 1.5e-3.
BOUNDS = {"fp32": 1e-4, "bf16": 1e-2}
FIRST_LOSS = 1e-4
# DeepSpeed's own waits at ZeRO-3: one per micro-batch (four), and two to check that the norm is finite.
WAITS = {1: 0, 3: 8}
SECONDS_TO_COMPILE = 15
SETTINGS: dict[str, Any] = {
    "model.n_layer": 4,
    "model.n_embd": 128,
    "model.n_head": 2,
    "model.vocab_size": 512,
    "model.seq_len": 128,
    "model.scale_attn_by_inverse_layer_idx": "true",
    "model.init_std": 0.02,
    "model.activation_checkpointing": "none",
    "batch.global_batch_size": 8,
    "batch.micro_batch_size": 2,
    "optimizer.learning_rate": 1.5e-3,
    "optimizer.betas": "[0.9, 0.95]",
    "schedule.name": "cosine",
    "schedule.steps": 100,
    "schedule.warmup_steps": 5,
    "schedule.min_ratio": 0.05,
    "engine.float32_matmul_precision": "highest",
    "engine.loss_chunk_tokens": 4096,
    "evaluation.samples": 0,
}


class Walks:
    """Random walks through some of the ids, each determined by its number; a bigram model reaches a loss of ln 3."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self._ids, self._seq_len = vocab_size // 8, seq_len

    def batch(self, numbers: np.ndarray) -> np.ndarray:
        """Return sequences `numbers`, [n], as [n, seq_len + 1] int64."""
        rows = [np.random.default_rng(int(i)).integers(1, 4, size=self._seq_len + 1) for i in numbers]
        return np.cumsum(np.stack(rows), 1) % self._ids


def recipe_of(stage: int, precision: str, compiled: bool = False) -> Recipe:
    """Recipe of the tiny model."""
    settings = SETTINGS | {
        "engine.deepspeed": ROOT / "ds_configs" / f"zero{stage}.json",
        "engine.precision": precision,
        "engine.compile": str(compiled).lower(),
    }
    return load_recipe(RECIPE, [f"{key}={value}" for key, value in settings.items()])


def curve_of(recipe: Recipe, steps: int, then: Callable[[Any], None] = lambda trainer: None) -> list[float]:
    """Losses of the first steps; `then` is called with the trainer. May be called repeatedly in one process."""
    with trial.trainer_on_random_ids(recipe) as (trainer, memory):
        losses: list[float] = trial.take_steps(trainer, memory, steps)["losses"]
        then(trainer)
    del trainer
    gc.collect()
    return losses


def make_curve() -> None:
    """Write the CPU's fp32 losses to the curve file."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    trial.RandomSequences = Walks  # type: ignore[misc, assignment]
    losses = curve_of(recipe_of(1, "fp32"), STEPS)
    CURVE.write_text(json.dumps({"losses": losses}, indent=1) + "\n")
    print(*(f"{loss:.6f}" for loss in losses))


class Correctness:
    """Runs all cells."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._steps = TINY_STEPS if job.tiny else STEPS
        self._wanted: list[float] = json.loads(CURVE.read_text())["losses"][: self._steps]

    def all(self) -> None:
        """Check the engines while a thread runs the commands, which mostly import and wait."""
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        trial.RandomSequences = Walks  # type: ignore[misc, assignment]
        with tempfile.TemporaryDirectory(prefix="codeparrot-correctness-") as directory:
            commands = Commands(self._job, Path(directory))
            thread = threading.Thread(target=commands.all)
            thread.start()
            for precision, stage in (("bf16", 1), ("fp32", 1), ("bf16", 3), ("fp32", 3), ("bf16", 2), ("fp32", 2)):
                self.curve(stage, precision)
            if self._job.seconds_left > SECONDS_TO_COMPILE:
                self.curve(1, "bf16", compiled=True)
            else:
                print("compiled: skipped, time is up", file=sys.stderr, flush=True)
            thread.join()

    def curve(self, stage: int, precision: str, compiled: bool = False) -> None:
        """Compare the losses of one engine with the CPU's, and count its host waits."""
        name = f"ZeRO-{stage}, {precision}" + (", compiled" if compiled else "")
        cell, asked = f"{self._steps} losses, {name}", precision == "bf16" and stage in (1, 3) and not compiled

        def then(trainer: Any) -> None:
            if asked:
                self.no_waits(trainer, name, WAITS[stage])

        try:
            losses = curve_of(recipe_of(stage, precision, compiled), self._steps, then)
        except Exception as error:
            self.failed(cell, error)
            return
        if precision == "fp32" and stage == 1:
            expected = math.log(SETTINGS["model.vocab_size"])
            self.add("loss at step 0 = ln V", abs(losses[0] - expected) < 0.1, losses[0], f"{expected:.4f} +- 0.1")
            off = abs(losses[0] / self._wanted[0] - 1)
            self.add("loss at step 0 = the CPU's", off <= FIRST_LOSS, f"{off:.1e}", f"<= {FIRST_LOSS:.0e}")
        apart = [abs(found / wanted - 1) for found, wanted in zip(losses, self._wanted, strict=True)]
        worst = int(np.argmax(apart))
        found = f"{apart[worst]:.1e} at step {worst}, loss {losses[0]:.3f} to {losses[-1]:.3f}"
        bound = BOUNDS[precision]
        self.add(cell, max(apart) <= bound, found, f"<= {bound:.0e} of the CPU's", losses=losses)

    def no_waits(self, trainer: Any, name: str, most: int) -> None:
        """Check that a step after warm-up waits for the GPU at most `most` times, and list where it does.

        If none are allowed, a second step runs with waiting turned into an error.
        """
        import torch

        cell, wanted, places = f"host waits of a step, {name}", f"at most {most}", list[str]()
        if self._job.on_cpu:
            self.add(cell, True, "not on a CPU", wanted)
            return
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                self.step(trainer)
            waits = [each for each in caught if "called a synchronizing" in str(each.message)]
            places = sorted({f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}" for each in waits})
            torch.cuda.set_sync_debug_mode("default" if most else "error")
            self.step(trainer)
            self.add(cell, len(waits) <= most, f"{len(waits)} {', '.join(places)}".rstrip(), wanted)
        except Exception as error:
            traceback.print_exc()
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            where = [f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}" for each in frames]
            self.add(cell, False, f"{'; '.join(places)}; by {' > '.join(where)}: {error}"[:600], wanted)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @staticmethod
    def step(trainer: Any) -> None:
        """Take one step as `Trainer.fit` does."""
        trainer.train_step()
        trainer.stop_requests.finish_exchange()
        trainer.step += 1

    def add(self, cell: str, ok: bool, found: Any, wanted: str, **more: Any) -> None:
        """Add a row."""
        self._job.add(part="correctness", cell=cell, ok=bool(ok), found=found, wanted=wanted, **more)

    def failed(self, cell: str, error: Exception) -> None:
        """Add a row for a cell that raised an error."""
        traceback.print_exc()
        self.add(cell, False, f"{type(error).__name__}: {error}".splitlines()[0][:300], "to run")


class Commands:
    """The commands of a run, on this machine's Python files: prepare, train, resume, convert, complete."""

    def __init__(self, job: Job, directory: Path) -> None:
        self._job, self._directory = job, directory

    def all(self) -> None:
        """Prepare the data, then go through a run of each stage in parallel."""
        corpus, tokenizer, self.shards = (self._directory / name for name in ("corpus", "tokenizer", "shards"))
        collect = ("corpus", "collect", "--installed-python", "--max-file-size", "32kB", "--sample", "1MB")
        prepared = self.cell("corpus, tokenizer, shards", lambda: [
            self.cli(*collect, "-o", corpus),
            self.cli("tokenizer", "train", corpus, "--vocab-size", 512, "--max-seq-len", 128, "-o", tokenizer),
            self.cli("shards", "build", corpus, "--tokenizer", tokenizer, "--valid-fraction", 0.05, "-o", self.shards),
        ])  # fmt: skip
        if prepared is None:
            return
        stages = (1,) if self._job.on_cpu else (1, 3)
        threads = [threading.Thread(target=self.live, args=(stage,)) for stage in stages]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def live(self, stage: int) -> None:
        """Train, resume, convert, complete."""
        name, precision = f"life{stage}", "fp32" if self._job.on_cpu else "bf16"
        way = f"ZeRO-{stage}, {precision}"
        run = self._directory / "runs" / name
        settings = SETTINGS | {
            "name": name,
            "runs": run.parent,
            "data.shards": self.shards,
            "engine.deepspeed": ROOT / "ds_configs" / f"zero{stage}.json",
            "engine.precision": precision,
            "schedule.steps": 8,
            "schedule.warmup_steps": 2,
            "checkpoints.every_steps": 4,
            "evaluation.every_steps": 8,
            "evaluation.sequences": 8,
            "logging.tensorboard": "false",
        }
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]

        def train() -> list[str]:
            self.python("codeparrot_ds.train", RECIPE, *options)
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            return [float(row["loss"]).hex() for row in rows if row["kind"] == "train"]

        whole = self.cell(f"train and save, {way}", train, lambda losses: f"{len(losses)} steps", "8 steps")
        if whole is None:
            return

        def resume() -> list[str]:
            shutil.rmtree(run / "checkpoints" / "step-00000008")
            return train()

        def differ(losses: list[str]) -> str:
            pairs = zip(map(float.fromhex, losses), map(float.fromhex, whole), strict=False)
            return f"{len(losses)} losses, at most {max(abs(a / b - 1) for a, b in pairs):.0e} apart"

        wanted = "8 losses, at most 0e+00 apart"
        self.cell(f"resumed from step 4 = uninterrupted, {way}", resume, differ, wanted)
        log = "\n".join(path.read_text() for path in (run / "logs").glob("*.log"))
        resumed = any("resuming from" in line and "step-00000004" in line for line in log.splitlines())
        self.cell(f"resumed at step 4, {way}", lambda: resumed, str, "True")
        model = self._directory / f"model{stage}"
        if self.cell(f"convert, with its proof, {way}", lambda: self.cli("convert", run, model)) is None:
            return
        complete = ("complete", model, "def ", "--num", 1, "--max-new-tokens", 16, "--json")
        self.cell(f"complete, {way}", lambda: self.cli(*complete))

    def cell(
        self,
        cell: str,
        run: Callable[[], Any],
        found: Callable[[Any], str] = lambda result: "done",
        wanted: str = "done",
    ) -> Any:
        """Run a function as a cell and return its result; None if it failed."""
        started = self._job.seconds_left
        try:
            result = run()
            what = found(result)
        except Exception as error:
            result, what = None, f"{type(error).__name__}: {error}"[-500:]
        seconds = started - self._job.seconds_left
        row = {"cell": cell, "ok": what == wanted, "found": what, "wanted": wanted, "seconds": round(seconds, 1)}
        self._job.add(part="correctness", **row)
        return result

    def cli(self, *arguments: Any) -> str:
        """Run `codeparrot-ds ...`."""
        return self.python("codeparrot_ds.cli", *arguments)

    def python(self, module: str, *arguments: Any) -> str:
        """Run a module to completion in its own rank environment; RuntimeError with its last lines if it fails."""
        ours = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            env={key: value for key, value in os.environ.items() if key not in ours},
            cwd=self._directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, self._job.seconds_left),
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"exit {done.returncode}: " + " / ".join(done.stdout.splitlines()[-4:]))
        return done.stdout


def main() -> None:
    """Run the cells of a job, or write the curve."""
    if sys.argv[1:] == ["--make-curve"]:
        make_curve()
    else:
        Correctness(Job.from_command_line()).all()
    end(0)


if __name__ == "__main__":
    main()
