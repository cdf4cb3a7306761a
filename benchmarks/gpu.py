"""Speed and memory on one GPU: ours in many ways, its peers beside it, in one command without a network.

Usage: python benchmarks/gpu.py [--parts xl,peers,small,ladder,curve] [--nanogpt DIR] [--seconds N] [--output FILE.json]

- xl, small: GPT-2 xl (1,529.6 M parameters) and small (111.0 M) at ZeRO 1, 2, 3, every recomputation, micro-batches
  in powers of two: tokens/s, MFU, peak memory, and beside it what `codeparrot-ds plan` predicts. Of each stage the
  smallest way that is predicted not to fit is tried last.
- peers: at the largest micro-batch that all hold: HF Trainer with DeepSpeed, Accelerate as in the chapter, and nanoGPT
  (from DIR, a clone; left out without it), in the same run as ours.
- ladder: ours with one thing changed at a time, and a profile of a step.
- curve: 500 steps of the quickstart's model in fp32 and bf16 on the GPU, and in fp32 on the CPU, on the same data;
  without a GPU in fp32 and bf16 on the CPU.

Results are written as they come, so that a run that is cut short leaves what it has. `--fill docs/speed.md` puts the
tables into that page. `--tiny` takes tiny models, and CPU ranks where there is no GPU: it shows that all this works.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.hosts.launchers import find_deepspeed
from codeparrot_ds.planning.machine import Machine, find_machine
from codeparrot_ds.planning.plan import RECOMPUTED, Choice, predict
from codeparrot_ds.planning.tune import run_group
from codeparrot_ds.run.ds_config import load_ds_config, resolve
from codeparrot_ds.run.recipe import Recipe, load_recipe
from codeparrot_ds.system.gpus import local_gpus
from codeparrot_ds.system.network import free_port

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {name: ROOT / "launch" / "recipes" / f"codeparrot-{name}.yaml" for name in ("xl", "small")}
TINY = [f"model.{key}" for key in ("n_layer=2", "n_embd=64", "n_head=2", "vocab_size=512", "seq_len=64")]
WARM_UP, STEPS = 3, 5
SECONDS_A_PROCESS = 420
PEERS = {"trainer": "HF Trainer + DeepSpeed", "accelerate": "Accelerate + DeepSpeed", "nanogpt": "nanoGPT"}
# Ours with one thing changed: name, settings, micro-batch.
LADDER = (
    ("as it is", []),
    ("torch.compile", ["engine.compile=true"]),
    ("logits of 1,024 tokens at a time", ["engine.loss_chunk_tokens=1024"]),
    ("logits of 16,384 tokens at a time", ["engine.loss_chunk_tokens=16384"]),
)


class Benchmark:
    """Its parts, and what they have found."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self._options, self._directory = options, directory
        self._deadline = time.monotonic() + options.seconds
        self._on_cpu = not local_gpus()
        if self._on_cpu and not options.tiny and options.parts != "curve":
            sys.exit("no GPU here. --tiny shows on CPU ranks that the benchmark works; --parts curve takes them too.")
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []

    def recipe(self, name: str, *overrides: str) -> Recipe:
        """Of a model, tiny where that was asked for."""
        return load_recipe(RECIPES[name], [*self._settings(), *overrides])

    def _settings(self) -> list[str]:
        return [*(TINY if self._options.tiny else []), "batch.global_batch_size=64", "batch.micro_batch_size=1"]

    def machine(self, recipe: Recipe) -> Machine:
        """The one GPU."""
        return find_machine(recipe, 1, on_cpu=self._on_cpu)

    def ways(self, recipe: Recipe) -> list[tuple[str, int]]:
        """(recomputation, micro-batch) by predicted memory, the last of them the first that does not fit."""
        found = []
        sizes = (1, 2) if self._options.tiny else (1, 2, 4, 8, 16, 32, 64)
        for recompute in RECOMPUTED:
            for size in sizes:
                choice = Choice(recipe.engine.deepspeed, recompute, size)
                prediction = predict(one_micro_batch(recipe, size), choice, self.machine(recipe))
                found.append((prediction.memory.peak_bytes, recompute, size, prediction.fits))
        found.sort()
        fitting = [(recompute, size) for _, recompute, size, fits in found if fits]
        return fitting + [(recompute, size) for _, recompute, size, fits in found if not fits][:1]

    def models(self, name: str) -> None:
        """Every way at every stage."""
        for stage in (1, 3, 2):
            overrides = [f"engine.deepspeed={ROOT}/ds_configs/zero{stage}.json"]
            self.ours(name, name, overrides, self.ways(self.recipe(name, *overrides)))

    def ours(
        self,
        part: str,
        name: str,
        overrides: list[str],
        ways: list[tuple[str, int]],
        change: str = "",
        trace: bool = False,
    ) -> None:
        """Some ways, with one engine. Of `part` are the rows; `change` is what they have that others have not."""
        output = self._directory / f"{len(self.rows)}.jsonl"
        job = {
            "part": part,
            "recipe": str(RECIPES[name]),
            "overrides": [*(TINY if self._options.tiny else []), *overrides],
            "ways": ways,
            "warm_up": WARM_UP,
            "steps": STEPS + trace,
            "output": str(output),
            "trace": str(self._directory / "trace.json") if trace else None,
        }
        self.run([str(Path(__file__).with_name("gpu_ours.py"))], job, f"ours, {part} {change}".rstrip())
        if output.exists():
            more = {"model": name, "who": "ours", **({"change": change} if change else {})}
            self.add(*({**more, **json.loads(line)} for line in output.read_text().splitlines()))

    def run(
        self, program: list[str], job: dict[str, Any] | None, what: str, plain: bool = False, on_cpu: bool = False
    ) -> bool:
        """Start a process on the GPU, with deepspeed unless `plain`; False where it failed, or time is up."""
        left = self._deadline - time.monotonic()
        if left < 20:
            print(f"{what}: left out, time is up", file=sys.stderr, flush=True)
            return False
        if job is not None:
            path = self._directory / f"job-{time.monotonic_ns()}.json"
            path.write_text(json.dumps(job))
            program = [*program, str(path)]
        launcher = (
            [sys.executable]
            if plain
            else [*find_deepspeed(), "--quiet", "--num_gpus", "1", "--master_port", free_port()]
        )
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1"}
        if self._on_cpu or on_cpu:
            environment["DS_ACCELERATOR"] = "cpu"
        started, log = time.monotonic(), self._directory / "log"
        code = run_group([*launcher, *program], environment, log, min(left, SECONDS_A_PROCESS))
        print(f"{what}: {time.monotonic() - started:.0f} s, exit {code}", file=sys.stderr, flush=True)
        if code != 0:
            self.failed.append(what)
            print("\n".join(log.read_text(errors="replace").splitlines()[-15:]), file=sys.stderr, flush=True)
        return code == 0

    def peers(self) -> None:
        """Ours and its peers at the same micro-batches, without recomputation."""
        recipe = self.recipe("xl", f"engine.deepspeed={ROOT}/ds_configs/zero1.json")
        for micro_batch in (2,) if self._options.tiny else (8, 4):
            self.ours("peers", "xl", [f"engine.deepspeed={recipe.engine.deepspeed}"], [("none", micro_batch)])
            if all(self.peer(peer, recipe, micro_batch) is not False for peer in PEERS):
                return  # all of them hold this one

    def peer(self, peer: str, recipe: Recipe, micro_batch: int) -> bool | None:
        """One of them; None where it is not here."""
        if peer == "nanogpt" and self._options.nanogpt is None:
            return None
        name = self._directory / f"{peer}-{micro_batch}"
        steps = WARM_UP + STEPS
        job: dict[str, Any] = {"output": f"{name}.json", "steps": steps}
        if peer == "nanogpt":
            model = recipe.model.model_dump(mode="json")
            job |= {"nanogpt": str(self._options.nanogpt.resolve()), "model": model, "micro_batch": micro_batch}
            program = "gpu_nanogpt.py"
            job["compile"] = not self._on_cpu
        else:
            config = resolve(load_ds_config(recipe.engine.deepspeed), one_micro_batch(recipe, micro_batch), 1)
            Path(f"{name}-ds.json").write_text(json.dumps(config))
            size = (steps, micro_batch, recipe.model.seq_len + 1)
            np.save(f"{name}.npy", np.random.default_rng(0).integers(recipe.model.vocab_size, size=size))
            optimizer = recipe.optimizer
            job |= {
                "model": recipe.model.hugging_face_config(0),
                "activation_checkpointing": False,
                "ds_config": f"{name}-ds.json",
                "batches": f"{name}.npy",
                "log_every": steps,
                "learning_rate": optimizer.learning_rate,
                "betas": optimizer.betas,
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                "gradient_clipping": optimizer.gradient_clipping,
                "precision": recipe.engine.precision,
                "seed": recipe.seed,
            }
            program = f"step_{peer}.py"
        path = str(ROOT / "benchmarks" / "peers" / program)
        if not self.run([path], job, f"{peer}, micro-batch {micro_batch}", plain=peer == "nanogpt"):
            return False
        found = json.loads(Path(job["output"]).read_text())
        if found.get("out_of_memory"):
            return False
        self.add(
            {
                "part": "peers",
                "model": "xl",
                "who": peer,
                "stage": None if peer == "nanogpt" else 1,
                "recompute": "none",
                "micro_batch": micro_batch,
                "step_seconds": found["step_seconds"][-STEPS:],
                "tokens_per_step": micro_batch * recipe.model.seq_len,
                "peak_bytes": found.get("peak_bytes"),
                "flops_per_token": recipe.model.flops_per_token,
                "peak_flops": self.machine(recipe).cluster.gpu_flops,
                "device": "cpu" if self._on_cpu else "gpu",
            }
        )
        return True

    def ladder(self) -> None:
        """One thing changed at a time, and a profile of the first."""
        stage = f"engine.deepspeed={ROOT}/ds_configs/zero1.json"
        micro_batch = 2 if self._options.tiny else 8
        for name, settings in LADDER:
            self.ours("ladder", "xl", [stage, *settings], [("none", micro_batch)], name, trace=name == LADDER[0][0])
        trace = self._directory / "trace.json"
        if trace.exists():
            self.add({"part": "profile", "model": "xl", "operators": json.loads(trace.read_text())})

    def curve(self) -> None:
        """The quickstart's model on the same data, on one rank."""
        shards = self._options.shards or make_shards(self._directory)
        steps = 20 if self._options.tiny else 500
        losses = {}
        here = "cpu" if self._on_cpu else "gpu"
        for device, precision in dict.fromkeys([(here, "fp32"), (here, "bf16"), ("cpu", "fp32")]):
            name = f"{device}-{precision}"
            overrides = {
                "name": name,
                "runs": str(self._directory),
                "data.shards": str(shards),
                "schedule.steps": steps,
                "schedule.warmup_steps": steps // 10,
                "engine.precision": precision,
                "engine.deepspeed": str(ROOT / "ds_configs" / "zero1.json"),
                "evaluation.every_steps": 10**6,
                "checkpoints.every_steps": 10**6,
                "logging.tensorboard": "false",
            }
            settings = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
            recipe = ROOT / "launch" / "recipes" / "quickstart.yaml"
            program = ["--module", "codeparrot_ds.train", str(recipe), *settings]
            if not self.run(program, None, f"curve, {name}", on_cpu=device == "cpu"):
                continue
            rows = [json.loads(line) for line in (self._directory / name / "metrics.jsonl").read_text().splitlines()]
            train = [row for row in rows if row["kind"] == "train"]
            losses[name] = [row["loss"] for row in train]
            print(f"curve, {name}: loss {losses[name][0]:.4f} to {losses[name][-1]:.4f}", file=sys.stderr, flush=True)
            self.add(
                {"part": "curve", "name": name, "losses": losses[name], "digests": [r["batch_digest"] for r in train]}
            )

    def add(self, *rows: dict[str, Any]) -> None:
        """Keep rows, and write all that there is."""
        self.rows += rows
        if self._options.output is not None:
            self._options.output.write_text(json.dumps({"rows": self.rows}))


