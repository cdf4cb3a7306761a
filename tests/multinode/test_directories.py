"""Jobs started in directories whose names need quotes, or that other hosts lack: ranks run there, or not at all."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from codeparrot_ds.errors import EXIT_USER_ERROR
from codeparrot_ds.run.directory import RunDirectory
from tests.conftest import Launched, read_run, save_recipe
from tests.multinode.conftest import RealHosts, run_deepspeed, user_environment

pytestmark = pytest.mark.slow

TIMEOUT = 240  # seconds
nightly = pytest.mark.nightly
SPACE, QUOTE = "with space", "it's a $HOME clone"
OTHERS = ['a "b" \\c `d`', "100%h %n", "x;y & z*", "-dash [1] #", "naïve ~", "two\nlines"]
NAME = f"in-a-directory-{os.getpid()}"
HOME = Path("/root")  # of the ranks, set by sshd; the tests below fail if it contains this run


@pytest.fixture
def relative_recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> Iterator[Path]:
    """A recipe of two steps that is named by its absolute path and writes below the working directory."""
    schedule = {"steps": 2, "warmup_steps": 1}
    body = {**tiny_recipe, "name": NAME, "runs": "runs", "schedule": schedule, "checkpoints": {"every_steps": 2}}
    yield save_recipe(body, tmp_path / "tiny.yaml")
    if (HOME / "runs" / NAME).exists():  # the test has failed
        shutil.rmtree(HOME / "runs" / NAME)


def make_directory(tmp_path: Path, name: str) -> Path:
    """The working directory. The first word of its name is a directory as well, where an unquoted `cd` could lead."""
    directory = tmp_path / "started here" / name
    directory.mkdir(parents=True)
    (tmp_path / "started").mkdir()
    return directory


def launch(
    hosts: RealHosts,
    recipe: Path,
    cwd: Path,
    *options: str,
    python: Path = Path(sys.executable),
    seen_from: Path | None = None,
) -> Launched:
    """Run `codeparrot-ds launch` in `cwd` on the first host, for one rank on each of two.

    `seen_from`: name of `cwd` on this machine, if it is another.
    """
    hostfile = (seen_from or cwd) / "hosts file"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts.hosts[:2]))
    environment = {**user_environment(recipe.parent), "PWD": str(cwd)}
    command = [python, "-m", "codeparrot_ds.cli", "launch", recipe, "--hostfile", hostfile, "--no-doctor", *options]
    return hosts.run(command, timeout=TIMEOUT, env=environment, cwd=cwd)


def attempts(cwd: Path) -> list[dict[str, Any]]:
    """The recorded attempts of the run below `cwd`."""
    return [json.loads(line) for line in RunDirectory(cwd / "runs" / NAME).launches.read_text().splitlines()]


def require_trained_in(cwd: Path, done: Launched, elsewhere: Sequence[Path] = ()) -> None:
    """The run is in `cwd`, finished at the first attempt, and nowhere else."""
    assert done.returncode == 0, done.output
    assert [row["step"] for row in read_run(cwd / "runs" / NAME).rows if row["kind"] == "train"] == [0, 1]
    for each in (HOME, *elsewhere):
        assert not (each / "runs" / NAME).exists()


@pytest.mark.parametrize(
    ("launcher", "name"),
    [
        (None, SPACE),
        ("mpirun", QUOTE),
        pytest.param("ssh", "x;y & 100%h", marks=nightly),
        *(pytest.param(launcher, name, marks=nightly) for name in (QUOTE, *OTHERS) for launcher in (None, "mpirun")),
    ],
)
def test_ranks_run_where_the_job_was_launched(
    real_hosts: RealHosts, relative_recipe: Path, tmp_path: Path, launcher: str | None, name: str
) -> None:
    cwd = make_directory(tmp_path, name)
    options = () if launcher is None else ("--launcher", launcher)
    done = launch(real_hosts, relative_recipe, cwd, *options)
    require_trained_in(cwd, done, [tmp_path / "started"])
    (attempt,) = attempts(cwd)
    assert (attempt["state"], attempt["hosts"]) == ("finished", list(real_hosts.hosts[:2]))
    assert ("using ssh instead of pdsh" in done.output) == (launcher is None), done.output


@pytest.mark.parametrize("name", [SPACE, *(pytest.param(name, marks=nightly) for name in (QUOTE, *OTHERS))])
def test_pdsh_itself_is_refused_such_a_directory(
    real_hosts: RealHosts, relative_recipe: Path, tmp_path: Path, name: str
) -> None:
    cwd = make_directory(tmp_path, name)
    done = launch(real_hosts, relative_recipe, cwd, "--launcher", "pdsh")
    assert done.returncode == EXIT_USER_ERROR, done.output
    assert "--launcher ssh" in done.output and "Traceback" not in done.output
    assert not (HOME / "runs" / NAME).exists()


@nightly
def test_an_interpreter_whose_name_needs_quotes(real_hosts: RealHosts, relative_recipe: Path, tmp_path: Path) -> None:
    """A virtual environment in a directory with a space."""
    python = tmp_path / "my venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "my venv" / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    (tmp_path / "my venv" / "lib").symlink_to(Path(sys.prefix) / "lib")
    python.symlink_to(sys.executable)
    cwd = tmp_path / "plain"
    cwd.mkdir()
    done = launch(real_hosts, relative_recipe, cwd, python=python)
    require_trained_in(cwd, done)
    assert "using ssh instead of pdsh" in done.output


@pytest.mark.parametrize("launcher", ["pdsh", pytest.param("ssh", marks=nightly)])
def test_percent_signs_and_quotes_in_arguments_arrive(
    real_hosts: RealHosts, relative_recipe: Path, tmp_path: Path, launcher: str
) -> None:
    cwd = tmp_path / "plain"
    cwd.mkdir()
    runs = tmp_path / "runs of %h" / "it's a $HOME; 100%n"
    done = launch(real_hosts, relative_recipe, cwd, "--launcher", launcher, "--set", f"runs={runs}")
    assert done.returncode == 0, done.output
    assert read_run(runs / NAME).rows
    assert sorted(path.name for path in tmp_path.glob("runs of *")) == ["runs of %h"]


@pytest.mark.parametrize("launcher", ["pdsh", *(pytest.param(each, marks=nightly) for each in ("ssh", "mpirun"))])
def test_a_host_without_the_directory_is_named_before_anything_starts(
    real_hosts: RealHosts, relative_recipe: Path, tmp_path: Path, launcher: str
) -> None:
    cwd = tmp_path / "parent" / "only-here"
    cwd.mkdir(parents=True)
    hidden = real_hosts.run(["mount", "-t", "tmpfs", "tmpfs", cwd.parent], timeout=10, host=1)
    assert hidden.returncode == 0, hidden.output
    done = launch(real_hosts, relative_recipe, cwd, "--launcher", launcher)
    assert done.returncode == EXIT_USER_ERROR, done.output
    assert f"{real_hosts.hosts[1]}: " in done.output and str(cwd) in done.output
    assert "Restarting" not in done.output and "Traceback" not in done.output
    assert not (HOME / "runs" / NAME).exists()


@nightly
def test_a_link_may_lead_elsewhere_on_each_host(real_hosts: RealHosts, relative_recipe: Path, tmp_path: Path) -> None:
    """The second host lacks the path behind the link of the first."""
    disks = [tmp_path / "disk-1", tmp_path / "disk-2"]
    link = Path("/run") / tmp_path.name  # /run is a disk of each host's own
    for disk in disks:
        disk.mkdir()
    (disks[0] / "project").mkdir()
    setups = [
        f"ln -s {disks[0]} {link}",
        f"mount --bind {disks[0]} {disks[1]} && mount -t tmpfs tmpfs {disks[0]} && ln -s {disks[1]} {link}",
    ]
    for host, setup in enumerate(setups):
        done = real_hosts.run(["sh", "-c", setup], timeout=10, host=host)
        assert done.returncode == 0, done.output
    done = launch(real_hosts, relative_recipe, link / "project", "--launcher", "ssh", seen_from=disks[0] / "project")
    require_trained_in(disks[0] / "project", done)


@pytest.mark.parametrize(
    "name",
    [
        SPACE,
        *(
            pytest.param(name, marks=nightly)
            for name in ("only-here", "a[1]", "x;y", "x&y", "$(true)", "100%h", "two\nlines")
        ),
    ],
)
def test_ranks_of_deepspeed_itself_notice_a_wrong_directory(
    real_hosts: RealHosts, relative_recipe: Path, tmp_path: Path, name: str
) -> None:
    cwd = tmp_path / "parent" / name
    cwd.mkdir(parents=True)
    for other in ("a1", "x"):  # where an unquoted `cd` would lead
        (cwd.parent / other).mkdir()
    if name == "only-here":
        hidden = real_hosts.run(["mount", "-t", "tmpfs", "tmpfs", cwd.parent], timeout=10, host=1)
        assert hidden.returncode == 0, hidden.output
    done = run_deepspeed(real_hosts, relative_recipe, tmp_path, cwd=cwd)
    assert done.returncode != 0, done.output
    assert "the job was started in " in done.output, done.output
    assert "codeparrot-ds launch" in done.output and "Traceback" not in done.output
    assert not [each for each in (HOME, *cwd.parent.iterdir()) if (each / "runs" / NAME / "metrics.jsonl").exists()]


def test_one_machine_trains_in_such_a_directory(
    relative_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cwd = make_directory(tmp_path, QUOTE)
    command = [sys.executable, "-m", "codeparrot_ds.cli", "launch", str(relative_recipe), "--ranks", "2"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    require_trained_in(cwd, Launched(done.returncode, done.stdout + done.stderr), [tmp_path / "started"])
