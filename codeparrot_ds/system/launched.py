"""Rank and world size from the environment variables that launchers and schedulers set."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from codeparrot_ds.errors import ConfigError


class _Launcher(NamedTuple):
    """Variable names of one launcher; `only` is one that no other launcher sets. Empty where there is none."""

    rank: str
    world_size: str
    only: str
    local_rank: str = ""
    local_world_size: str = ""


# Inside a Slurm job, mpirun starts its daemons with srun, so its own variables take precedence.
_MPIRUN = _Launcher(
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
# A batch script outside srun has no step. Slurm writes the number of tasks on each node as "2(x3),1".
_SRUN = _Launcher("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
_TORCHRUN = _Launcher("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_PMI = _Launcher("PMI_RANK", "PMI_SIZE", "PMI_RANK")  # MPICH, Intel MPI
# DeepSpeed's launcher sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE and CROSS_RANK, the index of the host.
_OF_RANKS = re.compile(
    r"^(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_SIZE|LOCAL_WORLD_SIZE|CROSS_\w+|MASTER_\w+|TORCHELASTIC_\w+|OMPI_\w+|PMI\w*)$"
)


def task_of_launcher(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(rank, world size) if mpirun, srun, torchrun or another MPI started this process as one of several, else None."""
    for launcher in (_MPIRUN, _SRUN, _TORCHRUN, _PMI):
        if {launcher.rank, launcher.world_size, launcher.only} <= environment.keys():
            rank, world_size = int(environment[launcher.rank]), int(environment[launcher.world_size])
            if world_size > 1:
                return rank, world_size
    return None


def rank_of_scheduler(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE for ranks started by mpirun or srun, not by deepspeed or torchrun.

    Without them each rank would train on its own. Raises ConfigError when the address of rank 0 is not set.
    """
    if "RANK" in environment:
        return {}
    for launcher in (_MPIRUN, _SRUN):
        if int(environment.get(launcher.world_size, "1")) > 1:
            if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
                raise ConfigError(
                    f"a scheduler started {environment[launcher.world_size]} ranks, but their rendezvous address is "
                    "not set. Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there."
                )
            found = {
                "WORLD_SIZE": launcher.world_size,
                "RANK": launcher.rank,
                "LOCAL_RANK": launcher.local_rank,
                "LOCAL_SIZE": launcher.local_world_size,
            }
            return {name: environment[source].partition("(")[0].partition(",")[0] for name, source in found.items()}
    return {}


def local_world_size(world_size: int) -> int:
    """Number of ranks on this host, as set by deepspeed (LOCAL_SIZE) or torchrun (LOCAL_WORLD_SIZE); else all ranks."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without launcher variables, for a child process that is not a rank."""
    return {name: value for name, value in environment.items() if not _OF_RANKS.match(name)}
