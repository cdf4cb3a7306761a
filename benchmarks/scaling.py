"""Tokens/s of 1, 2 and 3 real hosts, and a model verified against them projected to 8 to 512 GPUs.

Usage: python benchmarks/scaling.py [SHARDS] [--link 200] [--steps 20] [--output FILE.json] [--plot FILE.svg]
Prints a table and JSON. Needs root and the Debian packages of the tests. SHARDS must have a vocabulary of 8,192 tokens;
by default they are built from this Python's standard library. --model-only skips the hosts.

Each host is a set of namespaces on this machine, connected by virtual links that `tc` limits to --link Mb/s, and is
limited to the same share of the machine's cores (a control group), so that three compute no slower than one. Ranks
train in bf16, one per host. The bytes sent by each host are read from its network interface. With a limit, a step
should take its time without the limit plus the bytes given by the model divided by the link speed, because gloo on a
CPU core overlaps nothing.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from environments import environment, plain_env
from step import VOCAB_SIZE, make_shards

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `tests`

from codeparrot_ds.planning.scaling import Cluster, step_time, traffic  # noqa: E402
from codeparrot_ds.run.recipe import load_recipe  # noqa: E402
from codeparrot_ds.run.sections import Model  # noqa: E402
from tests.multinode.conftest import RealHosts, make_hosts, run_deepspeed  # noqa: E402

MATPLOTLIB = "matplotlib==3.10.8"
MODEL = {"vocab_size": VOCAB_SIZE, "seq_len": 128, "n_layer": 4, "n_head": 6, "n_embd": 384}
MICRO_BATCH, ACCUMULATION = 4, 2  # sequences, micro-batches per step
WARM_UP_STEPS = 5
CONTROL_GROUPS = Path("/sys/fs/cgroup/cpu")
GBITS = (25, 100, 400, 3200)  # per host
GPUS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Measured:
    """Measurements of a job on several hosts.

    Attributes:
        link_mbits: speed limit of each host's link, or None if unlimited.
        step_seconds: median step time.
        sent_bytes: sent per host and step, mean over hosts, including TCP and Ethernet headers.
    """

    stage: int
    hosts: int
    link_mbits: float | None
    step_seconds: float
    sent_bytes: float

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all hosts together."""
        return self.hosts * tokens_per_host() / self.step_seconds


def tokens_per_host() -> int:
    """Tokens per host and step."""
    return MICRO_BATCH * ACCUMULATION * int(MODEL["seq_len"])


class TrafficSampler(threading.Thread):
    """Bytes each host sends between two optimizer steps, sampled when their rows appear in the metrics."""

    def __init__(self, hosts: RealHosts, count: int, metrics: Path, first: int, last: int) -> None:
        super().__init__(daemon=True)
        self._hosts, self._count, self._metrics, self._steps = hosts, count, metrics, (first, last)
        self._stop_asked = threading.Event()
        self._sent: list[list[int]] = []

    def run(self) -> None:
        """Poll until both steps are done."""
        while len(self._sent) < 2 and not self._stop_asked.wait(0.01):
            if self._metrics.exists():
                rows = self._metrics.read_text().count('"kind": "train"')
                if rows > self._steps[len(self._sent)]:
                    self._sent.append([sent_bytes(self._hosts, host) for host in range(self._count)])

    def bytes_per_step(self) -> float:
        """Mean bytes per host and step. Raises RuntimeError if the steps were not seen."""
        self._stop_asked.set()
        self.join()
        if len(self._sent) < 2:
            raise RuntimeError(f"{self._metrics}: the run took fewer than {self._steps[1]} steps")
        before, after = map(sum, self._sent)
        return (after - before) / self._count / (self._steps[1] - self._steps[0])


