"""Checkpoint files on other hosts: fetched over ssh (a stub here) and always verified."""

import sys
from pathlib import Path

import pytest

from codeparrot_ds.errors import CheckpointError, ClusterError
from codeparrot_ds.hosts.gather import gather
from codeparrot_ds.run.directory import Checkpoint
from codeparrot_ds.system.files import digest_bytes

# What `ssh … -- HOST "exec cat -- PATH"` would print: the file of that name in the directory of that host.
SSH = """#!{python}
import os, pathlib, shlex, sys
*_, host, command = sys.argv
path = pathlib.Path("{hosts}", host, shlex.split(command)[-1].lstrip("/"))
if host == "endless":
    while True:
        os.write(1, bytes(1 << 16))
if not path.exists():
    sys.exit("cat: no such file")
os.write(1, path.read_bytes())
"""


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One directory per host, and a stub `ssh` that reads from it."""
    program, directory = tmp_path / "bin" / "ssh", tmp_path / "hosts"
    program.parent.mkdir()
    program.write_text(SSH.format(python=sys.executable, hosts=directory))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return directory


def make_checkpoint(directory: Path, files: dict[str, bytes], host: str = "b") -> Checkpoint:
    """Create a checkpoint whose manifest lists these files, all of them missing here."""
    directory.mkdir()
    listed = {
        name: {"bytes": len(content), "xxh3_128": digest_bytes(content), "host": host}
        for name, content in files.items()
    }
    checkpoint = Checkpoint(directory, 3, 12, 5, 3, 2, "fp32", {}, listed, None)
    checkpoint.write(directory)
    return checkpoint


def place(hosts: Path, host: str, path: Path, content: bytes) -> None:
    """Put a file onto a host."""
    there = hosts / host / str(path).lstrip("/")
    there.parent.mkdir(parents=True, exist_ok=True)
    there.write_bytes(content)


def test_what_is_missing_is_fetched_from_the_host_that_has_it(hosts: Path, tmp_path: Path) -> None:
    files = {"one.pt": b"first", "offloaded_tensors/rank01/two.swp": b"second" * 1_000_000}
    checkpoint = make_checkpoint(tmp_path / "step-00000003", files)
    with pytest.raises(CheckpointError, match=r"one.pt is missing \(written by b\)(?s:.)*--hostfile"):
        checkpoint.verify()
    for name, content in files.items():
        place(hosts, "c", checkpoint.path / name, content)
    gather(checkpoint, ["a", "b", "c"])
    checkpoint.verify()


def test_files_that_no_host_has_intact_are_named_and_nothing_is_left(hosts: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "step-00000003", {"one.pt": b"first", "two.pt": b"second"}, "endless")
    place(hosts, "a", checkpoint.path / "one.pt", b"fifth")
    place(hosts, "a", checkpoint.path / "two.pt", b"second")
    with pytest.raises(ClusterError) as raised:
        gather(checkpoint, ["a", "endless"])
    assert "one.pt (endless: its copy does not match the recorded digest; a: its copy does not match" in str(
        raised.value
    )
    assert "two.pt" not in str(raised.value)
    assert sorted(path.name for path in checkpoint.path.iterdir()) == ["manifest.json", "two.pt"]


@pytest.mark.parametrize("name", ["../../etc/one.pt", "/etc/one.pt"])
def test_a_manifest_cannot_have_files_written_elsewhere(name: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "step-00000003", {name: b""}).path
    with pytest.raises(CheckpointError, match="is not a valid checkpoint file name"):
        Checkpoint.read(path)
