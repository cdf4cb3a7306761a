"""What there is to run on: as a user says it, and for the rest this machine."""

from dataclasses import dataclass

import psutil

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.planning.scaling import Cluster
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.system.gpus import local_gpus, memory_bandwidth_of, peak_flops_of

CPU_RANKS = 2  # without a GPU: as many as it takes to be a distributed run


@dataclass(frozen=True)
class Machine:
    """What there is to run on.

    Attributes:
        gpu: its name.
        gpu_memory_bytes: for tensors. GPUs of "80GB" have 80 GiB: what lies between is left to CUDA, NCCL and holes.
        cluster: how many, and what joins them.
        host_memory_bytes: of each host; None if not known.
        price_per_hour: of a GPU.
        on_cpu: ranks compute on CPU cores, and share their host's memory.
    """

    gpu: str
    gpu_memory_bytes: int
    cluster: Cluster
    host_memory_bytes: int | None = None
    price_per_hour: float | None = None
    on_cpu: bool = False


def find_machine(
    recipe: Recipe,
    gpus: int | None = None,
    *,
    gpu: str | None = None,
    gpu_memory_bytes: int | None = None,
    gpus_per_host: int = 8,
    host_memory_bytes: int | None = None,
    host_bytes_per_second: float = 25e9,
    hosts: int | None = None,
    mfu: float = 0.4,
    price_per_hour: float | None = None,
    on_cpu: bool = False,
) -> Machine:
    """What is said, and for the rest this machine: its GPUs, or its CPU cores.

    Raises ConfigError when nobody says how many GPUs there are, and how large.
    """
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g}: a share of the peak, above 0 and at most 1.")
    if on_cpu:
        ranks, memory = gpus or CPU_RANKS, psutil.virtual_memory().total
        cluster = Cluster(ranks, host_bytes_per_second, gpus_per_host=ranks, mfu=mfu)
        return Machine("cpu", gpu_memory_bytes or memory // ranks, cluster, memory, price_per_hour, True)
    here = [] if gpus and gpu_memory_bytes and gpu else local_gpus()
    if not (gpus or here) or not (gpu_memory_bytes or here):
        raise ConfigError(
            "no GPU here, and nobody says what there will be. Say it, as in --gpus 16 --gpu-memory 80GB (or --hostfile "
            "for --gpus); for CPU ranks set DS_ACCELERATOR=cpu."
        )
    name = gpu or (here[0][0] if here else "H100")
    peak = recipe.logging.peak_tflops * 1e12 if recipe.logging.peak_tflops else peak_flops_of(name)
    if peak is None or (recipe.engine.precision == "fp32" and not recipe.logging.peak_tflops):
        raise ConfigError(
            f"{name}: how fast such a GPU is at most in {recipe.engine.precision} is not known here. Say it: "
            "--set logging.peak_tflops=…, or another GPU: --gpu H100."
        )
    # Of GPUs that are here all memory is known: 7 % of it are left, as those of "80GB" leave of their 80 GiB.
    memory = gpu_memory_bytes or int(0.93 * min(total for _, total in here))
    cluster = Cluster(
        gpus or len(here),
        host_bytes_per_second,
        gpus_per_host,
        hosts,
        gpu_flops=peak,
        mfu=mfu,
        memory_bytes_per_second=memory_bandwidth_of(name) or Cluster.memory_bytes_per_second,
    )
    return Machine(name, memory, cluster, host_memory_bytes, price_per_hour)
