"""Weights & Biases: a missing login is reported before training, and without a network the run is logged offline."""

import importlib.util
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.system.files import digest_json

_CONNECT_SECONDS = 5.0
_INIT_SECONDS = 30.0
_OFFLINE = ("offline", "dryrun", "disabled")  # values of WANDB_MODE that need no login


def check_wandb(environment: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError unless this process can log to Weights & Biases: the package, and a login unless offline."""
    environment = os.environ if environment is None else environment
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("logging.wandb needs wandb. Install it: pip install 'codeparrot-ds[wandb]'")
    if environment.get("WANDB_MODE") in _OFFLINE:
        return
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb  # type: ignore[import-not-found, unused-ignore]

    if not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            f"logging.wandb: {socket.gethostname()}, the host of rank 0, is not logged in. Run `wandb login` there, "
            "set WANDB_API_KEY, or log to files only: WANDB_MODE=offline."
        )


def start_wandb(run: RunDirectory, recipe: Recipe) -> tuple[Any, str]:
    """Start a Weights & Biases run, or continue it in a resumed run. Settings come from WANDB_* variables.

    Returns:
        The run, and why it is offline although it should not be (empty if it is not).
    """
    import wandb

    arguments: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", "codeparrot-ds"),
        "name": recipe.name,
        "id": digest_json(str(run.path.resolve()))[:16],
        "resume": "allow",
        "dir": str(run.path),
        "config": recipe.model_dump(mode="json"),
        # Our own log has the same information.
        "settings": wandb.Settings(console="off", silent=True, init_timeout=_INIT_SECONDS),
    }
    problem = ""
    if os.environ.get("WANDB_MODE") not in _OFFLINE:
        problem = _unreachable(wandb.setup().settings.base_url)
    if not problem:
        try:
            return _defined(wandb.init(**arguments)), ""
        except wandb.errors.Error as error:  # a rejected key, or a server that does not answer
            problem = " ".join(str(error).split())
            wandb.teardown()
    why = f"{problem}: logging offline. Upload it later: wandb sync {run.path}/wandb/offline-run-*"
    return _defined(wandb.init(**arguments, mode="offline")), why


def _defined(started: Any) -> Any:
    started.define_metric("*", step_metric="step")  # repeated steps are logged again
    return started


def _unreachable(url: str) -> str:
    """Why a server cannot be reached, from a connection alone; empty if it can, or if a proxy leads there."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if urllib.request.getproxies().get(parts.scheme) and not urllib.request.proxy_bypass(host):
        return ""
    try:
        with socket.create_connection((host, parts.port or {"http": 80}.get(parts.scheme, 443)), _CONNECT_SECONDS):
            return ""
    except OSError as error:
        return f"{url} cannot be reached ({error})"