def sent_bytes(hosts: RealHosts, host: int) -> int:
    """Bytes sent through a host's eth0 so far."""
    for line in Path(f"/proc/{hosts.first_processes[host]}/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            return int(counters.split()[8])
    raise RuntimeError("no eth0")


@contextlib.contextmanager
def equal_shares(hosts: RealHosts) -> Iterator[float]:
    """Limit every host to the same share of the cores, 90 % of them in total. Yields the cores per host."""
    cores = 0.9 * (os.cpu_count() or 1) / len(hosts.hosts)
    groups = [CONTROL_GROUPS / name for name in hosts.hosts]
    try:
        for number, group in enumerate(groups):
            group.mkdir()
            (group / "cpu.cfs_period_us").write_text("20000")
            (group / "cpu.cfs_quota_us").write_text(str(int(20000 * cores)))
            first = hosts.first_processes[number]
            children = Path(f"/proc/{first}/task/{first}/children").read_text(encoding="utf-8").split()
            for pid in (str(first), *children):  # its sshd, the ancestor of its ranks
                (group / "cgroup.procs").write_text(pid)
        yield cores
    finally:
        for group in groups:
            if group.exists():
                for pid in (group / "cgroup.procs").read_text().split():
                    (CONTROL_GROUPS / "cgroup.procs").write_text(pid)
                group.rmdir()


def limit_links(hosts: RealHosts, mbits: float | None) -> None:
    """Limit the outgoing bandwidth of every host's link."""
    for name in hosts.hosts:
        subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", "eth0", "root"], capture_output=True, check=False)
        if mbits is not None:
            speed = ["rate", f"{mbits}mbit", "burst", "128kb", "latency", "100ms"]
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "tbf", *speed], check=True)


