"""Wall time of `codeparrot-ds --help` in fresh processes. Prints median and maximum, and JSON.

Usage: python benchmarks/startup.py [RUNS]
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Run the benchmark and print its results."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    command = [str(Path(sys.executable).with_name("codeparrot-ds")), "--help"]
    seconds = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    seconds = seconds[1:]  # the first run fills the page cache
    print(f"--help: median {statistics.median(seconds):.3f} s, maximum {max(seconds):.3f} s over {runs} runs")
    print(json.dumps({"median_seconds": statistics.median(seconds), "max_seconds": max(seconds), "runs": runs}))


if __name__ == "__main__":
    main()
