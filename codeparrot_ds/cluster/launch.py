"""Start `deepspeed` for a recipe. Every rank checks the rest (shards, DeepSpeed JSON, compiler) before it allocates."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from codeparrot_ds.cluster.hostfile import read_hostfile
from codeparrot_ds.errors import ConfigError
from codeparrot_ds.jobs import say
from codeparrot_ds.recipe import Batch, load_recipe

_DEEPSPEED_PORT = 29500  # its default `--master_port`
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
        ranks = ranks or _most_ranks(batch, gpus)
    command = deepspeed_command(recipe, hostfile, ranks, overrides)
    accelerator = "DS_ACCELERATOR=cpu " if environment.get("DS_ACCELERATOR") == "cpu" else ""
    say(f"$ {accelerator}{shlex.join(command)}")
    return subprocess.run(command, env=environment, check=False).returncode


def _most_ranks(batch: Batch, gpus: int) -> int:
    """The largest number of GPUs to which the recipe's batch can be dealt."""
    for ranks in range(gpus, 1, -1):
        try:
            batch.micro_batch_and_accumulation(ranks)
        except ConfigError:
            continue
        return ranks
    return 1


def _port_options() -> list[str]:
    """Another port than DeepSpeed's where that one is taken, as by a second run on this machine."""
    for port in (_DEEPSPEED_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            found = probe.getsockname()[1]
            return [] if found == _DEEPSPEED_PORT else ["--master_port", str(found)]
    return []


def _count_gpus() -> int:
    """GPUs that torch can use here; 0 when the user asks for the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def deepspeed_command(recipe: Path, hostfile: Path | None, ranks: int | None, overrides: Sequence[str]) -> list[str]:
    """The command that a user could type."""
    command = [_find_deepspeed(), "--quiet"]
    if hostfile is None:
        command += _port_options()
    else:
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
