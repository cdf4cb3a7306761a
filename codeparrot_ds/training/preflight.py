"""Checks before anything is allocated: recipe, DeepSpeed JSON, shards, operators, precision and disk space."""

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.hosts.hostfile import check_launch_command
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.ds_config import (
    load_ds_config,
    nvme_path,
    offload_device,
    required_ops,
    resolve,
    swap_bytes_per_parameter,
)
from codeparrot_ds.run.recipe import Recipe, load_recipe
from codeparrot_ds.run.space import checkpoint_room_bytes, checkpoints_to_come
from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.system.files import make_directory, require_free_space
from codeparrot_ds.system.launched import local_world_size
from codeparrot_ds.tokenizer.directory import TOKENIZER_FILE, require_same_encoding
from codeparrot_ds.training.wandb_run import check_wandb

if TYPE_CHECKING:  # nothing here needs torch at import time, so bad input is rejected before it is loaded
    from codeparrot_ds.training.ranks import Ranks


@dataclass(frozen=True)
class CheckedRun:
    """A run that has passed every check that needs neither other ranks nor memory."""

    recipe: Recipe
    ds_config: dict[str, Any]
    data: Dataset
    run: RunDirectory


def check(recipe_path: Path, overrides: Sequence[str], world_size: int) -> CheckedRun:
    """Check recipe, DeepSpeed JSON, shards, compiler and run directory on this host. Raises UserError."""
    check_launch_command()
    recipe = load_recipe(recipe_path, overrides)
    ds_config = resolve(load_ds_config(recipe.engine.deepspeed), recipe, world_size)
    check_compiler(ds_config)
    if recipe.logging.wandb and os.environ.get("RANK", "0") == "0":
        check_wandb()
    data = check_shards(recipe)
    run = RunDirectory(recipe.run_directory)
    for directory in (run.path, run.checkpoints, run.logs, *([run.exports] if recipe.export.every_steps else [])):
        make_directory(directory)  # each may be a link to another disk
    return CheckedRun(recipe, ds_config, data, run)


def check_shards(recipe: Recipe) -> Dataset:
    """Open the recipe's shards and check their sizes. Raises DataError or ConfigError."""
    data = Dataset.open(recipe.data.sources, recipe.model.seq_len)
    data.order(recipe.seed)  # fails now if the blend weights are invalid
    if recipe.evaluation.sequences:
        data.require_valid()
    manifest = data.manifests[0]
    if manifest.vocab_size != recipe.model.vocab_size:
        raise ConfigError(
            f"{manifest.directory}: its tokenizer has {manifest.vocab_size:,} tokens, but model.vocab_size is "
            f"{recipe.model.vocab_size:,}. Set model.vocab_size={manifest.vocab_size}, or use matching shards."
        )
    start = recipe.model.init_from
    if start is not None and (start / TOKENIZER_FILE).exists():  # weights may come alone, or be gone when a run resumes
        fix = "The weights of model.init_from know other ids: build the shards with its tokenizer."
        require_same_encoding(next(iter(recipe.data.sources)) / "tokenizer", start, fix)
    return data


def scarce_data(data: Dataset, recipe: Recipe) -> str:
    """A warning if there are fewer training sequences than a step reads; else empty."""
    sequences, wanted = len(data.train), recipe.batch.global_batch_size
    if sequences >= wanted:
        return ""
    one = "sequence is" if sequences == 1 else "sequences are"
    return (
        f"{sequences:,} training {one} fewer than the {wanted:,} of one step (batch.global_batch_size), so that each "
        "step reads them more than once. Add data, or lower batch.global_batch_size or model.seq_len."
    )


