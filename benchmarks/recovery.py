"""Seconds from a fault until training continues, on three real hosts of which one fails. Prints a table and JSON.

Usage: python benchmarks/recovery.py [SHARDS] [--rounds 3] [--output FILE.json]
Needs root and the Debian packages of the tests. SHARDS must have a vocabulary of 8,192 tokens; by default they are
built from this Python's standard library.

`codeparrot-ds launch --min-hosts 2` trains on three hosts, each a set of namespaces on this machine. After the first
checkpoint a fault is injected into one of them. `restart` is the time until the ranks of the two others are restarted:
detecting the fault, terminating the remaining ranks, checking the hosts, and deciding. `step` is the time until the
next step completes. `start-up` is the time the first attempt needed from its command to its first step: imports,
rendezvous, weights.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import yaml
from step import VOCAB_SIZE, make_shards

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `tests`

from tests.multinode.conftest import TOOLS_PATH, RealHosts, make_hosts  # noqa: E402

VICTIM = 2
SECONDS = 240  # time limit of each wait


@dataclass(frozen=True)
class Recovery:
    """Times of one fault in seconds; see the module docstring."""

    fault: str
    startup: float
    restart: float
    step: float


def kill_ranks(hosts: RealHosts) -> None:
    """Send SIGKILL to all ranks of a host."""
    for rank in hosts.ranks(VICTIM):
        rank.kill()


def cut_link(hosts: RealHosts) -> None:
    """Cut the host's network link in both directions."""
    hosts.set_link(VICTIM, "down")


def lose_host(hosts: RealHosts) -> None:
    """Kill all processes of the host and leave its address unanswered, as in a power failure."""
    hosts.set_link(VICTIM, "down")
    psutil.Process(hosts.first_processes[VICTIM]).kill()


FAULTS: dict[str, Callable[[RealHosts], None]] = {
    "ranks of a host killed": kill_ranks,
    "link of a host cut": cut_link,
    "host lost": lose_host,
}


class Job:
    """`codeparrot-ds launch` on the first host, with timestamps of its events."""

    def __init__(self, hosts: RealHosts, work: Path, shards: Path) -> None:
        recipe = {
            "name": "recovery",
            "runs": str(work / "runs"),
            "model": {"vocab_size": VOCAB_SIZE, "seq_len": 64, "n_layer": 2, "n_head": 2, "n_embd": 64},
            "data": {"shards": str(shards)},
            "batch": {"global_batch_size": 6},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"steps": 1_000_000, "warmup_steps": 1},
            "engine": {"deepspeed": str(ROOT / "ds_configs" / "zero3.json"), "precision": "fp32"},
            "evaluation": {"every_steps": 10**9, "sequences": 1},
            "checkpoints": {"every_steps": 20},
            "logging": {"every_steps": 1, "tensorboard": False},
        }
        (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (work / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts.hosts))
        self._hosts, self._log, self._run = hosts, work / "log", work / "runs" / "recovery"
        command: list[str | Path] = [Path(sys.executable).with_name("codeparrot-ds"), "launch", work / "recipe.yaml"]
        command += ["--hostfile", work / "hosts", "--min-hosts", "2"]
        environment = {
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "HOME": str(work),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{TOOLS_PATH}",
        }
        with open(self._log, "w", encoding="utf-8") as output:
            self._process = hosts.start(command, env=environment, cwd=ROOT, output=output)

    def wait(self, reached: Callable[[], bool]) -> float:
        """Wait until `reached` and return the time. Raises RuntimeError on timeout or if the job ends."""
        deadline = time.monotonic() + SECONDS
        while not reached():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(self._log.read_text())
            time.sleep(0.01)
        return time.monotonic()

    def attempts(self) -> int:
        """Number of times ranks were started."""
        return self._log.read_text().count("$ DS_ENV_FILE=")

    def rows(self) -> int:
        """Number of steps in the metrics, including lost ones."""
        metrics = self._run / "metrics.jsonl"
        return metrics.read_text().count('"kind": "train"') if metrics.exists() else 0

    def saved(self) -> bool:
        """Whether a checkpoint exists."""
        return any((self._run / "checkpoints").glob("step-*[0-9]/manifest.json"))

    def resumed(self) -> bool:
        """Whether the ranks of the second attempt have completed a step."""
        return "resuming from" in (text := self._log.read_text()) and " of 1000000: " in text.split("resuming from")[1]

    def end(self) -> None:
        """Kill all processes of the job."""
        self._hosts.end_commands(self._process)


@contextlib.contextmanager
def started(shards: Path) -> Iterator[tuple[RealHosts, Job]]:
    """Create hosts and start a job on them."""
    with tempfile.TemporaryDirectory(prefix="codeparrot-recovery-") as name:
        work = Path(name)
        (work / "ssh").mkdir()
        with make_hosts(work / "ssh") as hosts:
            job = Job(hosts, work, shards)
            try:
                yield hosts, job
            finally:
                job.end()


def recover(fault: str, shards: Path) -> Recovery:
    """Inject a fault into a host of a training job, and wait until training continues."""
    with started(shards) as (hosts, job):
        commanded = job.wait(lambda: job.attempts() == 1)
        stepped = job.wait(lambda: job.rows() > 0)
        job.wait(job.saved)
        FAULTS[fault](hosts)
        hurt = time.monotonic()
        restarted = job.wait(lambda: job.attempts() == 2)
        trains = job.wait(job.resumed)
        return Recovery(fault, stepped - commanded, restarted - hurt, trains - hurt)


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shards", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file for the JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="codeparrot-recovery-") as work:
        shards = (options.shards or make_shards(Path(work), VOCAB_SIZE)).resolve()
        found = [recover(fault, shards) for _ in range(options.rounds) for fault in FAULTS]
    print(f"{'':24}  start-up   restart      step")
    for fault in FAULTS:
        of_fault = [each for each in found if each.fault == fault]
        cells = [
            f"{statistics.median(values):5.1f} s ({max(values):.1f})"
            for values in (
                [each.startup for each in of_fault],
                [each.restart for each in of_fault],
                [each.step for each in of_fault],
            )
        ]
        print(f"{fault:24}  {'  '.join(cells)}", flush=True)
    print("median of", options.rounds, "(largest);", os.cpu_count(), "cores under all hosts")
    text = json.dumps([asdict(each) for each in found])
    if options.output is not None:
        options.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
