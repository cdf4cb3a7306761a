"""Memory estimates of `plan` compared with real steps on CPU ranks; `plan --measure` and `tune` as users run them."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from codeparrot_ds.planning.machine import MachineSpec, find_machine
from codeparrot_ds.planning.plan import Plan, make_plan
from codeparrot_ds.run.recipe import load_recipe
from tests.conftest import LAUNCH_TIMEOUT, ROOT, RunRanks, save_recipe

pytestmark = pytest.mark.slow

PROBE = Path(__file__).with_name("probe_plan.py")
TINY_BYTES = 64_000  # token ids of a step and scalars, not part of a plan


@dataclass(frozen=True)
class Case:
    """Model shape and layout of a case. `zero`: keys of DeepSpeed's section that differ from ds_configs/."""

    name: str
    stage: int
    precision: str = "bf16"
    recompute: str = "none"
    ranks: int = 2
    micro_batch: int = 4
    accumulation: int = 2
    chunk: int = 4096
    vocab_size: int = 2048
    seq_len: int = 128
    n_layer: int = 4
    n_embd: int = 256
    zero: tuple[tuple[str, float], ...] = (("reduce_bucket_size", 1e6),)

    def write(self, directory: Path) -> Path:
        """The recipe of this case."""
        config = json.loads((ROOT / "ds_configs" / f"zero{self.stage or 1}.json").read_text())
        config["zero_optimization"] = {"stage": 0} if self.stage == 0 else config["zero_optimization"] | dict(self.zero)
        (directory / f"{self.name}.json").write_text(json.dumps(config))
        body = {
            "name": self.name,
            "runs": str(directory / "runs"),
            "model": {
                "vocab_size": self.vocab_size,
                "seq_len": self.seq_len,
                "n_layer": self.n_layer,
                "n_head": 4,
                "n_embd": self.n_embd,
                "activation_checkpointing": self.recompute,
            },
            "data": {"shards": "none"},
            "batch": {
                "global_batch_size": self.ranks * self.micro_batch * self.accumulation,
                "micro_batch_size": self.micro_batch,
            },
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"steps": 10},
            "engine": {
                "deepspeed": str(directory / f"{self.name}.json"),
                "precision": self.precision,
                "loss_chunk_tokens": self.chunk,
            },
        }
        return save_recipe(body, directory / f"{self.name}.yaml")


SMALL_BUCKETS = (("reduce_bucket_size", 1e6), ("stage3_prefetch_bucket_size", 5e5))
CASES = [
    Case("whole-fp32", 0, "fp32", chunk=256),
    Case("zero1", 1, chunk=200),
    Case("zero1-fp32", 1, "fp32"),
    Case("zero1-fp16", 1, "fp16", micro_batch=2, accumulation=3),
    Case("zero2", 2, micro_batch=8),
    Case("zero2-selective-large-vocabulary", 2, recompute="selective", vocab_size=8192, accumulation=1),
    Case("zero2-fp32-full", 2, "fp32", "full"),
    Case("zero3-full-alone", 3, recompute="full", ranks=1, micro_batch=8),
    Case(
        "zero3-short-of-room",
        3,
        n_layer=6,
        zero=(*SMALL_BUCKETS, ("stage3_param_persistence_threshold", 5e3), ("stage3_max_live_parameters", 2e6),
              ("stage3_max_reuse_distance", 2e6)),
    ),
    Case("zero3-fp32-selective", 3, "fp32", "selective", seq_len=256, accumulation=1),
]  # fmt: skip


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory, forked: RunRanks) -> dict[str, dict[str, Any]]:
    """Measured memory of each case, from three real steps."""
    directory = tmp_path_factory.mktemp("plan")
    found = {}
    for case in CASES:
        output = directory / f"{case.name}.result"
        done = forked(PROBE, case.write(directory), output, ranks=case.ranks)
        assert done.returncode == 0, done.output
        found[case.name] = json.loads(output.read_text())
    return found


