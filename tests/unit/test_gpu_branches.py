"""GPU-only code with `torch.cuda` replaced by a fake: memory, times, transfer of ids, step profile."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

from codeparrot_ds import trial
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.training import kernels
from codeparrot_ds.training.loop import Trainer
from codeparrot_ds.training.memory import DeviceMemory, device_memory
from codeparrot_ds.training.metrics import Instant, Metrics, log, read_tensors
from tests.conftest import save_recipe

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A fake GPU with 3 bytes allocated, a peak of 5 and 8 reserved, that records the calls to it."""
    asked = SimpleNamespace(reset=0, synchronized=0, events=0)

    class Event:
        """Events at intervals of 250 ms."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.number: int | None = None

        def record(self) -> None:
            self.number = asked.events = asked.events + 1

        def elapsed_time(self, later: "Event") -> float:
            assert self.number is not None
            assert later.number is not None
            return 250.0 * (later.number - self.number)

    def count(name: str) -> Any:
        return lambda device=None: setattr(asked, name, getattr(asked, name) + 1)

    for name, answer in {
        "get_device_name": lambda device: "NVIDIA H100",
        "get_device_properties": lambda device: SimpleNamespace(total_memory=100),
        "memory_allocated": lambda device: 3,
        "max_memory_allocated": lambda device: 5,
        "max_memory_reserved": lambda device: 8,
        "reset_peak_memory_stats": count("reset"),
        "synchronize": count("synchronized"),
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return asked


def test_memory_is_that_of_the_allocator(gpu: SimpleNamespace) -> None:
    memory = device_memory(GPU)
    assert type(memory) is DeviceMemory
    assert (memory.name, memory.total_bytes) == ("NVIDIA H100", 100)
    assert (memory.held_bytes, memory.peak_bytes, memory.reserved_bytes) == (3, 5, 8)
    memory.reset_peak()
    memory.synchronize()
    assert (gpu.reset, gpu.synchronized) == (1, 1)


def test_a_step_is_timed_on_the_device_without_waiting_for_it(gpu: SimpleNamespace) -> None:
    started = Instant(GPU)
    Instant(GPU)
    ended = Instant(GPU)
    assert ended.seconds_since(started) == 0.5
    assert gpu.synchronized == 0


def test_ids_are_copied_from_pinned_memory_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[Any]()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (done.append("pinned"), tensor)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *to, **how: (done.append((to, how)), tensor)[1])
    trainer: Any = SimpleNamespace(ranks=SimpleNamespace(device=GPU))
    Trainer._on_device(trainer, np.zeros((2, 3), dtype=np.int64))
    assert done == ["pinned", ((GPU,), {"non_blocking": True})]


def test_all_numbers_of_a_log_line_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, plain = list[int](), torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (reads.append(tensor.numel()), plain(tensor))[1])
    values = [torch.tensor(2.5), 4, None, torch.tensor([7]), torch.tensor(1.0, dtype=torch.bfloat16)]
    assert read_tensors(values) == [2.5, 4, None, 7.0, 1.0]
    assert reads == [3]
    assert read_tensors([3, None]) == [3, None]


def test_a_profile_has_the_kernels_alone(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(key: str, device: DeviceType, microseconds: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key,
            count=2,
            device_type=device,
            is_user_annotation=annotation,
            self_device_time_total=microseconds,
            self_cpu_time_total=1e6,
        )

    rows = [
        row("small kernel", DeviceType.CUDA, 1.0),
        row("aten::mm", DeviceType.CPU, 9.0),
        row("large kernel", DeviceType.CUDA, 8.0),
        row("Optimizer.step", DeviceType.CUDA, 9.0, annotation=True),
    ]

    class Profile:
        """A fake profile with fixed events."""

        def __init__(self, activities: list[Any]) -> None:
            assert torch.profiler.ProfilerActivity.CUDA in activities

        def __enter__(self) -> "Profile":
            return self

        def __exit__(self, *_: object) -> None:
            assert gpu.synchronized == 1  # otherwise the last kernels would be missing

        def key_averages(self) -> list[SimpleNamespace]:
            return rows

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    trainer: Any = SimpleNamespace(ranks=SimpleNamespace(device=GPU), train_step=lambda: None)
    assert [each["name"] for each in trial.trace_step(trainer)] == ["large kernel", "small kernel"]


@pytest.mark.parametrize(
    ("triton", "compiler", "expected"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_the_fused_loss_needs_triton_and_a_compiler(
    triton: bool, compiler: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: "/usr/bin/cc" if compiler and name == "cc" else None)
    kernels._can_compile.cache_clear()
    assert kernels.available(GPU) is expected
    assert not kernels.available(torch.device("cpu"))
    kernels._can_compile.cache_clear()


@pytest.mark.parametrize(
    ("device", "seconds", "said"),
    [
        (
            "cpu",
            61.0,
            ["the first of 8 micro-batches took 61 s: about 81 minutes to the next log line, 68 days to the"],
        ),
        ("cpu", 0.1, []),  # the first log line is 8 s away
        ("cuda", 61.0, []),  # the time of queueing it says nothing
    ],
)
def test_a_run_that_will_be_silent_for_a_minute_says_how_long(
    device: str,
    seconds: float,
    said: list[str],
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    body = {**tiny_recipe, "schedule": {"steps": 12_000}, "logging": {"every_steps": 10, "tensorboard": False}}
    run = RunDirectory(tmp_path / "runs" / "tiny")
    run.path.mkdir(parents=True)
    metrics = Metrics(run, load_recipe(save_recipe(body, tmp_path / "recipe.yaml")), 0)
    with caplog.at_level("INFO", logger="codeparrot_ds"):
        metrics.first_micro_batch(0, 8, seconds, torch.device(device))
        metrics.first_micro_batch(1, 8, seconds, torch.device(device))  # only once
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(said)
    assert all(message.startswith(start) for message, start in zip(messages, said, strict=True))
    metrics.close()
