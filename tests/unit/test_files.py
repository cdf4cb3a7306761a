"""Atomic files, locks, and errors of the operating system."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.system import files


def test_a_directory_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(RuntimeError), files.publish_directory(target) as unfinished:
        (unfinished / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with files.publish_directory(target) as unfinished:
        (unfinished / "whole").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]
    with pytest.raises(ConfigError, match="already exists"), files.publish_directory(target):
        pass


def test_two_processes_do_not_create_one_directory(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from codeparrot_ds.system.files import publish_directory\n"
        "with publish_directory(Path(sys.argv[1])) as unfinished:\n"
        "    (unfinished / 'its').write_text('x'); print('held', flush=True); sys.stdin.read()"
    )
    target = tmp_path / "made"

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    first = start()
    with pytest.raises(ConfigError, match="another process is creating it now"), files.publish_directory(target):
        pass
    first.communicate()  # it terminates
    assert [path.name for path in target.iterdir()] == ["its"]
    (target / "its").unlink()
    killed = start()
    killed.kill()
    killed.communicate()
    with files.publish_directory(target) as unfinished:
        assert list(unfinished.iterdir()) == []
        (unfinished / "ours").write_text("x")
    assert [path.name for path in target.iterdir()] == ["ours"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_second_writer_is_refused_and_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from codeparrot_ds.system.files import exclusive_lock\n"
        "with exclusive_lock(Path(sys.argv[1]), 'busy'): print('held', flush=True); sys.stdin.read()"
    )
    lock = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="busy"), files.exclusive_lock(lock, "busy"):
        pass
    holder.kill()
    holder.communicate()
    with files.exclusive_lock(lock, "busy"):
        pass


def test_a_lock_is_waited_for_until_the_workers_of_a_killed_process_are_gone(tmp_path: Path) -> None:
    with files.exclusive_lock(tmp_path / "lock", "busy"):
        if (worker := os.fork()) == 0:
            time.sleep(0.4)
            os._exit(0)
    assert files.is_locked(tmp_path / "lock")
    with files.exclusive_lock(tmp_path / "lock", "busy"):
        assert os.waitpid(worker, 0)[1] == 0


def test_a_disk_that_is_too_small_is_refused_with_figures(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the shards needs about 1,000,000,000,000 MB"):
        files.require_free_space(tmp_path, 10**18, "the shards")
    files.require_free_space(tmp_path, 1, "the shards")


def test_an_unwritable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file, but must be a directory"):
        files.make_directory(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot write here"):
        files.make_directory(Path("/proc/codeparrot"))  # not even root may


def test_operating_system_errors_are_distinguished() -> None:
    assert "disk is full" in str(files.explain_os_error(OSError(errno.ENOSPC, "", "/x/y")))
    assert "permission denied" in str(files.explain_os_error(PermissionError(errno.EACCES, "", "/x/y")))
    assert files.explain_os_error(OSError(errno.EBADF, "")) is None


def test_a_manifest_with_other_options_is_not_mistaken_for_none(tmp_path: Path) -> None:
    assert files.finished_manifest(tmp_path, "corpus", {"a": 1}) is None
    body = {"format_version": files.FORMAT_VERSION, "kind": "corpus", "a": 1, "b": 2}
    files.write_json(tmp_path / files.MANIFEST, body)
    assert files.finished_manifest(tmp_path, "corpus", {"a": 1}) == body
    with pytest.raises(DataError, match=r"a = 1, requested 3"):
        files.finished_manifest(tmp_path, "corpus", {"a": 3})
