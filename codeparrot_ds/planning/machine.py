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


@dataclass(frozen=True)
class MachineSpec:
    """What a user says of the machines; what is None is looked up on this one.

    Attributes:
        gpus: how many, of all hosts.
        gpu: name, e.g. "H100".
        gpu_memory_bytes: for tensors, per GPU.
        gpus_per_host: the most.
        host_memory_bytes: per host; None if not known.
        host_bytes_per_second: of all network cards of a host together, each way.
        hosts: how many, where not all have the same number of GPUs.
        mfu: share of the peak FLOP/s that forward and backward passes reach.
        price_per_hour: per GPU.
        on_cpu: ranks compute on CPU cores.

    Raises ConfigError for an MFU that is no share.
    """

    gpus: int | None = None
    gpu: str | None = None
    gpu_memory_bytes: int | None = None
    gpus_per_host: int = 8
    host_memory_bytes: int | None = None
    host_bytes_per_second: float = 25e9
    hosts: int | None = None
    mfu: float = 0.4
    price_per_hour: float | None = None
    on_cpu: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"--mfu {self.mfu:g}: a share of the peak, above 0 and at most 1.")


def find_machine(recipe: Recipe, spec: MachineSpec | None = None) -> Machine:
    """What is said, and for the rest this machine: its GPUs, or its CPU cores.

    Raises ConfigError when nobody says how many GPUs there are, and how large.
    """
    spec = spec or MachineSpec()
    if spec.on_cpu:
        ranks, memory = spec.gpus or CPU_RANKS, psutil.virtual_memory().total
        cluster = Cluster(ranks, spec.host_bytes_per_second, gpus_per_host=ranks, mfu=spec.mfu)
        return Machine("cpu", spec.gpu_memory_bytes or memory // ranks, cluster, memory, spec.price_per_hour, True)
    here = [] if spec.gpus and spec.gpu_memory_bytes and spec.gpu else local_gpus()
    if not (spec.gpus or here) or not (spec.gpu_memory_bytes or here):
        raise ConfigError(
            "no GPU here, and nobody says what there will be. Say it, as in --gpus 16 --gpu-memory 80GB (or --hostfile "
            "for --gpus); for CPU ranks set DS_ACCELERATOR=cpu."
        )
    name = spec.gpu or (here[0][0] if here else "H100")
    peak = recipe.logging.peak_tflops * 1e12 if recipe.logging.peak_tflops else peak_flops_of(name)
    if peak is None or (recipe.engine.precision == "fp32" and not recipe.logging.peak_tflops):
        raise ConfigError(
            f"{name}: how fast such a GPU is at most in {recipe.engine.precision} is not known here. Say it: "
            "--set logging.peak_tflops=…, or another GPU: --gpu H100."
        )
    # Of GPUs that are here all memory is known: 7 % of it are left, as those of "80GB" leave of their 80 GiB.
    memory = spec.gpu_memory_bytes or int(0.93 * min(total for _, total in here))
    cluster = Cluster(
        spec.gpus or len(here),
        spec.host_bytes_per_second,
        spec.gpus_per_host,
        spec.hosts,
        gpu_flops=peak,
        mfu=spec.mfu,
        memory_bytes_per_second=memory_bandwidth_of(name) or Cluster.memory_bytes_per_second,
    )
    return Machine(name, memory, cluster, spec.host_memory_bytes, spec.price_per_hour)