def measure(hosts: RealHosts, shards: Path, stage: int, count: int, mbits: float | None, steps: int) -> Measured:
    """Train on the first `count` hosts and measure."""
    with tempfile.TemporaryDirectory(prefix="codeparrot-scaling-") as name:
        work = Path(name)
        recipe = {
            "name": "scaling",
            "runs": str(work / "runs"),
            "model": MODEL,
            "data": {"shards": str(shards)},
            "batch": {"global_batch_size": count * MICRO_BATCH * ACCUMULATION, "micro_batch_size": MICRO_BATCH},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"steps": WARM_UP_STEPS + steps, "warmup_steps": 1},
            "engine": {"deepspeed": str(ROOT / "ds_configs" / f"zero{stage}.json"), "precision": "bf16"},
            "evaluation": {"every_steps": 10**9, "sequences": 1},
            "checkpoints": {"every_steps": 10**9},
            "logging": {"every_steps": 1, "tensorboard": False},
        }
        (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        metrics = work / "runs" / "scaling" / "metrics.jsonl"
        limit_links(hosts, mbits)
        sampler = TrafficSampler(hosts, count, metrics, WARM_UP_STEPS, WARM_UP_STEPS + steps - 2)
        sampler.start()
        done = run_deepspeed(hosts, work / "recipe.yaml", work, hosts=range(count))
        if done.returncode:
            raise RuntimeError(done.output)
        sent = sampler.bytes_per_step()
        rows = [json.loads(row) for row in metrics.read_text().splitlines()]
        seconds = [row["step_seconds"] for row in rows if row["kind"] == "train"][WARM_UP_STEPS:]
        return Measured(stage, count, mbits, statistics.median(seconds), sent)


def measure_all(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Measure every stage on every number of hosts, with and without a limit, and add the model's figures."""
    shards = options.shards or make_shards(work, VOCAB_SIZE)
    model = Model.model_validate(MODEL)
    rows = []
    print("stage  hosts  link Mb/s  tokens/s  of one host's  sent per step  model  predicted tokens/s", flush=True)
    with make_hosts(work / "hosts") as hosts, equal_shares(hosts) as cores:
        for stage in options.stages:
            unlimited: dict[int, Measured] = {}
            for count, mbits in ((1, None), *((count, mbits) for count in (2, 3) for mbits in (None, options.link))):
                found = measure(hosts, shards, stage, count, mbits, options.steps)
                if mbits is None:
                    unlimited[count] = found
                sent = traffic(model, stage, ACCUMULATION)
                row = {
                    **asdict(found),
                    "cores_per_host": cores,
                    "tokens_per_second": found.tokens_per_second,
                    "scaling": found.tokens_per_second / count / unlimited[1].tokens_per_second,
                    "model_sent_bytes": sent.link_bytes(count),
                    "model_tokens_per_second": None,
                }
                if mbits is not None:
                    seconds = unlimited[count].step_seconds + sent.link_bytes(count) * 8 / mbits / 1e6
                    row["model_tokens_per_second"] = count * tokens_per_host() / seconds
                rows.append(row)
                predicted = row["model_tokens_per_second"]
                print(
                    f"{stage:5}  {count:5}  {mbits or 'none':>9}  {found.tokens_per_second:8,.0f}  "
                    f"{row['scaling']:13.2f}  {found.sent_bytes / 1e6:8.2f} MB  {row['model_sent_bytes'] / 1e6:5.2f}  "
                    f"{'' if predicted is None else f'{predicted:18,.0f}'}",
                    flush=True,
                )
    return rows


def project() -> list[dict[str, Any]]:
    """Project `codeparrot-xl` at its own global batch to 8 to 512 GPUs with the model."""
    recipe = load_recipe(ROOT / "launch" / "recipes" / "codeparrot-xl.yaml")
    model, rows = recipe.model, []
    for gpus in GPUS:
        share = recipe.batch.global_batch_size // gpus
        micro = min(8, share)
        for stage in (1, 2, 3):
            sent = traffic(model, stage, share // micro)
            for gbits in GBITS:
                cluster = Cluster(gpus, gbits * 1e9 / 8)
                time_of_step = step_time(model, sent, cluster, share * model.seq_len)
                tokens = recipe.batch.global_batch_size * model.seq_len
                rows.append(
                    {
                        "gpus": gpus,
                        "stage": stage,
                        "host_gbits": gbits,
                        "micro_batch": micro,
                        "accumulation": share // micro,
                        "compute_seconds": time_of_step.compute_seconds,
                        "communication_seconds": time_of_step.communication_seconds,
                        "tokens_per_second": [
                            tokens / time_of_step.no_overlap_seconds,
                            tokens / time_of_step.overlap_seconds,
                        ],
                        "efficiency": [
                            time_of_step.compute_seconds / seconds
                            for seconds in (time_of_step.no_overlap_seconds, time_of_step.overlap_seconds)
                        ],
                    }
                )
    return rows


def print_projection(rows: list[dict[str, Any]]) -> None:
    """Print the fraction of a step in which GPUs compute, one table per stage."""
    for stage in (1, 2, 3):
        print(f"\nZeRO-{stage}: fraction of a step spent computing, from no overlap to full overlap")
        print("GPUs  micro x acc  " + "".join(f"{gbits:>7} Gb/s  " for gbits in GBITS))
        for gpus in GPUS:
            found = [row for row in rows if (row["gpus"], row["stage"]) == (gpus, stage)]
            cells = [f"{low:.2f} - {high:.2f}".rjust(14) for low, high in (row["efficiency"] for row in found)]
            print(f"{gpus:4}  {found[0]['micro_batch']:5} x {found[0]['accumulation']:<3}" + "".join(cells))


def main() -> None:
    """Measure, project and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shards", type=Path, nargs="?")
    parser.add_argument("--link", type=float, default=200.0, help="bandwidth of a host's link in Mb/s")
    parser.add_argument("--stages", type=lambda text: [int(each) for each in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=20, help="measured steps, after the warm-up")
    parser.add_argument("--model-only", action="store_true", help="skip the hosts")
    parser.add_argument("--output", type=Path, help="file for the JSON")
    parser.add_argument("--plot", type=Path, help="file for a plot of the projection")
    options = parser.parse_args()
    result: dict[str, Any] = {"time": time.time(), "measured": [], "projected": project()}
    with tempfile.TemporaryDirectory(prefix="codeparrot-scaling-") as work:
        if not options.model_only:
            (Path(work) / "hosts").mkdir()
            result["measured"] = measure_all(options, Path(work))
        print_projection(result["projected"])
        text = json.dumps(result)
        if options.output is not None:
            options.output.write_text(text)
        else:
            print(text)
        if options.plot is not None:
            python = environment(Path(tempfile.gettempdir()) / "codeparrot-plot", (MATPLOTLIB,)).python
            plot = Path(__file__).with_name("scaling_plot.py")
            subprocess.run([python, plot, options.plot], input=text, text=True, check=True, env=plain_env())


if __name__ == "__main__":
    main()
