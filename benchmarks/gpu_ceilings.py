"""Hardware ceilings of this GPU for xl's shapes: copies, matrix products, attention, kernel launches.

Usage: python benchmarks/gpu_ceilings.py JOB.json, started by `benchmarks/gpu.py`. Times are medians of 10 runs after 3
warm-up runs, by CUDA events on a GPU. On a CPU, with small sizes, they only show that the program works.
"""

import contextlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from gpu_job import Job
from torch.nn.attention import SDPBackend, sdpa_kernel

from codeparrot_ds.training.kernels import loss_and_gradient
from codeparrot_ds.training.loss import in_passes

LAYERS, WIDTH, VOCABULARY = 48, 1600, 32768  # GPT-2 xl as configured in codeparrot-xl
WARM_UP, REPEATS = 3, 10
# Projections of a block: name, inputs, outputs.
PROJECTIONS = (("c_attn", 1, 3), ("c_proj", 1, 1), ("c_fc", 1, 4), ("mlp.c_proj", 4, 1))
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Substring of a kernel name -> SDPA backend; the first match in the longest-running kernel's name counts.
KERNELS = {"cudnn": "cudnn", "flash": "flash", "fmha": "efficient", "gemm": "math"}


class Ceilings:
    """Takes all measurements, the most important first."""

    def __init__(self, job: Job) -> None:
        self._job, self._tiny = job, job.tiny
        self._device = torch.device("cpu" if job.on_cpu else "cuda")
        self._seconds_of_gemms = self._bytes_a_second = 0.0

    def all(self) -> None:
        """Take the measurements one after another; a failure becomes a row, and the others continue."""
        self._job.add(part="versions", **versions(self._job.on_cpu))
        for measure in (self.square, self.copy, self.blocks, self.head, self.attention, self.launches, self.loss):
            try:
                measure()
            except Exception as error:
                self.add(measure.__name__, error=f"{type(error).__name__}: {error}".splitlines()[0][:300])

    def add(self, what: str, **more: Any) -> None:
        """Add a row."""
        self._job.add(part="ceiling", what=what, device=device_name(self._job.on_cpu), **more)

    def tensor(self, *shape: int) -> torch.Tensor:
        """A random bf16 tensor."""
        return torch.randn(shape, device=self._device, dtype=torch.bfloat16)

    def seconds(self, run: Callable[[], object]) -> float:
        """Median seconds of one call."""
        for _ in range(1 if self._tiny else WARM_UP):
            run()
        times = []
        for _ in range(3 if self._tiny else REPEATS):
            if self._device.type == "cpu":
                started = time.perf_counter()
                run()
                times.append(time.perf_counter() - started)
            else:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def product(self, what: str, shape: str, flops: float, run: Callable[[], object]) -> float:
        """Time a matrix product, add its row, and return its seconds."""
        took = self.seconds(run)
        self.add(what, shape=shape, seconds=took, value=flops / took / 1e12, unit="TFLOP/s")
        return took

    def copy(self) -> None:
        """Time a device-to-device copy: each byte is read once and written once."""
        size = 1 << (24 if self._tiny else 32)
        source = torch.empty(size, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        took = self.seconds(lambda: target.copy_(source))
        self._bytes_a_second = 2 * size / took
        self.add("copy", shape=f"{size / 1e9:.2f} GB", seconds=took, value=2 * size / took / 1e9, unit="GB/s")

    def square(self) -> None:
        """Time the square matrix product commonly used to compare GPUs."""
        side = 256 if self._tiny else 8192
        a, b, out = self.tensor(side, side), self.tensor(side, side), self.tensor(side, side)
        for _ in range(1 if self._tiny else 100):  # an idle GPU needs time to raise its clocks
            torch.mm(a, b, out=out)
        self.product("GEMM", f"{side} x {side} x {side}", 2 * side**3, lambda: torch.mm(a, b, out=out))

    def blocks(self) -> None:
        """Time a block's four projections forward and backward; weights are [inputs, outputs], as in Conv1D."""
        tokens, width = (128, 64) if self._tiny else (16384, WIDTH)
        took = 0.0
        for name, inputs, outputs in PROJECTIONS:
            took += self.linear(name, tokens, inputs * width, outputs * width)
        flops = 6 * tokens * sum(inputs * outputs for _, inputs, outputs in PROJECTIONS) * width**2
        layers = 2 if self._tiny else LAYERS
        self._seconds_of_gemms = layers * took
        shape = f"{tokens:,} tokens, {layers} blocks"
        self.add("all twelve", shape=shape, seconds=layers * took, value=flops / took / 1e12, unit="TFLOP/s")

    def linear(self, name: str, tokens: int, inputs: int, outputs: int) -> float:
        """Time forward with bias, input gradient and weight gradient; returns the sum of seconds."""
        x, weight, bias = self.tensor(tokens, inputs), self.tensor(inputs, outputs), self.tensor(outputs)
        gradient, flops, took = self.tensor(tokens, outputs), 2 * tokens * inputs * outputs, 0.0
        for way, run in (
            ("forward", lambda: torch.addmm(bias, x, weight)),
            ("input gradient", lambda: torch.mm(gradient, weight.T)),
            ("weight gradient", lambda: torch.mm(x.T, gradient)),
        ):
            took += self.product(f"{name}, {way}", f"{tokens:,} x {inputs:,} x {outputs:,}", flops, run)
        return took

    def head(self) -> None:
        """Time the projection to logits, of all tokens and of a chunk; its weight is [vocabulary, width]."""
        width, vocabulary = (64, 512) if self._tiny else (WIDTH, VOCABULARY)
        for tokens in (128,) if self._tiny else (16384, 4096):
            x, weight = self.tensor(tokens, width), self.tensor(vocabulary, width)
            gradient, flops = self.tensor(tokens, vocabulary), 2 * tokens * width * vocabulary
            took = 0.0
            for way, run in (
                ("forward", lambda x=x, weight=weight: F.linear(x, weight)),
                ("input gradient", lambda gradient=gradient, weight=weight: torch.mm(gradient, weight)),
                ("weight gradient", lambda gradient=gradient, x=x: torch.mm(gradient.T, x)),
            ):
                took += self.product(f"head, {way}", f"{tokens:,} x {width:,} x {vocabulary:,}", flops, run)
            if self._seconds_of_gemms:
                all_of_them, self._seconds_of_gemms = self._seconds_of_gemms + took, 0.0
                shape = f"{tokens:,} tokens, blocks and head"
                self.add("GEMMs alone", shape=shape, seconds=all_of_them, value=tokens / all_of_them, unit="tokens/s")

    def attention(self) -> None:
        """Time causal attention with each backend and with the default one; FLOPs count the unmasked half only."""
        batch, heads, length, size = (2, 2, 64, 16) if self._tiny else (16, 25, 1024, 64)
        q, k, v = (self.tensor(batch, heads, length, size).requires_grad_() for _ in range(3))
        gradient = self.tensor(batch, heads, length, size)
        flops = 2.0 * batch * heads * length**2 * size  # two products of 2 x length^2 x size, half of them

        def forward() -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def both() -> None:
            torch.autograd.grad(forward(), (q, k, v), gradient)

        shape = f"[{batch}, {heads}, {length}, {size}]"
        for name in ("default", *BACKENDS):
            with sdpa_kernel(BACKENDS[name]) if name in BACKENDS else contextlib.nullcontext():
                try:
                    if name == "default":
                        kernel = self.longest_kernel(forward)
                        chosen = next((found for part, found in KERNELS.items() if part in kernel), "unknown")
                        self.add("SDPA by default", shape=shape, value=chosen, unit=kernel[:100])
                    with torch.no_grad():
                        self.product(f"SDPA {name}, forward", shape, flops, forward)
                    # The backward pass recomputes the scores: five products, compared with two in the forward pass.
                    self.product(f"SDPA {name}, both", shape, 3.5 * flops, both)
                except RuntimeError as error:
                    self.add(f"SDPA {name}", shape=shape, error=str(error).splitlines()[0][:200])

    def longest_kernel(self, run: Callable[[], object]) -> str:
        """Name of the longest-running kernel in lower case; on a CPU, that of the operator."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self._device.type == "cuda"
        run()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
            run()
        rows = profiler.key_averages()
        if on_gpu:
            rows = [row for row in rows if row.device_type == DeviceType.CUDA and not row.is_user_annotation]
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        return str(max(rows, key=lambda row: getattr(row, key)).key).lower()

    def loss(self) -> None:
        """Time the loss and gradient of a chunk's logits, in one kernel and in passes, as bytes at copy bandwidth.

        The three adjacent matrix products read or write each logit once more, 6 bytes in all.
        """
        tokens, vocabulary = (128, 512) if self._tiny else (4096, VOCABULARY)
        logits = self.tensor(tokens, vocabulary)
        targets = torch.randint(vocabulary, (tokens, 1), device=self._device)
        for name, run in (("in one kernel", loss_and_gradient), ("in passes", in_passes)):
            took = self.seconds(lambda run=run: run(logits, targets, True))
            value = took * self._bytes_a_second / logits.numel()
            self.add(f"loss {name}", shape=f"{tokens:,} x {vocabulary:,}", seconds=took, value=value, unit="B a logit")

    def launches(self) -> None:
        """Time launches of a one-element kernel through PyTorch: the launch rate limits operations on small tensors."""
        one, count = torch.zeros(1, device=self._device), 1000 if self._tiny else 20000
        times = []
        for _ in range(3):
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(count):
                one.add_(1)
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        took = statistics.median(times)
        self.add("launches", shape="add_ of one number", seconds=took / count, value=count / took, unit="kernels/s")


def versions(on_cpu: bool) -> dict[str, str]:
    """Versions and settings that the measurements depend on."""
    found = {"GPU": device_name(on_cpu), "driver": "none", "python": platform.python_version()}
    if not on_cpu:
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
            found["driver"] = done.splitlines()[0]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            found["driver"] = f"unknown ({error})"
    found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for package in ("torch", "triton", "transformers", "deepspeed", "accelerate"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def device_name(on_cpu: bool) -> str:
    """Name of the GPU."""
    return "cpu" if on_cpu else torch.cuda.get_device_name()


if __name__ == "__main__":
    Ceilings(Job.from_command_line()).all()