def check_space(checked: CheckedRun, ranks: "Ranks", parameters: int, step: int) -> None:
    """Raise ConfigError unless this host's disks have enough space for the files that the run writes from `step` on."""
    recipe = checked.recipe
    swap = nvme_path(checked.ds_config)
    needs: list[tuple[Path, int, str]] = []
    if ranks.is_fs_leader:
        to_come = checkpoints_to_come(recipe, step, len(checked.run.checkpoint_directories()))
        is_last = step + to_come * recipe.checkpoints.every_steps >= recipe.schedule.last_step
        if is_last and recipe.checkpoints.every_minutes is None and offload_device(checked.ds_config) == "nvme":
            # The last checkpoint is moved from NVMe, which takes no extra space on the same disk.
            to_come -= swap is not None and disk_of(swap) == disk_of(checked.run.checkpoints)
        writers = Fraction(sum(map(ranks.shares_disk, range(ranks.world_size))), ranks.world_size)
        zero_stage = checked.ds_config["zero_optimization"]["stage"]
        room = checkpoint_room_bytes(recipe, zero_stage, parameters, to_come, writers, ranks.shares_disk(0))
        needs.append((checked.run.checkpoints, room, f"{to_come} more checkpoints"))
        if recipe.export.every_steps is not None:
            left = recipe.schedule.last_step - step
            exports = min(left // recipe.export.every_steps, recipe.export.keep_last + 1)
            bytes_each = parameters * (4 if recipe.export.dtype == "float32" else 2)
            needs.append((checked.run.exports, exports * bytes_each, f"{exports} exported models"))
    if swap is not None and ranks.local_rank == 0:
        share = parameters * local_world_size(ranks.world_size) // ranks.world_size
        needs.append((swap, share * swap_bytes_per_parameter(checked.ds_config), "the offloaded state"))
    by_disk: dict[int, list[tuple[Path, int, str]]] = {}
    for need in needs:
        by_disk.setdefault(disk_of(need[0]), []).append(need)
    for directories, needed, purposes in (zip(*group, strict=True) for group in by_disk.values()):
        require_free_space(directories[0], sum(needed), " and ".join(purposes))


def disk_of(directory: Path) -> int:
    """The number of the file system that a directory, or the one that it links to, is on."""
    return directory.stat().st_dev


def check_compiler(ds_config: Mapping[str, Any]) -> None:
    """Raise ConfigError when DeepSpeed must compile operators but a C++ compiler, ninja or libaio is missing."""
    ops = required_ops(ds_config)
    if not ops:
        return
    compiler = _find_compiler()
    needed = {  # tool -> (Debian package, whether it is found)
        "g++": ("g++", compiler),
        "ninja": ("ninja-build", shutil.which("ninja")),
        "libaio": ("libaio-dev", "async_io" not in ops or (compiler and _has_libaio(compiler))),
    }
    missing = {name: package for name, (package, found) in needed.items() if not found}
    if missing:
        raise ConfigError(
            f"DeepSpeed compiles {' and '.join(ops)} for this configuration, but {' and '.join(missing)} cannot be "
            f"found. Install it (Debian or Ubuntu: `apt-get install {' '.join(missing.values())}`), or use a "
            "configuration without offload, such as ds_configs/zero3.json."
        )


def check_precision(precision: str) -> None:
    """Raise ConfigError when DeepSpeed does not support this precision on the current device."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    supported = {"bf16": device.is_bf16_supported, "fp16": device.is_fp16_supported}
    if precision in supported and not supported[precision]():
        raise ConfigError(
            f"engine.precision: {precision} is not supported on {device.device_name()} devices of this type. "
            f"Use {'bf16' if precision == 'fp16' and device.is_bf16_supported() else 'fp32'}."
        )


def _find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def _has_libaio(compiler: str) -> bool:
    """Whether a program that uses libaio can be compiled and linked: the library without headers is not enough."""
    flags = [shlex.split(os.environ.get(name, "")) for name in ("CFLAGS", "LDFLAGS")]  # DeepSpeed uses them too
    source = "#include <libaio.h>\nint main() { return io_queue_init(1, nullptr); }"
    with tempfile.TemporaryDirectory() as directory:
        command = [compiler, *flags[0], "-x", "c++", "-", *flags[1], "-laio", "-o", f"{directory}/probe"]
        return (
            subprocess.run(
                command, input=source, encoding="utf-8", errors="replace", capture_output=True, check=False
            ).returncode
            == 0
        )
