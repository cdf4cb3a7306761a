"""Hosts without a shared disk: each stores what its ranks write on its own disk (conftest.py sets up the hosts)."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from codeparrot_ds.errors import EXIT_USER_ERROR
from codeparrot_ds.export.certificate import read_certificate
from codeparrot_ds.export.convert import convert
from codeparrot_ds.run.directory import Checkpoint, RunDirectory
from codeparrot_ds.run.metrics import read_metrics
from codeparrot_ds.run.recipe import Recipe
from tests.conftest import ROOT, Launched, Trained, save_recipe
from tests.multinode.conftest import RealHosts, run_deepspeed, user_environment

pytestmark = pytest.mark.slow

PROGRAM = Path(sys.executable).with_name("codeparrot-ds")


def files_on(real_hosts: RealHosts, host: int, directory: Path) -> set[str]:
    """Return the names of the files below `directory` that a host sees."""
    found = real_hosts.run(["find", directory, "-type", "f", "-printf", "%P\n"], timeout=10, host=host)
    assert found.returncode == 0, found.output
    return set(found.output.split())


def on(real_hosts: RealHosts, host: int, *command: str | Path) -> None:
    """Run a command on one host."""
    done = real_hosts.run(command, timeout=10, host=host)
    assert done.returncode == 0, done.output


@pytest.fixture
def runs(real_hosts: RealHosts, tiny_recipe: dict[str, Any]) -> Path:
    """The directory of runs, private to the second host."""
    directory = Path(tiny_recipe["runs"])
    directory.mkdir()
    on(real_hosts, 1, "mount", "-t", "tmpfs", "tmpfs", directory)
    return directory


def call(real_hosts: RealHosts, directory: Path, *command: str | Path) -> Launched:
    """Run `codeparrot-ds` on the first host."""
    environment = user_environment(directory)
    return real_hosts.run([PROGRAM, *command], timeout=240, env=environment, cwd=ROOT)


def test_a_disk_that_should_be_shared_but_is_not_is_refused_before_training(
    real_hosts: RealHosts, tiny_recipe: dict[str, Any], runs: Path, tmp_path: Path
) -> None:
    """A shared disk that one host has not mounted: the files of its ranks would be lost."""
    launched = run_deepspeed(real_hosts, save_recipe(tiny_recipe, tmp_path / "tiny.yaml"), tmp_path)
    assert launched.returncode != 0
    assert f"host {real_hosts.hosts[1]}: {runs / 'tiny'}: not the same directory as on rank 0's host" in (
        launched.output
    )
    assert "checkpoints.shared_disk=false" in launched.output and "Traceback" not in launched.output
    assert not any((runs / "tiny" / "checkpoints").glob("*"))


def test_two_hosts_train_resume_and_convert_with_a_disk_each(
    real_hosts: RealHosts, tiny_recipe: dict[str, Any], runs: Path, baseline: Trained, tmp_path: Path
) -> None:
    """In any host order, at another ZeRO stage, and after a crash between the publishing of the two hosts."""
    tiny_recipe["checkpoints"]["shared_disk"] = False
    recipe, run = save_recipe(tiny_recipe, tmp_path / "tiny.yaml"), RunDirectory(runs / "tiny")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in real_hosts.hosts[:2]))
    launched = call(real_hosts, tmp_path, "launch", recipe, "--hostfile", hostfile)
    assert launched.returncode == 0, launched.output
    assert "own disk" in launched.output  # says the doctor
    trained = Trained(run, read_metrics(run.metrics))
    assert trained.losses() == baseline.losses()

    last = run.newest_checkpoint()
    of_rank = {rank: {name for name in last.files if f"_rank_{rank}_" in name} for rank in (0, 1)}
    assert files_on(real_hosts, 0, last.path) == of_rank[0] | {"manifest.json"}
    assert files_on(real_hosts, 1, last.path) == of_rank[1] | {"manifest.json"}

    # Rank 0 is now where rank 1 was, and its files are on the other host, which lost power while publishing.
    resumed_at = run.checkpoint(3)
    for host in (0, 1):
        on(real_hosts, host, "rm", "-r", last.path)
    on(real_hosts, 1, "mv", resumed_at, run.unfinished(3))
    again = run_deepspeed(real_hosts, recipe, tmp_path, hosts=(1, 0))
    assert again.returncode == 0, again.output
    assert f"resuming from {resumed_at}" in again.output
    rows = real_hosts.run(["cat", run.metrics], timeout=10, host=1).output.splitlines()
    resumed = Trained(run, [json.loads(line) for line in rows])
    assert resumed.losses() == baseline.losses()[3:]
    assert resumed.valid_losses() == {6: baseline.valid_losses()[6]}
    assert files_on(real_hosts, 0, last.path) == of_rank[1] | {"manifest.json"}

    # Another ZeRO stage reads all old partitions: every host gets all files, and a damaged copy is replaced by the
    # intact one of the other host.
    for host in (0, 1):
        on(real_hosts, host, "rm", "-r", last.path)
    assert files_on(real_hosts, 0, resumed_at) == files_on(real_hosts, 1, resumed_at)
    damaged = resumed_at / sorted(of_rank[0])[0]
    damaged.write_bytes(bytes(damaged.stat().st_size))
    stage_1 = f"engine.deepspeed={ROOT / 'ds_configs' / 'zero1.json'}"
    other = run_deepspeed(real_hosts, recipe, tmp_path, stage_1)
    assert other.returncode == 0, other.output
    assert "saved with zero stage 3, now 1" in other.output
    Checkpoint.read(resumed_at).verify()
    losses = [float.fromhex(loss) for loss in Trained(run, read_metrics(run.metrics)).losses()]
    assert losses == pytest.approx([float.fromhex(loss) for loss in baseline.losses()], rel=1e-5)

    # Conversion fetches files from other hosts only with --hostfile.
    refused = call(real_hosts, tmp_path, "convert", run.path, tmp_path / "hf")
    assert refused.returncode == EXIT_USER_ERROR
    assert f"is missing (written by {real_hosts.hosts[1]})" in refused.output and "--hostfile" in refused.output
    converted = call(real_hosts, tmp_path, "convert", run.path, tmp_path / "hf", "--hostfile", hostfile)
    assert converted.returncode == 0, converted.output
    ours = read_certificate(tmp_path / "hf")
    assert ours["engine"]["not_compared"] is None
    shutil.rmtree(tmp_path / "hf")
    its = convert([run.newest_checkpoint()], tmp_path / "hf", memory_cap_bytes=8_000_000_000)
    assert ours["tensors"] == its["tensors"]


@pytest.mark.nightly
def test_files_lost_with_a_host_are_named(
    real_hosts: RealHosts, tiny_recipe: dict[str, Any], runs: Path, tmp_path: Path
) -> None:
    tiny_recipe["checkpoints"]["shared_disk"] = False
    recipe, run = save_recipe(tiny_recipe, tmp_path / "tiny.yaml"), RunDirectory(runs / "tiny")
    on(real_hosts, 2, "mount", "-t", "tmpfs", "tmpfs", runs)
    launched = run_deepspeed(real_hosts, recipe, tmp_path, "schedule.steps=3", slots=2)
    assert launched.returncode == 0, launched.output
    directory = files_on(real_hosts, 0, run.checkpoint(3))
    without = run_deepspeed(real_hosts, recipe, tmp_path, hosts=(0, 2))
    assert without.returncode != 0
    assert f"files written by {real_hosts.hosts[1]} are on none of these hosts" in without.output
    assert "Traceback" not in without.output
    # Nothing was changed: with that host they are complete again, also for half as many ranks.
    assert files_on(real_hosts, 0, run.checkpoint(3)) == directory
    # A checkpoint that was being saved and is complete nowhere does not interfere.
    on(real_hosts, 0, "cp", "-r", run.checkpoint(3), run.unfinished(5))
    on(real_hosts, 0, "sed", "-i", 's/"step": 3/"step": 5/', run.unfinished(5) / "manifest.json")
    back = run_deepspeed(real_hosts, recipe, tmp_path)
    assert back.returncode == 0, back.output
    assert run.newest_checkpoint().step == tiny_recipe["schedule"]["steps"]


def test_exports_during_training_need_a_shared_disk(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["checkpoints"]["shared_disk"] = False
    tiny_recipe["export"] = {"every_steps": 3}
    with pytest.raises(ValueError, match="codeparrot-ds convert --hostfile"):
        Recipe.model_validate(tiny_recipe)