def plan_of(case: Case, directory: Path, memory: int | None = None) -> Plan:
    """A machine with the case's number of CPU ranks, each with `memory` bytes."""
    recipe = load_recipe(case.write(directory))
    return make_plan(recipe, find_machine(recipe, MachineSpec(case.ranks, gpu_memory_bytes=memory, on_cpu=True)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_states_and_buffers_are_exact_and_the_peak_is_within_5_percent(
    case: Case, trials: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    measured, predicted = trials[case.name], plan_of(case, tmp_path).own.memory
    assert abs(measured["between_steps_bytes"] - sum(predicted.between_steps.values())) < TINY_BYTES
    assert predicted.peak_bytes == pytest.approx(measured["peak_bytes"], rel=0.05)
    assert measured["first_peak_bytes"] <= 1.05 * predicted.peak_bytes  # the first step and construction need no more


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_phase_of_a_step_peaks_as_estimated(case: Case, trials: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Check each phase: errors in a phase that is never the peak would not show otherwise."""
    estimated = plan_of(case, tmp_path).own.memory.phases
    for phase, measured in {"optimizer": "step", "forward": "forward", "backward": "backward"}.items():
        most = max(count for name, count in estimated.items() if name.startswith(phase))
        assert most == pytest.approx(trials[case.name]["phases"][measured], rel=0.06), phase


def test_what_fits_is_distinguished_from_what_does_not(trials: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    for case in CASES:
        for limit in (0.5, 0.95, 1.05, 2.0):
            peak = trials[case.name]["peak_bytes"]
            assert plan_of(case, tmp_path, int(limit * peak)).own.fits == (peak <= limit * peak), (case, limit)


def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `codeparrot-ds` on two CPU ranks."""
    done = subprocess.run(
        [sys.executable, "-m", "codeparrot_ds.cli", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LAUNCH_TIMEOUT,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_the_change_that_a_refusal_names_does_fit_when_it_is_tried(tmp_path: Path) -> None:
    recipe = replace(CASES[1], name="refused", micro_batch=8).write(tmp_path)
    peak = json.loads(run("plan", recipe, "--gpu-memory", "10GB", "--json").stdout)["recipe"]["peak_bytes"]
    limit = int(0.8 * peak)
    refused = run("plan", recipe, "--gpu-memory", str(limit), code=1)
    assert "does not fit" in refused.stderr and refused.stderr.count("error: ") == 1
    changes = [part for part in refused.stderr.split() if "=" in part]
    assert len(changes) == 1
    overrides = ["--set", changes[0], "--gpu-memory", str(limit)]
    accepted = json.loads(run("plan", recipe, "--measure", "--json", *overrides).stdout)
    assert accepted["measured"]["peak_bytes"] <= limit
    assert accepted["recipe"]["peak_bytes"] == pytest.approx(accepted["measured"]["peak_bytes"], rel=0.05)


@pytest.mark.nightly
def test_tune_times_what_fits_and_writes_the_fastest(tmp_path: Path) -> None:
    recipe = replace(CASES[1], name="slow", n_layer=2, recompute="full", micro_batch=1, accumulation=4).write(tmp_path)
    tuned = json.loads(run("tune", recipe, "--trials", 2, "--steps", 3, "--json").stdout)
    assert len(tuned["trials"]) == 2
    for trial in tuned["trials"]:
        assert trial["peak_bytes"] == pytest.approx(trial["measured"]["peak_bytes"], rel=0.05)
    written = Path(tuned["recipe"])
    assert written == tmp_path / "slow-tuned.yaml"
    fastest, loaded = tuned["fastest"], load_recipe(written)
    assert (loaded.model.activation_checkpointing, loaded.batch.micro_batch_size) == (
        fastest["activation_checkpointing"],
        fastest["micro_batch_size"],
    )
    before = yaml.safe_load(recipe.read_text())
    assert yaml.safe_load(written.read_text(encoding="utf-8"))["optimizer"] == before["optimizer"]
    assert loaded.batch.global_batch_size == before["batch"]["global_batch_size"]
