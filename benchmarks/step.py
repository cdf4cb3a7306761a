"""Time of our optimizer step compared with peers, in rounds. Prints a table for each ZeRO stage, writes JSON.

Usage: python benchmarks/step.py [SHARDS] [--stages 1,3] [--rounds N] [--steps N] [--output FILE.json]

Ours is a complete `deepspeed --module codeparrot_ds.train RECIPE` with its logging, TensorBoard and digests. The peers
are a minimal DeepSpeed loop, Hugging Face's Trainer, and Accelerate as used in CodeParrot's script; they use the same
DeepSpeed JSON, model, optimizer and ids, which are preloaded in memory. `step` is one optimizer step; `loop` is the
wall time from one log line to the next, divided by its number of steps, so that time between steps is included; `CPU`
is the CPU time of all ranks in that interval, which hardly depends on other load. On a shared machine,
`--others-at-most 0.05` waits for quiet blocks, and `--together` runs all pipelines concurrently, so that they see the
same load, and compares CPU time. By default SHARDS are built from the standard library of this Python.
"""

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from environments import layer
from measure import descendants

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peers"
ACCELERATE = "accelerate==1.15.0"
LOG_EVERY = 10  # steps, the recipe's default
VOCAB_SIZE = 8192
SECONDS_A_RUN = 900  # a hung rendezvous would wait for more than ten minutes
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIPPING = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
QUIET_SECONDS, TRIES = 5, 10
_PACKAGES = ("codeparrot-ds", "deepspeed", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Peer:
    """A driver in benchmarks/peers.

    Attributes:
        bar: target for the ratio of our time to its time.
    """

    title: str
    driver: str
    bar: float
    note: str


_PEERS = {
    "bare": Peer("bare DeepSpeed loop", "step_bare.py", 1.02, "constant rate set once; no gradient norm, no logging"),
    "trainer": Peer(
        "HF Trainer", "step_trainer.py", 1.00, "its logging as often as ours, its clipping and loader; no TensorBoard"
    ),
    "accelerate": Peer("Accelerate", "step_accelerate.py", 1.00, "prepare … scheduler; no logging at all"),
}


@dataclass(frozen=True)
class Timed:
    """One run of one pipeline, without its warm-up.

    Attributes:
        step_seconds: per step; ours from its metrics, a peer's from the end of one step to the end of the next.
        loop_seconds: wall time per step, for each block of LOG_EVERY steps.
        cpu_seconds: CPU time of all ranks per step, for each block.
        data_seconds: time each step waited for its ids; ours only, if its metrics report it.
        loss: mean over the last block.
        others_share: CPU time of other processes of this machine in each block, as a share of all cores.
    """

    step_seconds: list[float]
    loop_seconds: list[float]
    cpu_seconds: list[float]
    data_seconds: list[float]
    loss: float
    others_share: list[float]

    def median(self, field: str) -> float:
        """Median over steps or blocks."""
        return statistics.median(getattr(self, field))

    def quiet(self, share: float) -> "Timed":
        """This run without the blocks in which other processes used more than `share` of the cores."""
        blocks = [number for number, others in enumerate(self.others_share) if others <= share]
        steps = [block * LOG_EVERY + i for block in blocks for i in range(LOG_EVERY)]
        return replace(
            self,
            step_seconds=[self.step_seconds[step] for step in steps],
            data_seconds=[self.data_seconds[step] for step in steps if self.data_seconds],
            loop_seconds=[self.loop_seconds[block] for block in blocks],
            cpu_seconds=[self.cpu_seconds[block] for block in blocks],
            others_share=[self.others_share[block] for block in blocks],
        )


class CpuSampler(threading.Thread):
    """CPU time of a process's descendants and of the whole machine, sampled over time."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._stop_asked = threading.Event()
        self._samples: list[tuple[float, float, float]] = []  # Unix time, descendants' CPU time, the machine's

    def run(self) -> None:
        """Sample until `finish` is called."""
        while not self._stop_asked.wait(0.1):
            of_descendants = sum(map(cpu_seconds_of, descendants(self._pid)))
            self._samples.append((time.time(), of_descendants, busy_seconds()))

    def finish(self) -> None:
        """Stop sampling and wait for the thread."""
        self._stop_asked.set()
        self.join()

    def between(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CPU seconds of the descendants from each of `times` to the next, and other processes' share of all cores."""
        at, mine, machine = np.array(self._samples).T
        seconds = np.diff(np.interp(times, at, mine))
        others = np.diff(np.interp(times, at, machine)) - seconds
        return seconds, np.maximum(0, others / np.diff(times) / (os.cpu_count() or 1))


class Pipelines:
    """Runs the pipelines at one ZeRO stage.

    Attributes:
        ranks: number of processes.
        steps: per run, warm-up included.
    """

    def __init__(self, options: argparse.Namespace, stage: int, shards: Path, peers: Path, directory: Path) -> None:
        self._options, self._stage, self._peers, self._directory = options, stage, peers, directory
        self._gpus = gpus()
        self.ranks = options.ranks or self._gpus or 2
        self.steps = options.warmup + options.steps
        self._runs = itertools.count(1)
        directory.mkdir()
        self._recipe = directory / "recipe.yaml"
        self._recipe.write_text(yaml.safe_dump(self._body(shards)))
        self._job = self._prepare(shards)

    def _body(self, shards: Path) -> dict[str, Any]:
        options = self._options
        return {
            "name": "ours",
            "runs": str(self._directory),
            "model": {
                "vocab_size": options.vocab_size,
                "seq_len": options.seq_len,
                "n_layer": options.n_layer,
                "n_embd": options.n_embd,
                "n_head": options.n_head,
                "activation_checkpointing": "full" if options.activation_checkpointing else "none",
            },
            "data": {"shards": str(shards)},
            "batch": {"global_batch_size": options.global_batch, "micro_batch_size": options.micro_batch},
            "optimizer": {
                "learning_rate": LEARNING_RATE,
                "betas": list(BETAS),
                "eps": EPS,
                "weight_decay": WEIGHT_DECAY,
                "gradient_clipping": CLIPPING,
            },
            "schedule": {"steps": self.steps, "min_ratio": 1.0},  # a constant rate, so that losses are comparable
            "engine": {
                "deepspeed": str(ROOT / "ds_configs" / f"zero{self._stage}.json"),
                "precision": options.precision,
            },
            "evaluation": {"every_steps": 10**6, "sequences": self.ranks},  # before the first step and after the last
            "checkpoints": {"every_steps": 10**6},
            "logging": {"every_steps": LOG_EVERY},
        }

    def _prepare(self, shards: Path) -> dict[str, Any]:
        """Write the drivers' job. A first run of ours, of two steps, resolves the DeepSpeed JSON."""
        from codeparrot_ds.run.recipe import load_recipe
        from codeparrot_ds.shards.sequences import Dataset

        options = self._options
        recipe = load_recipe(self._recipe)
        data = Dataset.open({shards: 1.0}, options.seq_len)
        needed = self.steps * options.global_batch
        if needed > len(data.train):
            sys.exit(f"{shards}: {len(data.train):,} sequences, {needed:,} are needed. Reduce --steps.")
        ids = data.train.batch(data.order(recipe.seed).take(0, needed))
        batches = self._directory / "batches.npy"
        np.save(batches, ids.reshape(self.steps, options.global_batch, options.seq_len + 1))
        first, _ = self._ours("first", ("schedule.steps=2",))
        return {
            "model": recipe.model.hugging_face_config(data.manifests[0].eos_id),
            "activation_checkpointing": options.activation_checkpointing,
            "ds_config": str(first / "ds_config.json"),
            "batches": str(batches),
            "steps": self.steps,
            "log_every": LOG_EVERY,
            "learning_rate": LEARNING_RATE,
            "betas": BETAS,
            "eps": EPS,
            "weight_decay": WEIGHT_DECAY,
            "gradient_clipping": CLIPPING,
            "precision": options.precision,
            "seed": recipe.seed,
        }

    def time(self, pipeline: str) -> Timed:
        """Run `ours` or a peer once, in new processes. Thread-safe."""
        name = f"{pipeline}-{next(self._runs)}"
        if pipeline == "ours":
            run, sampler = self._ours(name)
            steps, ends, loss, waits = self._read_ours(run)
        else:
            report, job = self._directory / f"{name}.json", self._directory / f"{name}-job.json"
            job.write_text(json.dumps({**self._job, "output": str(report)}))
            sampler = self._deepspeed(name, str(PEERS / _PEERS[pipeline].driver), str(job))
            steps, ends, loss, waits = self._read_peer(report)
        cpu_seconds, others_share = sampler.between(ends)
        return Timed(
            step_seconds=steps,
            loop_seconds=(np.diff(ends) / LOG_EVERY).tolist(),
            cpu_seconds=(cpu_seconds / LOG_EVERY).tolist(),
            data_seconds=waits,
            loss=loss,
            others_share=others_share.tolist(),
        )

    def _read_ours(self, run: Path) -> tuple[list[float], np.ndarray, float, list[float]]:
        """Seconds per step, Unix time at the end of each block, last losses, seconds waited for each step's ids."""
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        measured = [row for row in rows if row["kind"] == "train"][self._options.warmup :]
        lines = re.findall(r"(?m)^(\S+ \S+) \w+ step (\d+) of \d+:", (run / "logs" / "rank_00000.log").read_text())
        ends = {int(step): datetime.strptime(date, "%Y-%m-%d %H:%M:%S,%f").timestamp() for date, step in lines}
        shutil.rmtree(run / "checkpoints")
        return (
            [row["step_seconds"] for row in measured],
            np.array([ends[step] for step in range(self._options.warmup, self.steps + 1, LOG_EVERY)]),
            statistics.mean(row["loss"] for row in measured[-LOG_EVERY:]),
            [row["data_seconds"] for row in measured if "data_seconds" in row],
        )

    def _read_peer(self, report: Path) -> tuple[list[float], np.ndarray, float, list[float]]:
        """The same for a driver, which does not wait for data."""
        result = json.loads(report.read_text(encoding="utf-8"))
        ends = np.array(result["ends"])[self._options.warmup - 1 :]
        if len(ends) != self._options.steps + 1:
            raise RuntimeError(f"{report}: {len(result['ends'])} steps instead of {self.steps}")
        return np.diff(ends).tolist(), ends[::LOG_EVERY], result["last_loss"], []

    def _ours(self, name: str, overrides: Sequence[str] = ()) -> tuple[Path, CpuSampler]:
        """Train the recipe as `name`; returns its run directory and its ranks' CPU samples."""
        settings = [part for override in (f"name={name}", *overrides) for part in ("--set", override)]
        sampler = self._deepspeed(name, "--module", "codeparrot_ds.train", str(self._recipe), *settings)
        return self._directory / name, sampler

    def _deepspeed(self, name: str, *arguments: str) -> CpuSampler:
        """Start ranks, wait for them, and return their CPU samples."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        env = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if arguments[0] != "--module":
            env["PYTHONPATH"] = str(self._peers)
            if not self._options.stock_malloc:  # as in training/ranks.py: keep freed memory instead of unmapping it
                env |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
        if self._gpus == 0:
            threads = max(1, len(os.sched_getaffinity(0)) // self.ranks)
            env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        command = [deepspeed, "--quiet", "--master_port", port, "--num_gpus", str(self.ranks), *arguments]
        log = self._directory / f"{name}.log"
        with open(log, "wb") as out:
            # timeout creates its own process group, so the ranks are killed with it.
            process = subprocess.Popen(
                ["timeout", "--kill-after=10", str(SECONDS_A_RUN), *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
            )
        sampler = CpuSampler(process.pid)
        sampler.start()
        try:
            returncode = process.wait()
        finally:
            process.terminate()
            sampler.finish()
        if returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"{' '.join(command)}\nended with {returncode}; its output ends:\n{tail}")
        return sampler


def cpu_seconds_of(pid: int) -> float:
    """User and system time of one process, all threads; 0 if it has exited."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """CPU time of all processes of this machine since boot, without I/O wait."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def gpus() -> int:
    """Number of GPUs torch can use; 0 if the user selects the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def make_shards(work: Path, vocab_size: int) -> Path:
    """Shards of this Python's standard library, built once with our own commands."""
    shards = work / "shards"
    if not (shards / "manifest.json").exists():
        corpus, tokenizer = work / "corpus", work / "tokenizer"
        library = sysconfig.get_path("stdlib")
        for arguments in (
            ("corpus", "collect", library, "--sample", "20MB", "-o", corpus),
            ("tokenizer", "train", corpus, "--vocab-size", vocab_size, "-o", tokenizer),
            ("shards", "build", corpus, "--tokenizer", tokenizer, "-o", shards),
        ):
            command = [sys.executable, "-m", "codeparrot_ds.cli", *map(str, arguments)]
            subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
    return shards


def compare(options: argparse.Namespace, pipelines: Pipelines) -> dict[str, list[Timed]]:
    """Run all pipelines in rounds, every second round in reverse, so that drift affects them equally."""
    names = ["ours", *(name for name in options.peers.split(",") if name)]
    timed: dict[str, list[Timed]] = {name: [] for name in names}
    for number in range(options.rounds):
        each: Iterable[tuple[str, Timed]]
        if options.together:
            with ThreadPoolExecutor(len(names)) as pool:
                all_at_once = list(pool.map(pipelines.time, names))
            each = zip(names, all_at_once, strict=True)
        else:
            ordered = names if number % 2 == 0 else names[::-1]
            each = ((name, time_in_quiet(pipelines, name, options.others_at_most)) for name in ordered)
        for name, one in each:
            timed[name].append(one)
            wall, cpu, others = (one.median(field) for field in ("loop_seconds", "cpu_seconds", "others_share"))
            print(
                f"round {number + 1} of {options.rounds}: {name:<10} {wall * 1e3:8.1f} ms per step, CPU "
                f"{cpu * 1e3:8.1f} ms; {len(one.loop_seconds)} blocks, others took {others:.1%} of the cores",
                file=sys.stderr,
                flush=True,
            )
    return timed


def time_in_quiet(pipelines: Pipelines, name: str, share: float) -> Timed:
    """Repeat a run until other processes used at most `share` of the cores in at least one block."""
    for _ in range(TRIES):
        wait_for_quiet(share)
        one = pipelines.time(name).quiet(share)
        if one.loop_seconds:
            return one
        print(f"{name}: other processes were busy; repeating", file=sys.stderr, flush=True)
    sys.exit(f"{name}: other processes used more than {share:.0%} of the cores in every block of {TRIES} runs.")


def wait_for_quiet(share: float) -> None:
    """Wait until other processes use at most `share` of the cores, for ten minutes at most."""
    for _ in range(600 // QUIET_SECONDS):
        busy = busy_seconds()
        if share >= 1:
            return
        time.sleep(QUIET_SECONDS)
        if busy_seconds() - busy <= share * QUIET_SECONDS * (os.cpu_count() or 1):
            return


def ratios(timed: dict[str, list[Timed]], peer: str, field: str) -> list[float]:
    """Ratio of ours to a peer in each round."""
    return [ours.median(field) / other.median(field) for ours, other in zip(timed["ours"], timed[peer], strict=True)]


def in_words(each: Sequence[float]) -> str:
    """Median, lowest and highest value as text."""
    return f"{statistics.median(each):.3f} ({min(each):.3f}-{max(each):.3f})"


def print_table(stage: int, timed: dict[str, list[Timed]], together: bool) -> None:
    """Print one row per pipeline: medians over all steps and blocks, and ratios within rounds."""
    head = ("step ms", "loop ms", "CPU ms", "loss", "ours / it, loop", "ours / it, CPU", "bar")
    print("\n{:<20} {:>8} {:>8} {:>8} {:>6}  {:<21}  {:<21}  {}".format(f"ZeRO-{stage}", *head))
    for name, runs in timed.items():
        step, loop, cpu = (
            statistics.median(value for run in runs for value in getattr(run, field)) * 1e3
            for field in ("step_seconds", "loop_seconds", "cpu_seconds")
        )
        loss = statistics.median(run.loss for run in runs)
        title = _PEERS[name].title if name in _PEERS else "ours"
        line = f"{title:<20} {step:8.1f} {loop:8.1f} {cpu:8.1f} {loss:6.3f}"
        if name in _PEERS:
            wall_ratios, cpu_ratios = ratios(timed, name, "loop_seconds"), ratios(timed, name, "cpu_seconds")
            decisive = cpu_ratios if together else wall_ratios
            verdict = "met" if statistics.median(decisive) <= _PEERS[name].bar else "missed"
            line += f"  {in_words(wall_ratios):<21}  {in_words(cpu_ratios):<21}  {_PEERS[name].bar:.2f} {verdict}"
        print(line)
    waits = [wait for run in timed["ours"] for wait in run.data_seconds]
    if waits:
        steps = [seconds for run in timed["ours"] for seconds in run.step_seconds]
        print(f"  ours waits for data {sum(waits) / sum(steps):.3%} of its steps; bar 0.5 %")
    shares = [share for runs in timed.values() for run in runs for share in run.others_share]
    alone = "all pipelines at once: CPU time decides" if together else "one pipeline at a time"
    print(f"  {alone}; others took {min(shares):.0%} to {max(shares):.0%} of the cores")
    for name in timed:
        if name in _PEERS:
            print(f"  {_PEERS[name].title}: {_PEERS[name].note}", flush=True)


def main() -> None:
    """Parse the command line, run the benchmark, clean up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shards", type=Path, nargs="?", help="a finished shard directory")
    parser.add_argument("--stages", default="1,3", help="of ZeRO")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help=f"measured steps per run; a multiple of {LOG_EVERY}")
    parser.add_argument("--warmup", type=int, default=10, help=f"warm-up steps; a multiple of {LOG_EVERY}")
    parser.add_argument(
        "--together", action="store_true", help="run all pipelines concurrently; compare CPU time, not wall time"
    )
    parser.add_argument(
        "--others-at-most",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="wait until other processes use at most this share of the cores",
    )
    parser.add_argument("--peers", default=",".join(_PEERS), help="peers to run, comma-separated")
    parser.add_argument("--ranks", type=int, help="processes; default: all GPUs, or 2 on the CPU")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--stock-malloc", action="store_true", help="run peers with glibc's default malloc settings")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="vocabulary size of SHARDS")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--n-embd", type=int, default=256)
    parser.add_argument("--n-head", type=int, default=4)
    parser.add_argument("--global-batch", type=int, default=8, help="sequences")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep packages and shards here for reuse")
    parser.add_argument("--keep", action="store_true", help="keep logs and runs as well")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if options.steps % LOG_EVERY or options.warmup % LOG_EVERY or not options.steps or not options.warmup:
        parser.error(f"--steps and --warmup must be multiples of {LOG_EVERY}")
    work = (options.work or Path(tempfile.mkdtemp(prefix="step-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix="run-", dir=work))
    os.chdir(ROOT)  # so that `codeparrot_ds` is the one in this tree
    try:
        packages = layer(work / "packages", ACCELERATE)
        shards = options.shards.resolve() if options.shards else make_shards(work, options.vocab_size)
        stages = {}
        for stage in map(int, options.stages.split(",")):
            timed = compare(options, Pipelines(options, stage, shards, packages, run / f"zero{stage}"))
            print_table(stage, timed, options.together)
            stages[stage] = timed
    finally:
        if options.keep:
            print(f"kept in {run}", file=sys.stderr)
        else:
            shutil.rmtree(run if options.work else work)
    if options.output:
        result = {
            "settings": {key: value for key, value in vars(options).items() if not isinstance(value, Path)},
            "versions": {name: metadata.version(name) for name in _PACKAGES} | {"accelerate": ACCELERATE[12:]},
            "machine": {"cores": os.cpu_count(), "gpus": gpus(), "system": platform.platform()},
            "stages": {
                stage: {
                    "runs": {name: [asdict(one) for one in runs] for name, runs in timed.items()},
                    "ratios": {
                        name: {field: ratios(timed, name, field) for field in ("loop_seconds", "cpu_seconds")}
                        for name in timed
                        if name != "ours"
                    },
                }
                for stage, timed in stages.items()
            },
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
