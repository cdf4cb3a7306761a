"""`codeparrot-ds doctor` over three real hosts (see conftest.py), with something wrong on one of them."""

import importlib.metadata
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, save_recipe
from tests.multinode.conftest import TOOLS_PATH, RealHosts

pytestmark = pytest.mark.slow

Doctor = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def doctor(real_hosts: RealHosts, tiny_recipe: dict[str, Any], tmp_path: Path) -> Doctor:
    """Return the exit code and JSON of a check of all three hosts."""
    recipe = save_recipe({**tiny_recipe, "batch": {"global_batch_size": 6}}, tmp_path / "tiny.yaml")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in real_hosts.hosts))
    environment = {
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{TOOLS_PATH}",
    }

    def look(*options: str) -> tuple[int, dict[str, Any]]:
        program = "from codeparrot_ds.cli import main; main()"
        command = [sys.executable, "-c", program, "doctor", recipe, "--hostfile", hostfile, "--json"]
        done = real_hosts.run([*command, *options], timeout=90, env=environment, cwd=ROOT)
        assert "Traceback" not in done.output, done.output
        return done.returncode, json.loads(done.output[done.output.index("{") :])

    return look


def red(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the failed checks, by host index."""
    return {number: each["red"] for number, each in enumerate(report["hosts"]) if each["red"]}


def test_three_good_hosts_pass_within_half_a_minute(doctor: Doctor, real_hosts: RealHosts) -> None:
    code, report = doctor()
    assert (code, red(report)) == (0, {})
    assert report["seconds"] < 30
    assert [each["host"] for each in report["hosts"]] == list(real_hosts.hosts)
    assert len(report["bandwidth"]) == 6 and min(rate for *_, rate in report["bandwidth"]) > 1e6
    assert report["all_reduce"] > 1e6
    assert {each["cells"]["data"] for each in report["hosts"]} == {"same"}
    assert {each["cells"]["shared"] for each in report["hosts"]} == {"yes"}


def test_what_is_wrong_with_one_host_is_named(
    doctor: Doctor, real_hosts: RealHosts, data: Path, tmp_path: Path
) -> None:
    """Different version and shards, full disk, a name that resolves to loopback and a taken port, all at once."""
    information = importlib.metadata.distribution("deepspeed").locate_file("")
    metadata = next(Path(str(information)).glob("deepspeed-*.dist-info")) / "METADATA"
    other = tmp_path / "METADATA"
    other.write_text(metadata.read_text().replace("Version: 0.19.8", "Version: 0.18.0"))
    shards = shutil.copytree(data / "shards", tmp_path / "other-shards")
    (shards / "manifest.json").write_text("{}")
    names = tmp_path / "names"
    names.write_text(f"127.0.0.1 localhost {real_hosts.hosts[0]}\n{real_hosts.addresses[1]} {real_hosts.hosts[1]}\n")
    runs = tmp_path / "runs" / "tiny"
    runs.mkdir(parents=True)
    for command in (
        ["mount", "--bind", other, metadata],
        ["mount", "--bind", shards, data / "shards"],
        ["mount", "--bind", names, "/etc/hosts"],
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", runs],
    ):
        done = real_hosts.run(command, timeout=10, host=1)
        assert done.returncode == 0, done.output
    # On the third host: a shard cut short, another missing, and a package that cannot be imported.
    cut = shutil.copytree(data / "shards", tmp_path / "cut-shards")
    first, other_bin = sorted(cut.glob("train-*.bin"))[0], sorted(cut.glob("valid-*.bin"))[0]
    first.write_bytes(first.read_bytes()[:-2])
    other_bin.unlink()
    module = Path(str(information)) / "safetensors" / "torch.py"
    broken = tmp_path / "broken.py"
    broken.write_text("raise ImportError('cannot be loaded here')\n")
    for command in (["mount", "--bind", cut, data / "shards"], ["mount", "--bind", broken, module]):
        done = real_hosts.run(command, timeout=10, host=2)
        assert done.returncode == 0, done.output
    listener = real_hosts.start(
        [sys.executable, "-c", "import socket, time; s = socket.create_server(('', 29500)); time.sleep(99)"], host=1
    )
    time.sleep(1)
    try:
        code, report = doctor()
    finally:
        real_hosts.end_commands(listener)
        for path in (metadata, data / "shards", "/etc/hosts", runs):
            assert real_hosts.run(["umount", path], timeout=10, host=1).returncode == 0
        for path in (data / "shards", module):
            assert real_hosts.run(["umount", path], timeout=10, host=2).returncode == 0
    assert code == 1
    found = red(report)
    assert set(found) == {1, 2}
    assert f"{first.name} has {first.stat().st_size:,} bytes, not {first.stat().st_size + 2:,}" in found[2]["data"]
    assert f"{other_bin.name} is missing" in found[2]["data"]
    assert "its ranks cannot start (ImportError: cannot be loaded here)" in found[2]["software"]
    problems = found[1]
    assert f"deepspeed 0.18.0, here {importlib.metadata.version('deepspeed')}" in problems["software"]
    assert "manifest.json differs from the one here" in problems["data"]
    assert "cannot resolve " + real_hosts.hosts[2] in problems["name"]
    assert "GB needed" in problems["disk"]
    assert "put `runs` on a shared disk" in problems["shared"]
    assert "in use" in problems["port"]


def test_a_host_that_is_cut_off_is_named(doctor: Doctor, real_hosts: RealHosts) -> None:
    real_hosts.set_link(2, "down")
    try:
        code, report = doctor()
    finally:
        real_hosts.set_link(2, "up")
    assert code == 1
    assert report["seconds"] < 30
    assert set(red(report)) == {2}
    assert f"`ssh {real_hosts.hosts[2]} true` must work" in red(report)[2]["ssh"]
