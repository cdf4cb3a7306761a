"""Conversion of real checkpoints: verification passes for good results and fails for wrong ones."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.checkpoint.zero import ZeroCheckpoint
from codeparrot_ds.errors import CheckpointError, ConfigError
from codeparrot_ds.evaluation.loss import validation_loss
from codeparrot_ds.export import convert as converting
from codeparrot_ds.export import write as writing
from codeparrot_ds.export.certificate import CERTIFICATE, check
from codeparrot_ds.export.convert import convert
from codeparrot_ds.run.directory import Checkpoint
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.run.sections import Model
from codeparrot_ds.system.files import digest_file
from tests.conftest import ROOT, Trained
from tests.hub_server import TOKEN, Fault, serve
from tests.integration.test_meaning import folded

pytestmark = pytest.mark.slow
GB = 1_000_000_000
Train = Callable[..., Trained]
Copy = Callable[[str], Trained]


def newest(trained: Trained) -> Checkpoint:
    return source_checkpoint(trained.run.path)


@pytest.fixture(scope="module")
def converted(baseline: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "hf"
    convert([newest(baseline)], output, max_shard_bytes=60_000, memory_cap_bytes=8 * GB)
    return output


def test_the_certificate_says_what_transformers_computes(baseline: Trained, converted: Path) -> None:
    certificate = check(converted)
    forward = certificate["forward"]
    assert certificate["attention_scale"] == "folded"
    assert not forward["same_weights"]  # the scale is in them
    assert abs(forward["loss_master"] - forward["loss_written"]) < 1e-6
    assert abs(forward["loss_transformers"] - forward["loss_written"]) < 1e-6
    assert forward["largest_logit_difference"] < 1e-5
    assert forward["same_prediction"] == 1.0
    assert certificate["engine"]["not_compared"] is None
    assert abs(forward["loss_written"] - certificate["engine"]["loss_valid"]) < 1e-4
    assert certificate["engine"]["loss_valid"] == baseline.valid_losses()[6]
    # Streamed layer by layer, the loss equals that of the whole model.
    recipe = load_recipe(baseline.run.recipe)
    whole = validation_loss(converted, recipe.data.sources, recipe.evaluation.sequences)
    assert whole.sequences == forward["sequences"]
    assert abs(whole.loss_valid - forward["loss_written"]) < 1e-5
    card = (converted / "README.md").read_text()
    assert f"{certificate['parameters']:,}" in card


def test_a_result_in_another_type_is_compared_with_the_masters(baseline: Trained, tmp_path: Path) -> None:
    masters = dict(ZeroCheckpoint(newest(baseline)).tensors())
    for dtype in ("bfloat16", "float16"):
        certificate = convert([newest(baseline)], tmp_path / dtype, dtype=dtype, memory_cap_bytes=8 * GB)
        forward = certificate["forward"]
        assert not forward["same_weights"]
        assert 0 < abs(forward["loss_master"] - forward["loss_written"]) < 2e-2
        assert 0 < forward["largest_logit_difference"] < 1
        tensors = load_file(tmp_path / dtype / "model.safetensors")
        assert all(
            torch.equal(tensors[name], folded(name, value).to(getattr(torch, dtype))) for name, value in masters.items()
        )
        assert check(tmp_path / dtype) == certificate


def test_checkpoints_are_averaged(baseline: Trained, tmp_path: Path) -> None:
    found = [Checkpoint.read(path) for path in baseline.run.checkpoint_directories()]
    assert len(found) == 2
    certificate = convert(found, tmp_path / "mean", memory_cap_bytes=8 * GB)
    parts = [dict(ZeroCheckpoint(checkpoint).tensors()) for checkpoint in found]
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    for name in mean:
        assert torch.equal(
            mean[name], folded(name, torch.stack([part[name].double() for part in parts]).mean(0).float())
        )
    assert [source["step"] for source in certificate["source"]] == [checkpoint.step for checkpoint in found]
    assert "mean" in certificate["engine"]["not_compared"]


def test_what_was_changed_later_is_named(converted: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        subprocess.run(["cp", "-r", converted, tmp_path / name], check=True)
        return tmp_path / name

    flipped = copy("flipped")
    file = sorted(flipped.glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{re.escape(file.name)}: its digest differs"):
        check(flipped)

    added = copy("added")
    save_file({"x": torch.ones(1)}, added / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not in the certificate"):
        check(added)

    # The certificate's digests of files were forged, but not those of tensors.
    forged = copy("forged")
    file = sorted(forged.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, file)
    body = json.loads((forged / CERTIFICATE).read_text())
    body["files"][file.name] = digest_file(file)
    (forged / CERTIFICATE).write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match=rf"tensor {re.escape(name)}: the digest of its values differs"):
        check(forged)


def test_a_writer_that_fails_leaves_no_directory(
    baseline: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One element of one tensor is corrupted between checkpoint and file: verification names the tensor."""
    right = writing._bytes
    calls: list[int] = []

    def wrong(tensor: torch.Tensor) -> memoryview:
        calls.append(1)
        if len(calls) == 12:  # the second of each pair is written
            tensor = tensor.clone()
            tensor[0] += 1e-3
        return right(tensor)

    monkeypatch.setattr(writing, "_bytes", wrong)
    with pytest.raises(
        CheckpointError, match=r"verification failed.*tensor transformer\.\S+: the digest of its values differs"
    ):
        convert([newest(baseline)], tmp_path / "hf", memory_cap_bytes=8 * GB)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_computes_something_else_is_refused(
    baseline: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers interprets the tensors differently from the engine."""
    right = converting._reader

    def wrong(weights: Any) -> Any:
        read = right(weights)
        return lambda name, rows=None: read(name, rows) * (2.0 if name.endswith("ln_f.weight") else 1.0)

    monkeypatch.setattr(converting, "_reader", wrong)
    with pytest.raises(CheckpointError, match=r"validation loss is .* the checkpoint's weights give"):
        convert([newest(baseline)], tmp_path / "hf", dtype="bfloat16", memory_cap_bytes=8 * GB)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_what_the_engine_trained_is_refused(
    baseline: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are bit-exact, but the configuration makes transformers compute something else."""
    right = Model.hugging_face_config

    def wrong(self: Model, eos_id: int) -> dict[str, Any]:
        return {**right(self, eos_id), "layer_norm_epsilon": 0.1}

    monkeypatch.setattr(Model, "hugging_face_config", wrong)
    with pytest.raises(CheckpointError, match=r"validation loss is \d\.\d+, but the engine measured \d\.\d+"):
        convert([newest(baseline)], tmp_path / "hf", memory_cap_bytes=8 * GB)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_are_refused(
    baseline: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ZeroCheckpoint.read

    def with_one(value: float) -> Callable[..., torch.Tensor]:
        def changed(self: ZeroCheckpoint, name: str, *args: Any, **options: Any) -> torch.Tensor:
            found = read(self, name, *args, **options).clone()
            if name.endswith("h.1.mlp.c_fc.bias"):
                found[3] = value
            return found

        return changed

    for value, dtype, said in (
        (1e6, "float16", r"beyond the range of float16"),
        (float("nan"), "float32", "non-finite"),
    ):
        monkeypatch.setattr(ZeroCheckpoint, "read", with_one(value))
        with pytest.raises(CheckpointError, match=rf"h\.1\.mlp\.c_fc\.bias.*{said}"):
            convert([newest(baseline)], tmp_path / "hf", dtype=dtype, memory_cap_bytes=8 * GB)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_checkpoint_is_refused_by_name(copy_baseline: Copy, tmp_path: Path, damage: str) -> None:
    checkpoint = newest(copy_baseline(damage))
    file = sorted(checkpoint.path.glob("*_optim_states.pt"))[1]
    if damage == "changed":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=re.escape(file.name)):
        convert([checkpoint], tmp_path / "hf", memory_cap_bytes=8 * GB)
    assert not (tmp_path / "hf").exists()


def test_a_memory_cap_that_is_too_low_is_refused_with_the_amount_needed(baseline: Trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--memory-cap 0.05GB: this model needs \d.\d\d GB"):
        convert([newest(baseline)], tmp_path / "hf", memory_cap_bytes=50_000_000)


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.nightly)])
def test_killed_at_any_moment_the_next_call_produces_the_same(
    baseline: Trained, converted: Path, tmp_path: Path, kills: int
) -> None:
    output = tmp_path / "hf"
    command = [
        *(sys.executable, "-m", "codeparrot_ds.cli", "convert", str(baseline.run.path), str(output)),
        *("--max-shard-size", "60kB"),
    ]
    begun = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    seconds = time.monotonic() - begun
    assert 0 < check(output)["peak_memory_bytes"] < 1.5 * GB  # the default cap
    whole = {file.name: file.read_bytes() for file in output.iterdir() if file.name != CERTIFICATE}
    assert whole == {file.name: file.read_bytes() for file in converted.iterdir() if file.name != CERTIFICATE}
    for number in range(kills):
        subprocess.run(["rm", "-r", output], check=True)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds * (0.55 + 0.45 * (number + 0.5) / kills))  # imports take the time before that
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            check(output)
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert whole == {file.name: file.read_bytes() for file in output.iterdir() if file.name != CERTIFICATE}
        assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_checkpoints_are_exported_and_pushed_during_training(train_tiny: Train) -> None:
    with serve() as hub:
        hub.faults = [Fault("PUT", "/store/", 1, 503)]
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        options = ["export.every_steps=3", "export.hub=me/parrot", "export.keep_last=1", "checkpoints.keep_last=1"]
        trained = train_tiny("exporting", stage=1, options=options, env=environment)
    said = trained.run.log(0).read_text()
    assert TOKEN not in said
    exported = sorted(path.name for path in trained.run.exports.iterdir())
    # The first may still be running when the second is due.
    if "not exported, because the previous export is still running" in said:
        assert exported == ["step-00000003"]
    else:
        assert exported == ["step-00000006"]
    certificate = check(trained.run.exports / exported[0])
    assert certificate["dtype"] == "bfloat16"
    assert f"pushed to me/parrot, branch {trained.run.path.name}" in said
    branches = hub.repositories["models/me/parrot"].branches
    newest = {file.name: file.read_bytes() for file in (trained.run.exports / exported[0]).iterdir()}
    assert branches == {"main": {}, "exporting": newest}


def test_an_export_that_fails_is_reported_and_training_continues(train_tiny: Train) -> None:
    with serve() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_" + "Wr0ng" * 6, "HF_HUB_OFFLINE": "0"}
        options = ["export.every_steps=3", "export.hub=me/parrot"]
        trained = train_tiny("refused", stage=1, options=options, env=environment)
    assert trained.run.read_status()["state"] == "finished"
    said = trained.run.log(0).read_text()
    assert "step 3: not pushed. Training continues. error: me/parrot: the Hub denies access (401)" in said
    assert environment["HF_TOKEN"] not in said
    check(trained.run.export(3))
