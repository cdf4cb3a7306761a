"""Ranks run in the directory in which their job was started, whatever its name, or refuse to train."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from codeparrot_ds.errors import ClusterError, ConfigError
from codeparrot_ds.hosts import launchers
from codeparrot_ds.hosts.gather import gather
from codeparrot_ds.hosts.ssh import find_unreachable, remote_script
from codeparrot_ds.hosts.working_directory import (
    WorkingDirectory,
    check_common_directory,
    check_directory_of_runner,
)
from codeparrot_ds.run.directory import Checkpoint
from codeparrot_ds.system.files import digest_bytes
from tests.conftest import save_recipe

NAMES = [
    "plain",
    "with space",
    "it's a $HOME clone",
    'a "b" \\c `d`',
    "100%h %n",
    "x;y & z*",
    "-dash [1] #",
    "naïve ~",
    "two\nlines",
    "not UTF-8 \udcff",
]
RUNNER = ["/usr/bin/python3", "/opt/venv/bin/deepspeed", "--hostfile", "hosts", "--module", "codeparrot_ds.train"]
LAUNCHER = ["/usr/bin/python3", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", "--node_rank=1"]

# Runs the remote command here, in another directory, as the user's shell does on a host.
SSH = """#!/bin/sh
for command; do :; done
cd "{home}" && exec bash -c "$command"
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which a stub `ssh` starts commands."""
    home, program = tmp_path / "home", tmp_path / "bin" / "ssh"
    home.mkdir()
    program.parent.mkdir()
    program.write_text(SSH.format(home=home))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return home


@pytest.mark.parametrize("name", NAMES)
def test_a_command_on_a_host_runs_in_this_directory(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (home / name).mkdir()
    monkeypatch.chdir(home / name)
    program = "import os, sys; sys.stdout.buffer.write(os.fsencode(os.getcwd()))"
    script = remote_script(["A=1"], [sys.executable, "-c", program])
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, cwd=home)
    assert done.stdout == str(home / name).encode(errors="surrogateescape")
    assert find_unreachable(["a", "b"]) == {}


@pytest.mark.parametrize("name", NAMES)
def test_the_directory_reaches_the_ranks_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    here = WorkingDirectory.here()
    text = here.encode()
    assert text.replace("-", "").replace("_", "").rstrip("=").isalnum()
    assert WorkingDirectory.parse(text) == here == (tmp_path / name, tmp_path / name)
    here.check()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClusterError) as caught:
        here.check()
    assert str(caught.value).startswith(f"{tmp_path}: ranks run here, but the job was started in {tmp_path / name}. ")


def test_a_directory_may_be_known_by_its_link_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, link = tmp_path / "real", tmp_path / "a link"
    real.mkdir()
    link.symlink_to(real)
    monkeypatch.chdir(link)
    monkeypatch.setenv("PWD", str(link))
    here = WorkingDirectory.here()
    assert here == (real, link)
    moved = real.rename(tmp_path / "elsewhere")  # as on a host where the link leads elsewhere
    link.unlink()
    link.symlink_to(moved)
    monkeypatch.chdir(moved)
    here.check()
    done = subprocess.run(["sh", "-c", f"{here.script()} && pwd -P"], capture_output=True, text=True, cwd="/")
    assert done.stdout == f"{moved}\n"
    monkeypatch.setenv("PWD", "/usr")  # left by a parent that has changed its directory since
    assert WorkingDirectory.here() == (moved, moved)
    link.unlink()
    with pytest.raises(ClusterError, match="does not exist on this host"):
        here.check()


def test_a_host_without_the_directory_or_the_interpreter_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/my venv/bin/python")
        assert find_unreachable(["a"]) == {"a": "/my venv/bin/python: not found"}
    gone = WorkingDirectory(home / "not here", home / "not here")
    monkeypatch.setattr(WorkingDirectory, "here", lambda: gone)
    assert str(home / "not here") in find_unreachable(["a"])["a"]


@pytest.mark.parametrize(
    ("there", "here", "old", "right"),
    [
        ("project", "project", True, True),  # DeepSpeed's `cd` succeeded
        ("project:/usr/lib", "project", True, True),  # before the user's own PYTHONPATH
        ("", "home", False, True),  # no PYTHONPATH: nothing is known
        ("/usr", "project", True, True),  # that of .deepspeed_env: some `cd` has succeeded
        ("/usr", "project", False, True),  # started by another tool than DeepSpeed's runner, without a shell
        ("/usr", "home", True, True),  # started in $HOME
        ("project", "home", False, False),  # `cd` has failed
        ("/absent/project", "home", False, False),
        ("with space", "home", False, False),
        ("project[1]", "project1", True, False),
        ("project;y", "project", True, False),
    ],
)
def test_ranks_notice_that_the_runner_did_not_change_their_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, here: str, old: bool, right: bool
) -> None:
    for name in ("project", "project1", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / here)
    environment = {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path / there) if there else ""}
    environment |= {"OLDPWD": environment["HOME"]} if old else {}
    if right:
        check_directory_of_runner(environment, [LAUNCHER, ["sshd: root@notty"]])
    else:
        with pytest.raises(ClusterError, match="the job was started in"):
            check_directory_of_runner(environment, [LAUNCHER, ["sshd: root@notty"]])
    check_directory_of_runner(environment, [LAUNCHER, RUNNER])  # on the runner's own machine: a child of it
    check_directory_of_runner(environment, [LAUNCHER[:-1], ["bash"]])
    check_directory_of_runner(environment, [["python", "-m", "codeparrot_ds.train"], ["slurmstepd"]])


def test_the_directory_of_a_pdsh_on_this_host_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell expands `/parent/$(true)` to `/parent/`, in `cd` and in PYTHONPATH."""
    started_in, pdsh = tmp_path / "$(true)", tmp_path / "bin" / "pdsh"
    started_in.mkdir()
    pdsh.parent.mkdir()
    pdsh.write_text("#!/bin/sh\necho runs\nread until_closed\n")
    pdsh.chmod(0o755)
    launcher = [*LAUNCHER[:-2], f"--world_info={tmp_path.name}", LAUNCHER[-1]]
    environment = {"HOME": "/root", "OLDPWD": "/root", "PYTHONPATH": f"{tmp_path}/"}
    monkeypatch.chdir(tmp_path)
    check_directory_of_runner(environment, [launcher])
    with subprocess.Popen(
        [pdsh, "-w", "a,b", *launcher], cwd=started_in, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"runs\n"
        with pytest.raises(ClusterError, match=r"started in .*\$\(true\)"):
            check_directory_of_runner(environment, [launcher])
        check_directory_of_runner(environment, [LAUNCHER])  # of another job
        monkeypatch.chdir(started_in)
        check_directory_of_runner({**environment, "PYTHONPATH": "/my lib"}, [launcher])


def test_a_colon_in_the_name_is_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a:b").mkdir()
    monkeypatch.chdir(tmp_path / "a:b")
    check_directory_of_runner({"PYTHONPATH": f"{tmp_path}/a:b:/usr"}, [LAUNCHER])


def test_ranks_of_one_job_run_in_one_directory() -> None:
    here, linked = WorkingDirectory(Path("/disk/p"), Path("/p")), WorkingDirectory(Path("/other/p"), Path("/p"))
    check_common_directory([("a", here), ("a", here), ("b", linked)])
    fallen_back = WorkingDirectory(Path("/tmp"), Path("/tmp"))  # as slurmd does
    with pytest.raises(ClusterError, match=r"a: rank 0 runs in /disk/p, .*\(c: /tmp\)"):
        check_common_directory([("a", here), ("b", linked), ("c", fallen_back), ("c", fallen_back)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["working directory", "interpreter"])
def test_pdsh_gets_only_names_that_need_no_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, what: str
) -> None:
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(launchers, "find_deepspeed", lambda: ["deepspeed"])
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name if what == "working directory" else tmp_path)
    if what == "interpreter":
        monkeypatch.setattr(sys, "executable", str(tmp_path / name / "bin" / "python"))
    run: Any = SimpleNamespace(path=tmp_path)
    chosen = launchers.Ssh(None)
    program = chosen.command(run, {"a": 1}, "a", 29500)[0]
    assert ("codeparrot_ds.hosts.fan_out" in program) == (name != "plain")
    assert ("using ssh instead of pdsh" in capsys.readouterr().err) == (name != "plain")
    if name == "plain":
        launchers.Ssh("pdsh")
    else:
        with pytest.raises(ConfigError, match=rf"{what}.*--launcher ssh"):
            launchers.Ssh("pdsh")
    launchers.Ssh("ssh")


