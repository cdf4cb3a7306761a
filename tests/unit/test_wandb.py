"""Weights & Biases without a login is reported before training; without a server it is offline."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.training.wandb_run import _unreachable, check_wandb
from tests.conftest import ROOT

START = """
import sys, time
from pathlib import Path
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.training.wandb_run import check_wandb, start_wandb
check_wandb()
began = time.monotonic()
started, problem = start_wandb(RunDirectory(Path(sys.argv[1])), load_recipe(Path("launch/recipes/quickstart.yaml")))
started.log({"loss": 1.0, "step": 0})
started.finish()
print(problem)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory without a login."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    return tmp_path


def start(run: Path, url: str) -> subprocess.CompletedProcess[str]:
    """Log one step to the server at `url`."""
    run.mkdir()
    return subprocess.run(
        [sys.executable, "-c", START, str(run)],
        cwd=ROOT,
        env={**os.environ, "WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_no_login_is_reported_before_training(home: Path) -> None:
    program = "from codeparrot_ds.training.wandb_run import check_wandb; check_wandb()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "is not logged in. Run `wandb login` there, set WANDB_API_KEY, or" in done.stderr
    check_wandb({"WANDB_MODE": "offline"})
    check_wandb({"WANDB_MODE": "disabled"})


def test_no_package_is_reported_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'codeparrot-ds\[wandb\]'"):
        check_wandb({"WANDB_MODE": "offline"})


@pytest.fixture
def rejecting_server() -> Iterator[str]:
    """A server that accepts no key."""

    class Handler(http.server.BaseHTTPRequestHandler):
        """Answers everything with 401."""

        def do_POST(self) -> None:
            """See the class."""
            self.send_response(401)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_without_a_server_it_is_offline(home: Path, rejecting_server: str) -> None:
    for number, (url, said) in enumerate(
        [("http://127.0.0.1:9", "http://127.0.0.1:9 cannot be reached"), (rejecting_server, "401")]
    ):
        done = start(home / f"run{number}", url)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout and "logging offline. Upload it later: wandb sync" in done.stdout
        assert list((home / f"run{number}" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_server_is_reached_by_a_connection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert _unreachable(url) == ""
    assert f"{url} cannot be reached" in _unreachable(url)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert _unreachable(url) == ""  # the proxy is asked by wandb itself
