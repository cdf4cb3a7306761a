"""Time and peak memory of `launch/quickstart.sh --fresh`, in a copy of the tree. Prints a table and JSON.

Usage: python benchmarks/quickstart.py [--keep DIR]
Memory is the sum of proportional set sizes (PSS) over the script and all its descendants, sampled twice a second.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import MemorySampler

ROOT = Path(__file__).resolve().parent.parent


def copy_tree(target: Path) -> Path:
    """Copy the files that git tracks to `target`, like a clone."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        destination = target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, destination)
    return target


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keep", type=Path, help="run in this new directory and keep it")
    options = parser.parse_args()
    target = options.keep or Path(tempfile.mkdtemp(prefix="quickstart-"))
    copy_tree(target)
    started = time.monotonic()
    process = subprocess.Popen(
        ["./launch/quickstart.sh", "--fresh"], cwd=target, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    sampler = MemorySampler(process.pid, interval_seconds=0.5)
    sampler.start()
    assert process.stdout is not None
    steps: list[tuple[float, str]] = []
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("$ "):
            steps.append((time.monotonic() - started, line[2:].strip()))
    returncode = process.wait()
    seconds = time.monotonic() - started
    sampler.finish()
    ends = [start for start, _ in steps[1:]] + [seconds]
    print(f"\n{'seconds':>8}  command")
    for (start, command), end in zip(steps, ends, strict=True):
        print(f"{end - start:8.1f}  {command[:100]}")
    result = {"returncode": returncode, "seconds": round(seconds, 1), "peak_memory_bytes": sampler.peak_pss_bytes}
    print(json.dumps(result))
    if options.keep is None:
        shutil.rmtree(target)
    sys.exit(returncode)


if __name__ == "__main__":
    main()
