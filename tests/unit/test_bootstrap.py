"""launch/bootstrap.py: missing packages are installed if permitted, otherwise the command to run is printed."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "launch" / "bootstrap.py"


@pytest.fixture
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_permission_it_prints_the_command_to_type(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get, no sudo
    with pytest.raises(SystemExit) as caught:
        bootstrap.install_system_packages({"no-such-tool": "some-package", "module:json": "other"})
    message = str(caught.value.code)
    assert "missing on this machine: some-package" in message
    assert "sudo apt-get install --yes --no-install-recommends some-package" in message


def test_it_installs_if_permitted(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A fake apt-get that creates the tool."""
    apt = tmp_path / "apt-get"
    apt.write_text(
        f'#!/bin/sh\n[ "$1" = install ] && printf "#!/bin/sh\\n" > {tmp_path}/no-such-tool'
        f" && chmod +x {tmp_path}/no-such-tool\nexit 0\n"
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(bootstrap.os, "geteuid", lambda: 0)
    bootstrap.install_system_packages({"no-such-tool": "some-package"})
    assert "apt-get install --yes --no-install-recommends some-package" in capfd.readouterr().out
    assert (tmp_path / "no-such-tool").exists()


def test_a_missing_wheel_directory_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--offline-wheels", str(tmp_path / "absent")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "absent: no such directory of wheels" in done.stderr


def test_the_constraints_pin_torch_first() -> None:
    """Packages that depend on torch must resolve to this version, not the newest build."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert pins[0] == "torch==2.13.0"
    assert all("==" in pin for pin in pins)
    assert {"deepspeed==0.19.8", "transformers==5.23.0"} <= set(pins)


def test_what_cleaning_needs_is_installed_also_into_an_older_environment(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(bootstrap, "run", lambda command, quiet=False: commands.append(command))
    monkeypatch.setattr(bootstrap, "succeeds", lambda command: True)
    monkeypatch.setattr(bootstrap, "FINISHED", tmp_path / "installed")

    def install(test: bool) -> list[str]:
        """The requirements that are installed."""
        commands.clear()
        bootstrap.install_python_packages(argparse.Namespace(test=test, offline_wheels=None, torch_index=None))
        return [command[-1] for command in commands if "install" in command]

    assert install(test=False) == ["torch", ".[corpus]"]
    assert install(test=False) == []
    older = (tmp_path / "installed").read_text().removesuffix(" corpus")  # as written before there was this extra
    (tmp_path / "installed").write_text(older)
    assert install(test=False) == ["torch", ".[corpus]"]
    assert install(test=True) == ["torch", ".[test]"]
    assert install(test=False) == []  # `test` contains `corpus`
