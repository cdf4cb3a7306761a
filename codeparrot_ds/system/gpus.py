"""Local GPUs and the data-sheet speed of known models."""

import os
import subprocess
from functools import cache

# Dense bf16 TFLOP/s and memory bandwidth in TB/s from vendor data sheets; the first key found in the name applies.
_DATA_SHEETS = {
    "B200": (2250.0, 8.0),
    "H200": (989.0, 4.8),
    "H100 PCIe": (756.0, 2.0),
    "H100 NVL": (835.0, 3.9),
    "H100": (989.0, 3.35),
    "A100": (312.0, 2.0),
    "L40S": (362.0, 0.86),
    "L4": (121.0, 0.3),
    "A10": (125.0, 0.6),
    "RTX 4090": (165.0, 1.0),
    "MI300X": (1307.0, 5.3),
    "MI250X": (191.5, 1.6),
}


def peak_flops_of(name: str) -> float | None:
    """Peak half-precision FLOP/s of the GPU with this driver-reported name; None if unknown."""
    return next((tflops * 1e12 for part, (tflops, _) in _DATA_SHEETS.items() if part in name), None)


def memory_bandwidth_of(name: str) -> float | None:
    """Memory bandwidth (bytes/s) of the GPU with this driver-reported name; None if unknown."""
    return next((terabytes * 1e12 for part, (_, terabytes) in _DATA_SHEETS.items() if part in name), None)


@cache
def local_gpus() -> list[tuple[str, int]]:
    """(name, memory in bytes) of each visible local GPU as reported by nvidia-smi; empty without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(
            query, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in found.splitlines() if "," in line]
    # nvidia-smi reports no number where memory is shared with the host.
    gpus = [(name.strip(), int(mebibytes) << 20) for name, mebibytes in rows if mebibytes.strip().isdigit()]
    visible = visible_gpus()
    if visible is None:
        return gpus
    if not all(each.isdigit() for each in visible):  # given as UUIDs
        return gpus[: len(visible)]
    return [gpus[int(each)] for each in visible if int(each) < len(gpus)]


def visible_gpus() -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES; None if it is not set."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if names is None else [each.strip() for each in names.split(",") if each.strip()]