def one_micro_batch(recipe: Recipe, size: int) -> Recipe:
    """The recipe with steps of one micro-batch."""
    batch = recipe.batch.model_copy(update={"global_batch_size": size, "micro_batch_size": size})
    return recipe.model_copy(update={"batch": batch})


def make_shards(directory: Path) -> Path:
    """Shards with the quickstart's vocabulary, of this Python's own source."""
    corpus, tokenizer, shards = (directory / name for name in ("corpus", "tokenizer", "shards"))
    for command in (
        ["corpus", "collect", "--installed-python", "--max-file-size", "32kB", "--sample", "12MB", "-o", corpus],
        ["tokenizer", "train", corpus, "--vocab-size", "8192", "--max-seq-len", "256", "-o", tokenizer],
        ["shards", "build", corpus, "--tokenizer", tokenizer, "--valid-fraction", "0.02", "-o", shards],
    ):
        program = [sys.executable, "-m", "codeparrot_ds.cli"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        subprocess.run(
            [*program, *map(str, command)], check=True, stdout=subprocess.DEVNULL, env=environment, timeout=300
        )
    return shards


def tokens_per_second(row: dict[str, Any]) -> float:
    """By the median step."""
    return float(row["tokens_per_step"]) / statistics.median(row["step_seconds"])


def way_rows(rows: list[dict[str, Any]], part: str) -> Iterator[list[str]]:
    """Cells of a part's table."""
    for row in rows:
        if row["part"] != part:
            continue
        who = "ours" if row["who"] == "ours" else PEERS[row["who"]]
        stage = "" if row["stage"] is None else f"ZeRO-{row['stage']}"
        predicted = f"{row['predicted_peak_bytes'] / 1e9:.2f}" if "predicted_peak_bytes" in row else ""
        cells = [who, row.get("change", stage), row["recompute"], str(row["micro_batch"])]
        if row.get("out_of_memory"):
            yield [*cells, "out of memory", "", "", predicted, ""]
            continue
        speed, peak = tokens_per_second(row), row.get("peak_bytes")
        mfu = "" if row.get("device") == "cpu" else f"{speed * row['flops_per_token'] / row['peak_flops']:.1%}"
        error = f"{row['predicted_peak_bytes'] / peak - 1:+.1%}" if peak and predicted else ""
        yield [*cells, f"{speed:,.0f}", mfu, f"{peak / 1e9:.2f}" if peak else "", predicted, error]


HEAD = ["who", "way", "recomputing", "micro-batch", "tokens/s", "MFU", "peak GB", "predicted GB", "off by"]


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table."""
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]


def curve_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Each curve against the first."""
    curves = {row["name"]: row for row in rows if row["part"] == "curve"}
    reference = next(iter(curves.values()), None)
    found = []
    for name, row in curves.items():
        if reference is None or row is reference:
            continue
        apart = [abs(a / b - 1) for a, b in zip(row["losses"], reference["losses"], strict=True)]
        same = "the same" if row["digests"] == reference["digests"] else "OTHER"
        found.append(
            [name, reference["name"], f"{len(apart)}", f"{statistics.mean(apart):.1e}", f"{max(apart):.1e}", same]
        )
    return found


def tables(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Part -> lines of Markdown."""
    found = {}
    for part in ("xl", "peers", "small", "ladder"):
        cells = list(way_rows(rows, part))
        if cells:
            found[part] = markdown(HEAD, cells)
    profile = [row for row in rows if row["part"] == "profile"]
    if profile:
        operators = profile[-1]["operators"]
        total = sum(each["microseconds"] for each in operators)
        cells = [
            [
                each["name"][:80],
                str(each["calls"]),
                f"{each['microseconds'] / 1e3:,.2f}",
                f"{each['microseconds'] / total:.1%}",
            ]
            for each in operators[:20]
        ]
        found["profile"] = markdown(["kernel or operator", "calls", "ms", "share"], cells)
    if curve := curve_rows(rows):
        found["curve"] = markdown(["run", "against", "steps", "mean difference", "largest", "data"], curve)
    return found


def fill(page: Path, found: dict[str, list[str]]) -> None:
    """Put tables between a page's marks, `<!-- gpu:NAME -->` and `<!-- gpu:end -->`."""
    text = page.read_text()
    for name, lines in found.items():
        before, mark, after = text.partition(f"<!-- gpu:{name} -->\n")
        if not mark:
            sys.exit(f"{page}: no mark for {name}")
        text = before + mark + "\n".join(lines) + "\n" + after[after.index("<!-- gpu:end -->") :]
    page.write_text(text)


def main() -> None:
    """Measure, print, fill."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", default="xl,peers,ladder,small,curve")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a clone of github.com/karpathy/nanoGPT")
    parser.add_argument("--shards", type=Path, help="for the curve, of the quickstart; made when left out")
    parser.add_argument("--seconds", type=float, default=3600.0, help="after which nothing more is started")
    parser.add_argument("--tiny", action="store_true", help="tiny models: shows that the benchmark works")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--fill", type=Path, metavar="PAGE.md", help="puts the tables into this page")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE.json", help="measure nothing: tables of these rows"
    )
    options = parser.parse_args()
    parts, failed = options.parts.split(","), []
    if unknown := set(parts) - {*RECIPES, "peers", "ladder", "curve"}:
        parser.error(f"--parts: no such part: {', '.join(sorted(unknown))}")
    if options.source is not None:
        rows = json.loads(options.source.read_text())["rows"]
    else:
        with tempfile.TemporaryDirectory(prefix="codeparrot-gpu-") as directory:
            benchmark = Benchmark(options, Path(directory))
            for part in parts:
                if part in RECIPES:
                    benchmark.models(part)
                else:
                    {"peers": benchmark.peers, "ladder": benchmark.ladder, "curve": benchmark.curve}[part]()
            rows, failed = benchmark.rows, benchmark.failed
    found = tables(rows)
    for name, lines in found.items():
        print(f"\n{name}", *lines, sep="\n")
    if options.fill is not None:
        fill(options.fill, found)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
