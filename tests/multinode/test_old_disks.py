"""A run of hosts without a shared disk, made by the package before it was restructured, is resumed by it now."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codeparrot_ds.export.certificate import read_certificate
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.metrics import read_metrics
from tests.conftest import ROOT, Launched, Trained, save_recipe
from tests.multinode.conftest import RealHosts, user_environment
from tests.trees import OLD_COMMIT, check_out

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def old_tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout of the old commit."""
    with check_out(OLD_COMMIT, tmp_path_factory.mktemp("old") / "tree") as tree:
        yield tree


def call(real_hosts: RealHosts, tree: Path, directory: Path, *command: str | Path) -> Launched:
    """Run `codeparrot-ds` of a tree on the first host. Ranks are started in the same directory, and import from it."""
    environment = {**user_environment(directory), "PYTHONPATH": str(tree)}
    return real_hosts.run([sys.executable, "-m", "codeparrot_ds.cli", *command], timeout=300, env=environment, cwd=tree)


def test_an_old_run_without_a_shared_disk_resumes_bit_for_bit_and_converts(
    real_hosts: RealHosts, old_tree: Path, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    runs = Path(tiny_recipe["runs"])
    runs.mkdir()
    mounted = real_hosts.run(["mount", "-t", "tmpfs", "tmpfs", runs], timeout=10, host=1)
    assert mounted.returncode == 0, mounted.output
    tiny_recipe["checkpoints"]["shared_disk"] = False
    recipe, run = save_recipe(tiny_recipe, tmp_path / "tiny.yaml"), RunDirectory(runs / "tiny")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in real_hosts.hosts[:2]))

    launched = call(real_hosts, old_tree, tmp_path, "launch", recipe, "--hostfile", hostfile)
    assert launched.returncode == 0, launched.output
    uninterrupted = Trained(run, read_metrics(run.metrics))
    converted = call(real_hosts, old_tree, tmp_path, "convert", run.path, tmp_path / "old", "--hostfile", hostfile)
    assert converted.returncode == 0, converted.output

    last = run.newest_checkpoint()
    for host in (0, 1):
        removed = real_hosts.run(["rm", "-r", last.path], timeout=10, host=host)
        assert removed.returncode == 0, removed.output
    shutil.rmtree(old_tree / "codeparrot_ds")  # nothing of it can be imported from here on
    launched = call(real_hosts, ROOT, tmp_path, "launch", recipe, "--hostfile", hostfile, "--no-doctor")
    assert launched.returncode == 0, launched.output
    assert f"resuming from {run.checkpoint(3)}" in launched.output
    resumed = Trained(run, read_metrics(run.metrics))
    assert resumed.losses() == uninterrupted.losses()
    assert resumed.valid_losses() == uninterrupted.valid_losses()
    convert = ("convert", run.path, tmp_path / "new", "--keep-attention-scale", "--hostfile", hostfile)
    converted = call(real_hosts, ROOT, tmp_path, *convert)
    assert converted.returncode == 0, converted.output
    one, other = (read_certificate(tmp_path / name)["tensors"] for name in ("old", "new"))
    assert one == other
