"""Start `deepspeed` after everything that can be checked here has been checked."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from codeparrot_ds.cluster.hostfile import read_hostfile
from codeparrot_ds.errors import ConfigError
from codeparrot_ds.jobs import say
from codeparrot_ds.recipe import load_recipe

_CPU_RANKS = 2  # without a GPU: as many as it takes to be a distributed run


def launch(recipe: Path, hostfile: Path | None, ranks: int | None, overrides: Sequence[str]) -> int:
    """Train `recipe` with deepspeed and return its exit code.

    Raises ConfigError or ClusterError for what is wrong before anything starts.
    """
    batch = load_recipe(recipe, overrides).batch
    environment = dict(os.environ)
    if hostfile is not None:
        read_hostfile(hostfile)
        if ranks is not None:
            raise ConfigError("--ranks counts processes on this machine; with --hostfile its slots decide.")
    elif (gpus := _count_gpus()) == 0:
        ranks = ranks or _CPU_RANKS
        environment["DS_ACCELERATOR"] = "cpu"
    else:
        # As many GPUs as the global batch can be dealt to evenly.
        ranks = ranks or max(n for n in range(1, gpus + 1) if batch.global_batch_size % n == 0)
    command = deepspeed_command(recipe, hostfile, ranks, overrides)
    accelerator = "DS_ACCELERATOR=cpu " if environment.get("DS_ACCELERATOR") == "cpu" else ""
    say(f"$ {accelerator}{shlex.join(command)}")
    return subprocess.run(command, env=environment, check=False).returncode


def _count_gpus() -> int:
    """GPUs that torch can use here; 0 when the user asks for the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def deepspeed_command(recipe: Path, hostfile: Path | None, ranks: int | None, overrides: Sequence[str]) -> list[str]:
    """The command that a user could type."""
    command = [_find_deepspeed(), "--quiet"]
    if hostfile is not None:
        command += ["--hostfile", str(hostfile)]
    if ranks is not None:
        command += ["--num_gpus", str(ranks)]
    command += ["--module", "codeparrot_ds.train", str(recipe)]
    return command + [part for override in overrides for part in ("--set", override)]


def _find_deepspeed() -> str:
    """`deepspeed` if PATH has the one of this environment, else its path."""
    beside = Path(sys.executable).with_name("deepspeed")
    on_path = shutil.which("deepspeed")
    if beside.exists():
        return "deepspeed" if on_path and Path(on_path).samefile(beside) else str(beside)
    if on_path is None:
        raise ConfigError("`deepspeed` is not on PATH. Install it: pip install deepspeed==0.19.8")
    return "deepspeed"
