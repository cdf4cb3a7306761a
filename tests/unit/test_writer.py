"""Copies of saved state, and files written from them."""

from collections import OrderedDict, namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from deepspeed.runtime.model_checkpointing import CHECKPOINT_SERIALIZATION

from codeparrot_ds.system.files import digest_file
from codeparrot_ds.training import writer as module
from codeparrot_ds.training.writer import CheckpointWriter, LockedBuffers, copy_to_host, tensor_bytes

Address = namedtuple("Address", "numel start")


def state() -> dict[str, Any]:
    """State in the form that the engine saves."""
    weight = torch.arange(12.0).reshape(3, 4)
    return {
        "module": OrderedDict(wte=weight, lm_head=weight, part=weight[1:]),
        "moments": [torch.zeros(0), {"step": torch.tensor(3.0), "more": (torch.ones(2), Address(1, 2))}],
        "plain": [1, "a", None, {"x": {1, 2}}],
    }


class Config:
    """The part of the configuration that DeepSpeed's writer reads."""

    checkpoint_config: ClassVar = {CHECKPOINT_SERIALIZATION: True}


def test_a_copy_is_equal_separate_and_of_the_same_types() -> None:
    original = state()
    copied = copy_to_host(original, LockedBuffers())
    assert isinstance(copied["module"], OrderedDict)
    assert isinstance(copied["moments"][1]["more"][1], Address)
    assert copied["plain"] == original["plain"] and copied["plain"][3] is not original["plain"][3]
    assert copied["module"]["wte"] is copied["module"]["lm_head"]  # tied, so saved once
    for changed in (original["module"]["wte"], original["moments"][1]["step"]):
        changed += 1
    assert copied["module"]["wte"].tolist() == torch.arange(12.0).reshape(3, 4).tolist()
    assert copied["module"]["part"].tolist() == torch.arange(4.0, 12.0).reshape(2, 4).tolist()
    assert copied["moments"][1]["step"] == 3
    assert tensor_bytes(state()) == 4 * (12 + 12 + 8 + 1 + 2)


@pytest.mark.parametrize("background", [False, True])
def test_files_contain_the_state_at_the_time_of_saving(tmp_path: Path, background: bool) -> None:
    writer, original = CheckpointWriter(Config()), state()
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    writer.begin(background)
    for path in paths:
        writer.save(original, str(path))
    assert [path.exists() for path in paths] == [not background] * 2
    original["module"]["wte"] += 1
    if background:
        writer.start()
    writer.wait()
    assert not writer.busy
    for path in paths:
        loaded = torch.load(path, weights_only=False)
        assert torch.equal(loaded["module"]["wte"], torch.arange(12.0).reshape(3, 4))
        assert writer.files[path] == {"bytes": path.stat().st_size, "xxh3_128": digest_file(path)}


def test_a_failure_in_the_background_is_raised_by_wait(tmp_path: Path) -> None:
    writer = CheckpointWriter(Config())
    writer.begin(True)
    writer.save(state(), str(tmp_path / "absent" / "a.pt"))
    writer.start()
    with pytest.raises(FileNotFoundError):
        writer.wait()
    writer.begin(True)  # and the next one is not affected
    writer.save(state(), str(tmp_path / "a.pt"))
    writer.start()
    writer.wait()
    assert set(writer.files) == {tmp_path / "a.pt"}


def test_without_memory_for_a_copy_a_file_is_written_immediately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SPARE_MEMORY", 1.0)
    writer = CheckpointWriter(Config())
    writer.begin(True)
    writer.save(state(), str(tmp_path / "a.pt"))
    assert set(writer.files) == {tmp_path / "a.pt"}


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tensors as if on a GPU, all of them large; returns the sizes of the buffers that are locked."""
    sizes: list[int] = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(module, "_MIN_LOCKED_BYTES", 32)
    monkeypatch.setattr(module, "lock_pages", lambda buffer: sizes.append(len(buffer)))
    return sizes


def test_every_checkpoint_is_copied_to_the_memory_locked_for_the_first(tmp_path: Path, locked: list[int]) -> None:
    writer, original = CheckpointWriter(Config()), state()
    for number in range(3):
        original["module"]["wte"][:] = torch.arange(12.0).reshape(3, 4) + number
        writer.begin(True)
        for name in "ab":
            writer.save(original, str(tmp_path / f"{name}{number}.pt"))
        assert writer._buffers.free_bytes == 0
        original["module"]["wte"] += 100
        writer.start()
        writer.wait()
        for name in "ab":
            loaded = torch.load(tmp_path / f"{name}{number}.pt", weights_only=False)
            assert torch.equal(loaded["module"]["wte"], torch.arange(12.0).reshape(3, 4) + number)
            assert loaded["moments"][1]["step"] == 3
    assert locked == [48, 32, 48, 32]  # two files with a matrix and a part of it; the rest is small


def test_memory_that_is_locked_counts_as_room(
    tmp_path: Path, locked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(Config())
    for room, written_at_once in ((1 << 20, False), (100, False), (99, False)):
        monkeypatch.setattr(module, "available_bytes", lambda room=room: room / (1 - module._SPARE_MEMORY))
        writer.begin(True)
        writer.save(state(), str(tmp_path / "a.pt"))
        assert (tmp_path / "a.pt" in writer.files) is written_at_once
        writer.start()
        writer.wait()
    monkeypatch.setattr(module, "available_bytes", lambda: 0)
    writer.begin(True)
    writer.save({"larger": torch.zeros(100)}, str(tmp_path / "a.pt"))
    assert tmp_path / "a.pt" in writer.files


@pytest.mark.parametrize(("status", "launched"), [(0, []), (2, ["cuda"])])
def test_an_error_of_locking_is_not_left_for_the_next_kernel(
    monkeypatch: pytest.MonkeyPatch, status: int, launched: list[str]
) -> None:
    devices = []

    def ones(size: int, device: str) -> None:
        devices.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *arguments: status))
    monkeypatch.setattr(torch, "ones", ones)
    module.lock_pages(torch.empty(8, dtype=torch.uint8))
    assert devices == launched
