"""Hostfiles, and detection of a rank's launch command."""

from pathlib import Path

import pytest

from codeparrot_ds.errors import ClusterError
from codeparrot_ds.hosts.hostfile import check_launch_command, read_hostfile
from codeparrot_ds.run.sections import Batch
from codeparrot_ds.supervision.launch import deepspeed_command
from codeparrot_ds.supervision.placement import max_ranks
from tests.conftest import ROOT


def test_the_example_is_valid() -> None:
    assert read_hostfile(ROOT / "hostfile.example") == {"worker-0": 8, "worker-1": 8}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a slots = 8", "line 1: 'a slots = 8' is not `host slots=N`"),
        ("a slots=8\na slots=8", "line 2: host a is listed twice"),
        ("a slots=0", "N at least 1"),
        ("a", "not `host slots=N`"),
        ("# nothing\n\n", "lists no host"),
        ("a slots=x\nb\n", "2 problems"),
        ("me@gpu-1 slots=8", "list gpu-1, and put `Host gpu-1` and `User me` into ~/.ssh/config"),
        ("fe80::1 slots=8", "line 1: fe80::1: an IPv6 address or a port cannot be given here; list a name"),
        ("[::1] slots=8", "an IPv6 address or a port"),
        ("gpu-1:2222 slots=8", "put a port into ~/.ssh/config"),
    ],
)
def test_a_bad_hostfile_is_refused_line_by_line(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(content)
    with pytest.raises(ClusterError) as caught:
        read_hostfile(path)
    assert expected in str(caught.value)


def test_a_hostfile_that_the_launch_command_names_must_exist(tmp_path: Path) -> None:
    missing = str(tmp_path / "absent")
    python, deepspeed = "/usr/bin/python3", "/opt/venv/bin/deepspeed"
    for arguments in (
        [python, deepspeed, "--hostfile", missing, "x.py"],
        [python, deepspeed, f"-H{missing}"],
        [python, deepspeed, "--hostf", missing, "--module", "x"],
    ):
        with pytest.raises(ClusterError, match="no such hostfile"):
            check_launch_command([["bash"], arguments, ["init"]])
    check_launch_command([["bash"], [python, deepspeed, "--num_gpus", "2", "x.py"]])
    check_launch_command([["bash", "-c", f"something --hostfile {missing}"]])


def test_launch_uses_as_many_gpus_as_the_batch_can_be_divided_among() -> None:
    batch = Batch(global_batch_size=192, micro_batch_size=12)  # 16 micro-batches
    assert [max_ranks(batch, gpus) for gpus in (1, 2, 3, 6, 7, 8, 16)] == [1, 2, 2, 4, 4, 8, 16]


def test_the_command_that_launch_runs() -> None:
    command = deepspeed_command(Path("r.yaml"), ["deepspeed", "--hostfile", "hosts"], ["a.b=1"])
    assert " ".join(command) == "deepspeed --hostfile hosts --module codeparrot_ds.train r.yaml --set a.b=1"


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes("\ufeffgpu-1 slots=8\r\ngpu-2 slots=8\r\n".encode())
    assert read_hostfile(tmp_path / "hosts") == {"gpu-1": 8, "gpu-2": 8}
