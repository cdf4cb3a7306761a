"""What launchers and schedulers tell a process: its number among those that were started with it, by variables."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from codeparrot_ds.errors import ConfigError


class _Launcher(NamedTuple):
    """Names of a launcher's variables; `only` is one that no other sets. Empty where it has none."""

    rank: str
    world_size: str
    only: str
    local_rank: str = ""
    local_world_size: str = ""


# mpirun starts its daemons by srun inside a Slurm job, so what it says of itself counts first.
_MPIRUN = _Launcher(
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
# In a batch script outside srun there is no step. Slurm writes "2(x3),1" of the tasks on each node.
_SRUN = _Launcher("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
_TORCHRUN = _Launcher("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_PMI = _Launcher("PMI_RANK", "PMI_SIZE", "PMI_RANK")  # MPICH, Intel MPI
# DeepSpeed's launcher sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE and CROSS_RANK, the place of a host.
_OF_RANKS = re.compile(
    r"^(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_SIZE|LOCAL_WORLD_SIZE|CROSS_\w+|MASTER_\w+|TORCHELASTIC_\w+|OMPI_\w+|PMI\w*)$"
)


def task_of_launcher(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(rank, world size) of one of several processes that mpirun, srun, torchrun or another MPI has started."""
    for launcher in (_MPIRUN, _SRUN, _TORCHRUN, _PMI):
        if {launcher.rank, launcher.world_size, launcher.only} <= environment.keys():
            rank, world_size = int(environment[launcher.rank]), int(environment[launcher.world_size])
            if world_size > 1:
                return rank, world_size
    return None


def rank_of_scheduler(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK and its kin where a scheduler, not deepspeed or torchrun, has started the ranks: mpirun or srun.

    Without them each rank would train on its own. Raises ConfigError when nobody says where rank 0 is.
    """
    if "RANK" in environment:
        return {}
    for launcher in (_MPIRUN, _SRUN):
        if int(environment.get(launcher.world_size, "1")) > 1:
            if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
                raise ConfigError(
                    f"{environment[launcher.world_size]} ranks were started by a scheduler, and nothing says where "
                    "they meet. Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there."
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
    """Ranks on this host, by what deepspeed (LOCAL_SIZE) or torchrun (LOCAL_WORLD_SIZE) says; else all of them."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what a launcher has told a rank, for a process that is none."""
    return {name: value for name, value in environment.items() if not _OF_RANKS.match(name)}
