"""The hardware to plan for: as given by the user, with this machine as the default."""

from dataclasses import dataclass

import psutil

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.planning.scaling import Cluster
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.system.gpus import local_gpus, memory_bandwidth_of, peak_flops_of

CPU_RANKS = 2  # without GPUs: the smallest distributed run


@dataclass(frozen=True)
class Machine:
    """The hardware to plan for.

    Attributes:
        gpu: name of the GPU model.
        gpu_memory_bytes: available to tensors, per GPU. GPUs sold as "80GB" have 80 GiB; the difference is left to
            CUDA, NCCL and fragmentation.
        cluster: number of GPUs and their interconnect.
        host_memory_bytes: per host; None if not known.
        price_per_hour: per GPU.
        on_cpu: ranks compute on CPU cores and share their host's memory.
    """

    gpu: str
    gpu_memory_bytes: int
    cluster: Cluster
    host_memory_bytes: int | None = None
    price_per_hour: float | None = None
    on_cpu: bool = False


@dataclass(frozen=True)
class MachineSpec:
    """Hardware as a user describes it; fields that are None are taken from this machine.

    Attributes:
        gpus: number of GPUs on all hosts.
        gpu: model name, e.g. "H100".
        gpu_memory_bytes: memory for tensors per GPU.
        gpus_per_host: maximum number of GPUs per host.
        host_memory_bytes: memory per host; None if unknown.
        host_bytes_per_second: bandwidth of all network cards of a host together, per direction.
        hosts: number of hosts, if they do not all have the same number of GPUs.
        mfu: fraction of the peak FLOP/s that the forward and backward passes reach.
        price_per_hour: price of a GPU-hour.
        on_cpu: ranks compute on CPU cores.

    Raises:
        ConfigError: when `mfu` is not in (0, 1].
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
            raise ConfigError(f"--mfu {self.mfu:g}: must be a fraction of the peak FLOP/s, above 0 and at most 1.")


def find_machine(recipe: Recipe, spec: MachineSpec | None = None) -> Machine:
    """Return the hardware given by `spec`; anything omitted is taken from this machine's GPUs or CPU cores.

    Raises:
        ConfigError: when the number of GPUs or their memory is neither given nor found here.
    """
    spec = spec or MachineSpec()
    if spec.on_cpu:
        ranks, memory = spec.gpus or CPU_RANKS, psutil.virtual_memory().total
        cluster = Cluster(ranks, spec.host_bytes_per_second, gpus_per_host=ranks, mfu=spec.mfu)
        return Machine("cpu", spec.gpu_memory_bytes or memory // ranks, cluster, memory, spec.price_per_hour, True)
    here = [] if spec.gpus and spec.gpu_memory_bytes and spec.gpu else local_gpus()
    if not (spec.gpus or here) or not (spec.gpu_memory_bytes or here):
        raise ConfigError(
            "this machine has no GPU. Describe the GPUs to plan for, e.g. --gpus 16 --gpu-memory 80GB (--hostfile can "
            "replace --gpus); for CPU ranks set DS_ACCELERATOR=cpu."
        )
    name = spec.gpu or (here[0][0] if here else "H100")
    peak = recipe.logging.peak_tflops * 1e12 if recipe.logging.peak_tflops else peak_flops_of(name)
    if peak is None or (recipe.engine.precision == "fp32" and not recipe.logging.peak_tflops):
        raise ConfigError(
            f"{name}: the peak FLOP/s of this GPU in {recipe.engine.precision} is not known. Set it with "
            "--set logging.peak_tflops=…, or name another GPU, e.g. --gpu H100."
        )
    # Local GPUs report their total memory: reserve 7 % of it, as "80GB" does of 80 GiB.
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
