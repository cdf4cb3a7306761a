"""`codeparrot-ds shards build --hostfile` over three real hosts (see conftest.py)."""

import sys
from pathlib import Path

import pytest

from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.verify import verify
from tests.conftest import ROOT, Launched
from tests.multinode.conftest import TOOLS_PATH, RealHosts

pytestmark = pytest.mark.slow


def build_on(real_hosts: RealHosts, data: Path, directory: Path, *options: str) -> Launched:
    """Shards of the tests' corpus, made by all three hosts."""
    hostfile = directory / "hosts"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in real_hosts.hosts))
    program = Path(sys.executable).with_name("codeparrot-ds")
    command = [program, "shards", "build", data / "corpus", "--tokenizer", data / "tokenizer"]
    command += ["-o", directory / "shards", "--valid-fraction", "0.1", "--shard-tokens", "20000", "--workers", "1"]
    environment = {"HOME": str(directory), "PATH": f"{Path(sys.executable).parent}:{TOOLS_PATH}"}
    return real_hosts.run([*command, "--hostfile", hostfile, *options], timeout=200, env=environment, cwd=ROOT)


def test_three_hosts_make_the_bytes_of_one_even_when_one_is_lost(
    real_hosts: RealHosts, data: Path, tmp_path: Path
) -> None:
    options = {"valid_fraction": 0.1, "shard_tokens": 20_000, "workers": 1}
    whole = build(data / "corpus", data / "tokenizer", tmp_path / "whole", **options)  # type: ignore[arg-type]
    assert len(whole.shards) > 3
    with real_hosts.without_sshd(1):
        done = build_on(real_hosts, data, tmp_path)
    assert done.returncode == 0, done.output
    assert f"{real_hosts.hosts[1]}: slice 1/3 ended with exit code 255" in done.output
    verify(tmp_path / "shards", deep=True)
    for path in whole.directory.iterdir():
        if path.is_file():
            assert (tmp_path / "shards" / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_a_user_must_mend_is_said_once_by_each_host_and_not_tried_elsewhere(
    real_hosts: RealHosts, data: Path, tmp_path: Path
) -> None:
    done = build_on(real_hosts, data, tmp_path, "--encoder", "nonsense")
    assert done.returncode == 1
    assert "was refused, see above" in done.output and "Traceback" not in done.output
    assert not (tmp_path / "shards" / "manifest.json").exists()