def test_a_relative_checkpoint_is_fetched_from_this_directory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ssh starts in $HOME, where a relative path would be another run's."""
    here = tmp_path / "it's here"
    checkpoint = here / "runs" / "step-00000003"
    checkpoint.mkdir(parents=True)
    monkeypatch.chdir(here)
    content = b"of this run"
    listed = {"one.pt": {"bytes": len(content), "xxh3_128": digest_bytes(content), "host": "b"}}
    relative = Checkpoint(Path("runs/step-00000003"), 3, 12, 5, 3, 2, "fp32", {}, listed, None)
    other = tmp_path / "bin" / "cat"  # serves what host b has at the absolute path
    other.write_text(f'#!/bin/sh\n[ "$2" = "{checkpoint}/one.pt" ] && printf "of this run"\n')
    other.chmod(0o755)
    gather(relative, ["b"])
    assert (checkpoint / "one.pt").read_bytes() == content


def test_a_rank_in_another_directory_does_not_train(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    started, elsewhere = tmp_path / "with space", tmp_path / "home"
    started.mkdir()
    elsewhere.mkdir()
    recipe = save_recipe({**tiny_recipe, "runs": "runs"}, tmp_path / "tiny.yaml")
    directory = WorkingDirectory(started, started).encode()
    done = subprocess.run(
        [sys.executable, "-m", "codeparrot_ds.train", recipe, "--directory", directory],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert f"{elsewhere}: ranks run here, but the job was started in {started}" in done.stderr
    assert not list(elsewhere.iterdir()) and not list(started.iterdir())
