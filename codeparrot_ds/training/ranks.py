"""Identity of a rank, setup of the process group, and the collectives that training needs besides DeepSpeed's."""

import logging
import os
import secrets
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from codeparrot_ds.errors import ClusterError, ConfigError, UserError, list_problems
from codeparrot_ds.hosts.working_directory import LAUNCHER
from codeparrot_ds.system.files import as_user_error
from codeparrot_ds.system.launched import local_world_size
from codeparrot_ds.system.network import free_port
from codeparrot_ds.system.processes import kill_with_parent


@dataclass(frozen=True)
class Ranks:
    """This process's view of the ranks of a run.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: number of processes, one per GPU.
        local_rank: rank on this host.
        device: device of this rank.
        control: CPU process group for collectives that neither wait for a device nor interleave with DeepSpeed's.
        disk_of: for every rank, the lowest rank that sees the same run directory and therefore manages that disk. All
            zeros, or empty, where all hosts share one disk.
        disks: CPU process group of the ranks that manage a disk; None with a single disk.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: Any = None
    disk_of: tuple[int, ...] = ()
    disks: Any = None

    @property
    def is_fs_leader(self) -> bool:
        """Whether this rank manages (creates, renames, removes) the files in the run directory that it sees."""
        return self.rank == (self.disk_of[self.rank] if self.disk_of else 0)

    @property
    def on_many_disks(self) -> bool:
        """Whether hosts store their ranks' files on separate disks."""
        return any(self.disk_of)

    def shares_disk(self, rank: int) -> bool:
        """Whether this rank sees the files that `rank` writes."""
        return not self.disk_of or self.disk_of[rank] == self.disk_of[self.rank]

    def slice(self, share: int) -> slice:
        """Return this rank's slice of a global array that is split into `share` items per rank, in rank order."""
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place. Collective: all ranks must call. int64 sums wrap modulo 2^64."""
        dist.all_reduce(values)
        return values

    def sum_on_host(self, values: Sequence[int]) -> list[int]:
        """Sum each of the int64 `values` over ranks, modulo 2^64, on the CPU. Collective: all ranks must call."""
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, group=self.control)
        return [int(value) for value in tensor.tolist()]

    def begin_max(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """Start an all-reduce of the maximum of each of `values`. Collective: all ranks must call.

        Returns:
            A function that waits for the result and returns it.
        """
        tensor = torch.tensor(values)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def finish() -> list[int]:
            work.wait()
            return [int(value) for value in tensor.tolist()]

        return finish

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's picklable `value`, in rank order. Collective: all ranks must call."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def agree(self, failure: UserError | None, heading: str = "") -> None:
        """Raise on every rank when any rank has a `failure`, so that none waits for it. All ranks must call.

        Every rank raises the error of the lowest rank that failed. In a job that spans hosts, its message names each
        host that failed, under `heading`.
        """
        found = self.gather(None if failure is None else (socket.gethostname(), type(failure), str(failure)))
        failures = list(filter(None, found))
        if not failures:
            return
        kind, message = failures[0][1:]
        if local_world_size(self.world_size) < self.world_size:
            problems = sorted({f"host {host}: {text}" for host, _, text in failures})
            message = list_problems(heading, problems) if heading else "; ".join(problems)
        raise kind(message)

    def call(self, function: Callable[..., None], *arguments: Any, heading: str = "") -> None:
        """Call a function that may raise UserError or OSError on some ranks; then all raise. All ranks must call."""
        failure = None
        try:
            function(*arguments)
        except (UserError, OSError) as error:
            failure = as_user_error(error)
            if failure is None:
                raise
        self.agree(failure, heading)


def die_with_launcher() -> None:
    """Have the kernel kill this rank when DeepSpeed's launcher dies: after a SIGKILL its ranks would keep training."""
    parent = psutil.Process(os.getppid())
    if LAUNCHER in parent.cmdline():
        kill_with_parent(parent.pid)


def join(*, supervised: bool = False) -> Ranks:
    """Join the process group through DeepSpeed, and silence harmless messages of DeepSpeed and transformers.

    Raises ConfigError when the port is in use, unless `supervised`: then the next attempt uses another port.
    """
    _quieten_libraries()
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", free_port())
    on_this_host = local_world_size(1)
    # Our checkpoints hold only tensors and plain values, so pickles that could run code are refused everywhere.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() == "cpu":
        _prepare_cpu(on_this_host)
        device = torch.device("cpu")
    else:
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
            # Expandable segments avoid fragmentation by activations of different sizes.
            os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    if on_this_host < int(os.environ["WORLD_SIZE"]) and "GLOO_SOCKET_IFNAME" not in os.environ:
        _choose_interface()
    try:
        deepspeed.init_distributed(verbose=False)
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error) or supervised:
            raise
        port = os.environ["MASTER_PORT"]
        raise ConfigError(
            f"port {port} of {socket.gethostname()} is in use, perhaps by another run. Name a free one: "
            f"`deepspeed --master_port {int(port) + 1} ...`. `codeparrot-ds launch` finds one by itself."
        ) from None
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device, dist.new_group(backend="gloo"))


def _choose_interface() -> None:
    """Make gloo use the network interface that routes to rank 0. By default it resolves this host's name, which on many
    machines is the loopback address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((os.environ["MASTER_ADDR"], 9))
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == own for each in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _prepare_cpu(ranks: int) -> None:
    """Configure threads and operators for ranks that compute on CPU cores."""
    import deepspeed

    if "OMP_NUM_THREADS" not in os.environ:
        # One thread per core: ranks that each use all cores slow each other down.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    # DeepSpeed would compile this inference-only op here, which takes about 100 s and needs a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def find_disks(ranks: Ranks, directory: Path) -> Ranks:
    """Return `ranks` with `disk_of` and `disks` set by which ranks share `directory`. Collective: all ranks must call.

    Raises:
        ClusterError: on all ranks, when a host cannot write to `directory`.
    """
    token, failure = None, None
    if ranks.local_rank == 0:
        token = directory / f".seen-by-{secrets.token_hex(8)}"  # a unique name, which no file server has cached
        try:
            token.touch()
        except OSError as error:
            failure = f"host {socket.gethostname()}: {directory}: cannot write here ({error.strerror})"
    try:
        tokens, failures = zip(*ranks.gather((token, failure)), strict=True)
        if any(failures):
            raise ClusterError("; ".join(filter(None, failures)))
        seen = [each is not None and each.exists() for each in tokens]
        disk_of = tuple(ranks.gather(seen.index(True)))
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    several = len(set(disk_of)) > 1
    return replace(
        ranks, disk_of=disk_of, disks=dist.new_group(sorted(set(disk_of)), backend="gloo") if several else None
    )


def leave() -> None:
    """Leave the process group after a barrier, so that no rank exits while another waits for it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _quieten_libraries() -> None:
    import transformers

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(deepspeed|torch|transformers)\b")
