"""Plans without running a step: arithmetic, recommendations, rejections, and the text shown to users."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codeparrot_ds.cli.output import parse_bandwidth
from codeparrot_ds.errors import ClusterError, ConfigError
from codeparrot_ds.planning.footprint import footprint
from codeparrot_ds.planning.layout import Layout
from codeparrot_ds.planning.machine import MachineSpec, find_machine
from codeparrot_ds.planning.plan import Plan, changes, make_plan, require_fit
from codeparrot_ds.planning.scaling import update_bytes
from codeparrot_ds.planning.tune import Trial, candidates, says_out_of_memory, tune, winner
from codeparrot_ds.run.ds_config import load_ds_config, resolve
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.system.gpus import local_gpus
from tests.conftest import ROOT

XL = ROOT / "launch" / "recipes" / "codeparrot-xl.yaml"


def layout(stage: int, world_size: int = 1, *overrides: str) -> Layout:
    """Of codeparrot-xl."""
    recipe = load_recipe(XL, [f"engine.deepspeed={ROOT}/ds_configs/zero{stage}.json", *overrides])
    return Layout.of(recipe, resolve(load_ds_config(recipe.engine.deepspeed), recipe, world_size))


def plan(memory: float, gpus: int = 1, *overrides: str, **machine: Any) -> Plan:
    """A plan of codeparrot-xl on GPUs with `gigabytes` GB."""
    chosen = any(override.startswith("engine.deepspeed=") for override in overrides)
    stage_3 = [] if chosen else [f"engine.deepspeed={ROOT}/ds_configs/zero3.json"]
    recipe = load_recipe(XL, [*stage_3, *overrides])
    return make_plan(recipe, find_machine(recipe, MachineSpec(gpus, gpu_memory_bytes=int(memory * 1e9), **machine)))


def test_states_are_those_of_the_zero_paper_and_of_deepspeed_beside() -> None:
    """ZeRO (Rajbhandari et al., 2020), section 3.1: 2 bytes per parameter for weights, 12 for AdamW in mixed precision.
    DeepSpeed keeps gradients in fp32, unpartitioned at stage 1."""
    parameters = layout(1).model.parameters
    for ranks in (1, 16):
        bytes_each = {
            stage: sum(footprint(layout(stage, ranks)).between_steps.values()) / parameters for stage in (1, 2, 3)
        }
        buckets = 2 * 5e7 / parameters
        assert bytes_each[1] == pytest.approx(2 + 4 + 12 / ranks, rel=1e-3)
        assert bytes_each[2] == pytest.approx(2 + 12 / ranks, rel=1e-3)
        assert bytes_each[3] == pytest.approx((2 + 4 + 12) / ranks + buckets, rel=3e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_step_frees_all_that_it_allocates(stage: int, precision: str) -> None:
    for recompute in ("none", "selective", "full"):
        for ranks, accumulation in ((1, 1), (1, 4), (4, 1), (4, 2)):
            sizes = (f"batch.global_batch_size={ranks * accumulation * 2}", "batch.micro_batch_size=2")
            settings = (f"engine.precision={precision}", f"model.activation_checkpointing={recompute}", *sizes)
            one = layout(stage, ranks, *settings)
            for on_cpu in (False, True):
                found = footprint(replace(one, on_cpu=on_cpu))  # which asserts it
                assert found.peak_bytes == max(found.phases.values()) > sum(found.between_steps.values())


def test_recomputing_saves_activations_and_a_larger_micro_batch_takes_them() -> None:
    def peak(recompute: str, micro: int) -> int:
        settings = (f"model.activation_checkpointing={recompute}", f"batch.micro_batch_size={micro}")
        return footprint(layout(2, 8, *settings)).peak_bytes

    for micro in (4, 8):
        assert peak("none", micro) > peak("selective", micro) > peak("full", micro)
    # 16 numbers of 2 bytes per token and unit of width, in each of 48 blocks.
    assert peak("none", 8) - peak("none", 4) == pytest.approx(48 * 16 * 2 * 4 * 1024 * 1600, rel=0.05)


def test_compiled_blocks_keep_queries_of_their_own_where_layers_have_their_own_scale() -> None:
    def peak(compiled: bool, by_layer: bool) -> int:
        settings = (f"engine.compile={compiled}", f"model.scale_attn_by_inverse_layer_idx={by_layer}")
        sizes = ("batch.global_batch_size=16", "batch.micro_batch_size=16", "model.activation_checkpointing=none")
        return footprint(layout(1, 1, *settings, *sizes)).peak_bytes

    assert peak(True, True) - peak(False, True) == 48 * 16 * 1024 * 1600 * 2
    assert peak(True, False) == peak(False, False) == peak(False, True)


# torch.cuda.max_memory_allocated in bytes, from `benchmarks/gpu.py` on an H200 with torch 2.11.
MEASURED = [
    (1, 8, 4, "none", False, 48_605_472_768),
    (1, 8, 4, "none", True, 49_863_788_544),
    (1, 16, 4, "none", False, 68_862_781_440),
    (1, 16, 4, "none", True, 71_379_388_416),
    (1, 16, 4, "selective", False, 49_943_821_312),
    (1, 16, 4, "full", False, 31_295_462_912),
    (1, 16, 4, "full", True, 31_327_436_288),
    (1, 16, 1, "none", False, 68_863_439_360),
    (3, 16, 4, "none", False, 68_962_777_600),
    (3, 16, 4, "full", False, 31_728_608_768),
]


@pytest.mark.parametrize(("stage", "micro", "accumulation", "recompute", "compiled", "measured"), MEASURED)
def test_peaks_are_those_of_a_gpu(
    stage: int, micro: int, accumulation: int, recompute: str, compiled: bool, measured: int
) -> None:
    sizes = (f"batch.global_batch_size={micro * accumulation}", f"batch.micro_batch_size={micro}")
    settings = (f"model.activation_checkpointing={recompute}", f"engine.compile={compiled}")
    assert footprint(layout(stage, 1, *sizes, *settings)).peak_bytes == pytest.approx(measured, rel=0.005)


def test_what_fits_is_advised_by_speed_and_never_what_does_not() -> None:
    made = plan(80, gpus=8)
    advised = made.advised
    assert advised is not None and advised.fits
    assert (advised.layout.stage, advised.choice.recompute) == (1, "none")
    assert advised.choice.micro_batch_size >= 8
    assert all(
        each.time.no_overlap_seconds >= advised.time.no_overlap_seconds * 0.995 for each in made.others if each.fits
    )
    small = plan(12, gpus=8).advised
    assert small is not None and small.memory.peak_bytes <= 12e9


def test_a_refusal_names_the_smallest_change() -> None:
    made = plan(80, 1, "model.activation_checkpointing=none", "batch.micro_batch_size=32")
    with pytest.raises(
        ConfigError, match=r"does not fit: a GPU needs 1\d\d\.\d+ GB at the peak \(in the forward .*\) but has 80.00 GB"
    ) as found:
        require_fit(made)
    change = made.smallest_change
    assert change is not None and change.fits
    (only,) = changes(made.own.choice, change.choice)
    assert f"--set {only} " in str(found.value)
    require_fit(plan(80, 1))


def test_if_nothing_fits_the_least_memory_and_the_gpus_needed_are_named() -> None:
    with pytest.raises(ConfigError, match=r"No other ZeRO stage.* the smallest needs \d\.\d+ GB") as found:
        require_fit(plan(2.5, 1))
    assert "It would fit on" not in str(found.value)
    alone = ROOT / "ds_configs" / "zero3.json"
    made = plan(20, 1, "batch.micro_batch_size=1")
    only_own = Plan(made.recipe, made.machine, made.own, [])
    assert made.own.choice.deepspeed == alone
    with pytest.raises(ConfigError, match=r"It would fit on 2 of these GPUs"):
        require_fit(only_own)


def test_offload_moves_states_to_the_host_and_is_advised_only_where_nothing_else_fits() -> None:
    made = plan(20, 1)
    assert made.advised is not None and made.advised.offloads
    parameters = made.recipe.model.parameters
    # Weights, optimizer, accumulated gradients and those the optimizer reads: 2 + 12 + 4 + 4 bytes.
    assert made.advised.host_bytes["offloaded"] == pytest.approx(22 * parameters, rel=1e-3)
    assert not plan(80, 1).advised.offloads  # type: ignore[union-attr]
    short = plan(20, 1, host_memory_bytes=int(30e9))
    assert any("a host needs" in problem for each in short.others for problem in each.too_large)
    assert short.advised is None or not short.advised.offloads


def test_time_and_cost_follow_mfu_and_price() -> None:
    one, other = plan(80, 8, mfu=0.4, price_per_hour=2.0), plan(80, 8, mfu=0.2, price_per_hour=2.0)
    layout = one.own.layout
    updated = update_bytes(one.recipe.model, layout.stage, layout.accumulation, 8) / 3.35e12  # seconds, at any MFU
    assert other.own.time.compute_seconds - updated == pytest.approx(2 * (one.own.time.compute_seconds - updated))
    # 6 FLOPs per parameter and token, a third more for recomputation, and attention.
    least = 6 * one.recipe.model.parameters * one.tokens * 4 / 3 / (0.4 * 989e12 * 8) / 3600
    assert least < one.hours(one.own)[0] < 1.3 * least
    assert one.to_dict()["cost"][1] == pytest.approx(one.hours(one.own)[1] * 8 * 2.0)


def test_the_update_costs_more_the_smaller_the_micro_batch() -> None:
    model = load_recipe(XL).model
    assert update_bytes(model, 1, 1, 1) == 48 * model.parameters  # as counted in tests/integration/test_step.py
    assert update_bytes(model, 1, 4, 1) == 78 * model.parameters
    assert update_bytes(model, 1, 4, 8) == (40 + 38 / 8) * model.parameters
    assert update_bytes(model, 3, 4, 8) < update_bytes(model, 1, 4, 8)
    made = plan(140, 1)
    small, large = (
        next(
            each.time.compute_seconds
            for each in made.others
            if (each.layout.stage, each.choice.recompute, each.choice.micro_batch_size) == (1, "none", size)
        )
        for size in (8, 16)
    )
    # 64 micro-batches of 8, or 32 of 16: 10 bytes per parameter half as often.
    assert small - large == pytest.approx(32 * 10 * model.parameters / 3.35e12)


def test_missing_hardware_options_are_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codeparrot_ds.planning.machine.local_gpus", list)
    recipe = load_recipe(XL)
    with pytest.raises(ConfigError, match="--gpus 16 --gpu-memory 80GB"):
        find_machine(recipe)
    with pytest.raises(ConfigError, match=r"logging\.peak_tflops"):
        find_machine(recipe, MachineSpec(8, gpu="Unheard Of 3000", gpu_memory_bytes=10**10))
    with pytest.raises(ConfigError, match="cannot be divided evenly among 7 ranks"):
        make_plan(recipe, find_machine(recipe, MachineSpec(7, gpu_memory_bytes=10**10)))


def test_gpus_of_this_machine_are_read_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nprintf 'NVIDIA H100 80GB HBM3, 81559\\nNVIDIA H100 80GB HBM3, 81559\\n'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    local_gpus.cache_clear()
    assert local_gpus() == [("NVIDIA H100 80GB HBM3", 81559 << 20)] * 2
    machine = find_machine(load_recipe(XL))
    assert machine.cluster.gpus == 2 and machine.cluster.gpu_flops == 989e12
    assert 79e9 < machine.gpu_memory_bytes < 80e9
    for visible, count in (("1", 1), ("", 0), ("GPU-6c3f,GPU-71aa", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        local_gpus.cache_clear()
        assert len(local_gpus()) == count
    local_gpus.cache_clear()


def test_hosts_need_not_be_alike(tmp_path: Path) -> None:
    recipe = load_recipe(XL, ["batch.global_batch_size=480"])
    machine = find_machine(recipe, MachineSpec(12, gpu_memory_bytes=80 * 10**9, gpus_per_host=8, hosts=3))
    made = make_plan(recipe, machine)
    assert machine.cluster.hosts == 3
    assert (
        made.own.host_bytes["processes"]
        == make_plan(recipe, replace(machine, cluster=replace(machine.cluster, gpus=8))).own.host_bytes["processes"]
    )


def test_a_deepspeed_json_that_does_not_suit_the_recipe_is_skipped(tmp_path: Path) -> None:
    for stage in (2, 3):
        body = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
        (tmp_path / f"zero{stage}.json").write_text(
            json.dumps(body | ({"gradient_clipping": 0.5} if stage == 2 else {}))
        )
    recipe = load_recipe(XL, [f"engine.deepspeed={tmp_path}/zero3.json"])
    made = make_plan(recipe, find_machine(recipe, MachineSpec(8, gpu_memory_bytes=80 * 10**9)))
    assert made.own.fits and {each.layout.stage for each in made.others} == {3}


@pytest.mark.parametrize(("stage", "section"), [(1, "offload_optimizer"), (2, "offload_optimizer")])
def test_what_has_no_estimate_is_refused(stage: int, section: str, tmp_path: Path) -> None:
    body = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    body["zero_optimization"][section] = {"device": "cpu"}
    (tmp_path / "offload.json").write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="at ZeRO-3 only"):
        plan(80, 8, f"engine.deepspeed={tmp_path}/offload.json")
    with pytest.raises(ConfigError, match="fp32 is not known"):
        plan(80, 8, "engine.precision=fp32")
    with pytest.raises(ConfigError, match="--mfu 0"):
        plan(80, 8, mfu=0.0)


def test_a_trial_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(recipe: Path, overrides: Any, choice: Any, *others: Any) -> dict[str, Any]:
        if choice.deepspeed.stem == "zero1":
            raise ClusterError("a trial failed with exit code 1:\nno such kernel")
        return result(1.0)

    monkeypatch.setattr("codeparrot_ds.planning.tune.run_trial", trial)
    done = list(tune(plan(80, 8), XL, [], steps=3, most=9))
    assert [each.failure.endswith("no such kernel") for each in done].count(True) == 3
    assert winner(done).result is not None
    with pytest.raises(ClusterError, match="no such kernel"):
        winner([each for each in done if each.failure])


@pytest.mark.parametrize(
    "text",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory",
        "ncclUnhandledCudaError: Failed to CUDA malloc, out of memory",
    ],
)
def test_running_out_of_memory_is_distinguished_from_other_failures(text: str) -> None:
    assert says_out_of_memory(text)
    assert not says_out_of_memory("RuntimeError: expected scalar type BFloat16 but found Float")


def test_bandwidths_are_bits_per_second() -> None:
    assert parse_bandwidth("200Gb") == 25e9
    assert parse_bandwidth("800 Mbit/s") == 1e8
    for wrong in ("200GB", "0Gb", "fast"):
        with pytest.raises(ConfigError, match="200Gb"):
            parse_bandwidth(wrong)


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `codeparrot-ds plan`."""
    return subprocess.run(
        [sys.executable, "-m", "codeparrot_ds.cli", "plan", *map(str, arguments)],
        cwd=ROOT,
        env={**{key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_memory_time_cost_disk_and_advice(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\nb slots=8\n")
    done = run("launch/recipes/codeparrot-xl.yaml", "--hostfile", hosts, "--gpu-memory", "80GB", "--price", "2")
    assert done.returncode == 0, done.stderr
    for text in (
        "16 x H100 with 80.00 GB",
        "1,529.6 M",
        "2 hosts",
        "checkpoints of 18.36 GB",
        "GPU-hours",
        "cost",
        "advice --set",
    ):
        assert text in done.stdout, text
    found = json.loads(run(XL, "--gpus", "16", "--gpu-memory", "80GB", "--json").stdout)
    assert found["recipe"]["fits"] and len(found["all"]) > 50
    assert sum(found["recipe"]["at_peak"].values()) == found["recipe"]["peak_bytes"]
    refused = run(XL, "--gpus", "1", "--gpu-memory", "16GB")
    assert refused.returncode == 1 and "does not fit" in refused.stderr and "Traceback" not in refused.stderr
    cpu = run("launch/recipes/quickstart.yaml", DS_ACCELERATOR="cpu")
    assert cpu.returncode == 0 and "2 x CPU ranks" in cpu.stdout and "GPU" not in cpu.stdout.replace("GPU-", "")


def test_planning_needs_no_torch() -> None:
    modules = "codeparrot_ds.planning.plan, codeparrot_ds.planning.tune, codeparrot_ds.report.plan, sys"
    code = f"import {modules}\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def result(seconds: float) -> dict[str, Any]:
    """Result of a trial with a slow first step."""
    return {"step_seconds": [100.0, seconds, seconds], "tokens_per_step": 1000, "peak_bytes": 1}


def test_tune_tries_the_largest_first_and_smaller_ones_while_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(80, 8)
    order = candidates(made)
    assert all(each.fits and not each.offloads for each in order)
    seen: list[tuple[str, str, int]] = []

    def trial(recipe: Path, overrides: Any, choice: Any, ranks: int, steps: int, on_cpu: bool) -> dict[str, Any] | None:
        seen.append((choice.deepspeed.stem, choice.recompute, choice.micro_batch_size))
        largest = len({way[:2] for way in seen}) == len(seen)  # the first of its layout
        return None if choice.recompute == "none" and largest else result(1.0 + 1.0 / choice.micro_batch_size)

    monkeypatch.setattr("codeparrot_ds.planning.tune.run_trial", trial)
    done = list(tune(made, XL, [], steps=3, most=200))
    ways = {(deepspeed, recompute) for deepspeed, recompute, _ in seen}
    assert len(ways) == 9  # three stages, three recomputations
    for way in ways:
        sizes = [size for deepspeed, recompute, size in seen if (deepspeed, recompute) == way]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == (
            3 if way[1] == "none" else 2
        )  # one slower trial is enough; running out of memory does not count as slow
    assert winner(done).tokens_per_second == pytest.approx(1000 / (1 + 1 / 64))
    assert len(list(tune(made, XL, [], steps=3, most=4))) == 4
    with pytest.raises(ClusterError, match="no trial fit in memory"):
        winner([Trial(order[0], None)])
