"""A Ray cluster of two nodes with one CPU each, all on loopback.

Run as `python -m tests.faults.probe_ray DIRECTORY`. It prints a JSON line with its address, and another after each line
that it reads; "remove" kills the second node while it works on a task, like a crash. The cluster ends when the input
closes.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from ray._common.utils import get_default_ray_temp_dir
from ray.cluster_utils import Cluster

WORKING, WORKING_SECONDS = "_build_one", 20.0


def say(**facts: Any) -> None:
    """Print one JSON line."""
    print(json.dumps(facts), flush=True)


def tasks_of(raylet: psutil.Process) -> list[str]:
    """Process titles of a node's workers: "ray::FUNCTION" while they run one."""
    return [worker.name() for worker in raylet.children() if worker.name().startswith("ray::")]


def main(directory: str) -> None:
    """Start the cluster, serve the commands, and shut down."""
    # Ray writes the address there regardless of its directory setting, and does not create it.
    Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
    loopback = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(
        initialize_head=True, head_node_args={**loopback, "include_dashboard": False, "temp_dir": directory}
    )
    second = cluster.add_node(**loopback)
    raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)
    say(address=cluster.address)
    for line in sys.stdin:
        if line.strip() == "remove":
            deadline = time.monotonic() + WORKING_SECONDS
            while not any(WORKING in task for task in tasks_of(raylet)) and time.monotonic() < deadline:
                time.sleep(0.01)
            cut_off = tasks_of(raylet)
            cluster.remove_node(second, allow_graceful=False)
            say(cut_off=cut_off)
        elif line.strip() == "connections":
            family = psutil.Process(os.getpid()).children(recursive=True)
            say(addresses=sorted({address for process in family for address in _addresses(process)}))
    cluster.shutdown()


def _addresses(process: psutil.Process) -> set[str]:
    try:
        return {end.ip for kept in process.net_connections("inet") for end in (kept.laddr, kept.raddr) if end}
    except psutil.NoSuchProcess:
        return set()


if __name__ == "__main__":
    main(sys.argv[1])
