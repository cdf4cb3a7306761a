"""`deepspeed --hostfile` over two real hosts (see conftest.py): real ssh, real pdsh, a real network between them."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from codeparrot_ds.export.certificate import read_certificate
from codeparrot_ds.export.convert import convert
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.metrics import read_metrics
from codeparrot_ds.system.files import read_json
from tests.conftest import Trained, save_recipe
from tests.multinode.conftest import RealHosts, run_deepspeed

pytestmark = pytest.mark.slow


def test_two_hosts_train_exactly_as_two_ranks_on_one(
    real_hosts: RealHosts, baseline: Trained, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    received_before = [received_bytes(real_hosts, host) for host in (0, 1)]
    recipe = save_recipe({**tiny_recipe, "name": "two-hosts"}, tmp_path / "tiny.yaml")
    launched = run_deepspeed(real_hosts, recipe, tmp_path)
    assert launched.returncode == 0, launched.output
    received = [received_bytes(real_hosts, host) - received_before[host] for host in (0, 1)]

    run = RunDirectory(Path(tiny_recipe["runs"]) / "two-hosts")
    status = read_json(run.status_file, "status")
    steps = tiny_recipe["schedule"]["steps"]
    assert (status["state"], status["step"], status["world_size"]) == ("finished", steps, 2), launched.output
    assert (run.logs / "rank_00001.log").exists()

    # pdsh prefixes each line with its host, and real_hosts has checked that ssh reaches that host.
    launchers = re.findall(r"^(\S+): .*nnodes=2, num_local_procs=1, node_rank=(\d)", launched.output, re.MULTILINE)
    assert dict(launchers) == {real_hosts.hosts[0]: "0", real_hosts.hosts[1]: "1"}, launched.output
    # The ranks communicated over the network: at each step each lacks half of the weights, 4 bytes per parameter.
    assert min(received) > steps * 4 * status["parameters"] / 2

    two = Trained(run, read_metrics(run.metrics))
    assert len(two.losses()) == steps
    assert two.losses() == baseline.losses()
    assert two.valid_losses() == baseline.valid_losses()
    assert two.digests() == baseline.digests()

    # As if the run had been lost after step 3: the same command resumes there and ends like the first.
    newest = run.newest_checkpoint()
    shutil.rmtree(newest.path)
    again = run_deepspeed(real_hosts, recipe, tmp_path)
    assert again.returncode == 0, again.output
    assert f"resuming from {run.checkpoint(3)}" in run.log(0).read_text()
    resumed = Trained(run, read_metrics(run.metrics))
    assert resumed.losses() == baseline.losses()
    assert resumed.valid_losses() == baseline.valid_losses()
    saved = run.newest_checkpoint()
    assert (saved.step, saved.loss_valid) == (newest.step, newest.loss_valid)

    # Both hosts together wrote the same model as two ranks on one host.
    converted = real_hosts.run(
        [Path(sys.executable).with_name("codeparrot-ds"), "convert", run.path, tmp_path / "hf"], timeout=120
    )
    assert converted.returncode == 0, converted.output
    ours = read_certificate(tmp_path / "hf")
    assert ours["engine"]["not_compared"] is None
    its = convert([baseline.run.newest_checkpoint()], tmp_path / "its", memory_cap_bytes=8_000_000_000)
    assert ours["tensors"] == its["tensors"]


def test_shards_missing_on_one_host_end_the_job_and_name_the_host(
    real_hosts: RealHosts, tiny_recipe: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    """With stock DeepSpeed, the other host waits in the rendezvous for many minutes without an error message."""
    shards = shutil.copytree(data / "shards", tmp_path / "shards")
    tiny_recipe["data"]["shards"] = str(shards)
    hidden = real_hosts.run(["mount", "-t", "tmpfs", "tmpfs", shards], timeout=10, host=1)  # visible only on that host
    assert hidden.returncode == 0, hidden.output
    launched = run_deepspeed(real_hosts, save_recipe(tiny_recipe, tmp_path / "tiny.yaml"), tmp_path)
    assert launched.returncode != 0
    assert f"host {real_hosts.hosts[1]}: {shards}" in launched.output
    assert f"host {real_hosts.hosts[0]}:" not in launched.output
    assert "Traceback" not in launched.output
    assert not any((Path(tiny_recipe["runs"]) / "tiny" / "checkpoints").glob("*"))


def received_bytes(real_hosts: RealHosts, host: int) -> int:
    """Return the bytes received on a host's eth0."""
    counter = real_hosts.run(["cat", "/sys/class/net/eth0/statistics/rx_bytes"], timeout=10, host=host)
    return int(counter.output)
