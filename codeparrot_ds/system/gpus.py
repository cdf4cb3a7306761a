"""GPUs of this machine, and how fast those with a known name are."""

import os
import subprocess
from functools import cache

# Dense TFLOP/s in bf16 by the makers' data sheets, for the first name that the device's holds.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "MI300X": 1307.0,
    "MI250X": 191.5,
}


def peak_flops_of(name: str) -> float | None:
    """Peak FLOP/s in half precision of the GPU with this name, as its driver tells it; None where it is not known."""
    return next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS.items() if part in name), None)


@cache
def local_gpus() -> list[tuple[str, int]]:
    """(name, bytes) of each GPU of this machine that may be used, as nvidia-smi tells; none without it."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in found.splitlines() if "," in line]
    # Where memory is shared with the host it has no number.
    gpus = [(name.strip(), int(mebibytes) << 20) for name, mebibytes in rows if mebibytes.strip().isdigit()]
    visible = visible_gpus()
    if visible is None:
        return gpus
    if not all(each.isdigit() for each in visible):  # named by their UUIDs
        return gpus[: len(visible)]
    return [gpus[int(each)] for each in visible if int(each) < len(gpus)]


def visible_gpus() -> list[str] | None:
    """Those that CUDA_VISIBLE_DEVICES names; None where it says nothing."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if names is None else [each.strip() for each in names.split(",") if each.strip()]
