"""Saving, publishing and resuming. A checkpoint becomes visible only when every rank's files are on disk.

The protocol: (1) all ranks save into `step-N.tmp`; (2) each rank flushes and hashes its files, while training
continues; (3) all ranks synchronize, and proceed only if none has failed; (4) rank 0 writes the manifest, (5) renames
the directory, (6) replaces `latest` and (7) removes old checkpoints.
DeepSpeed's own `latest` is never written: rank 0 would publish it before the other ranks' files are on disk.

Where each host stores its ranks' files on its own disk, one rank per disk takes the role of rank 0 with the same
manifest of all files, and all ranks synchronize again between (4) and (5): see disks.py.
"""

import contextlib
import dataclasses
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.checkpoint.zero import rank_of_file
from codeparrot_ds.errors import CheckpointError, list_problems
from codeparrot_ds.run.changes import ENGINE, ON_RESUME, flatten
from codeparrot_ds.run.directory import Checkpoint, RunDirectory, classes_in_checkpoints, step_of
from codeparrot_ds.system.files import digest_file, flush_to_disk
from codeparrot_ds.training import disks, reshard
from codeparrot_ds.training.engine import keep_settings, silence_prints
from codeparrot_ds.training.metrics import log
from codeparrot_ds.training.ranks import Ranks
from codeparrot_ds.training.settings import changes_since


@dataclass(frozen=True)
class Saving:
    """A checkpoint whose files are being written. Call `publish` once no rank is `busy`.

    Attributes:
        engine: the DeepSpeed engine, with our `CheckpointWriter`.
        run: the run directory to save in.
        checkpoint: the manifest, without its list of files.
        ranks: of the run; all of them must publish.
    """

    engine: Any
    run: RunDirectory
    checkpoint: Checkpoint
    ranks: Ranks

    @classmethod
    def begin(
        cls,
        engine: Any,
        run: RunDirectory,
        checkpoint: Checkpoint,
        ranks: Ranks,
        *,
        background: bool = False,
        last: bool = False,
    ) -> "Saving":
        """Start saving into a temporary directory. Collective: all ranks must call, and publish before the next save.

        Args:
            engine: the DeepSpeed engine to save.
            run: the run directory to save in.
            checkpoint: the manifest, without its list of files.
            ranks: of the run.
            background: only copy the state to host memory before returning, so that training can continue.
            last: the engine is not used afterwards, so state on NVMe is moved into the checkpoint.

        Raises:
            CheckpointError: on a rank that could not write. When that rank exits, the launcher kills the others, which
                may be waiting in DeepSpeed's own barrier.
        """
        saving = cls(engine, run, checkpoint, ranks)
        if ranks.is_fs_leader:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in run.checkpoints.glob("step-*.tmp"):  # left by a crash, at this step or another
                shutil.rmtree(leftover, ignore_errors=True)
        ranks.gather(None)  # no rank writes until leftovers are removed
        with saving._explained():
            engine.checkpoint_engine.begin(background)
            state = {"step": checkpoint.step, "samples_seen": checkpoint.samples_seen}
            _save_engine(engine, saving._unfinished, state, ranks.rank, last)
            if background:
                engine.checkpoint_engine.start()
        return saving

    @property
    def _unfinished(self) -> Path:
        return self.run.unfinished(self.checkpoint.step)

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return bool(self.engine.checkpoint_engine.busy)

    def publish(self, keep_last: int, keep_every_steps: int | None = None) -> None:
        """Wait for the files of all ranks, publish the checkpoint and remove old ones. Collective: all ranks must call.

        Args:
            keep_last: number of newest checkpoints to keep.
            keep_every_steps: also keep every checkpoint whose step is a multiple of this.

        Raises:
            CheckpointError: on all ranks, when any could not write. Older checkpoints are then untouched.
        """
        files: dict[str, dict[str, Any]] = {}
        failure: CheckpointError | None = None
        try:
            with self._explained():
                writer = self.engine.checkpoint_engine
                writer.wait()
                files = _list_files(self._unfinished, self.ranks.rank, writer.files)
                if self.ranks.on_many_disks:
                    files = {name: {**entry, "host": socket.gethostname()} for name, entry in files.items()}
        except CheckpointError as error:
            failure = error
        self.ranks.agree(failure)
        files_of_all_ranks = self.ranks.gather(files)
        merged = {name: entry for files in files_of_all_ranks for name, entry in files.items()}
        if self.ranks.is_fs_leader:
            here = [files for rank, files in enumerate(files_of_all_ranks) if self.ranks.shares_disk(rank)]
            try:
                with self._explained():
                    checkpoint = dataclasses.replace(self.checkpoint, files=merged)
                    _prepare(checkpoint, self._unfinished, [name for files in here for name in files])
            except CheckpointError as error:
                failure = error
        self.ranks.agree(failure)  # no disk publishes it until all have the manifest
        if self.ranks.is_fs_leader:
            self.run.publish(self.checkpoint.step)
        if self.ranks.on_many_disks:  # no disk removes an old one until all have published this one
            self.ranks.gather(None)
        if self.ranks.is_fs_leader:
            # DeepSpeed copies its converter scripts here. They load pickles and are never used.
            for script in self.run.checkpoints.glob("zero_to_*.py"):
                script.unlink()
            for old in self.run.checkpoint_directories()[:-keep_last]:
                if keep_every_steps is None or step_of(old) % keep_every_steps:
                    _remove(old)
        self.ranks.gather(None)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self.run.checkpoints).free
            message = (
                f"{self._unfinished}: rank {self.ranks.rank} could not save ({error}), with {free / 1e6:,.1f} MB free "
                "on this disk. Older checkpoints are untouched."
            )
            log.error("%s", message)
            raise CheckpointError(message) from error


def _remove(directory: Path) -> None:
    """Remove a published checkpoint. A crash leaves it complete, or under a name that the next save removes."""
    unpublished = directory.with_name(f"{directory.name}.removed.tmp")
    shutil.rmtree(unpublished, ignore_errors=True)
    directory.rename(unpublished)
    shutil.rmtree(unpublished)


def abandon_after(run: RunDirectory, newest: Path) -> None:
    """Remove the checkpoints after `newest`, to which the run is rewound. To be called by one rank per disk."""
    run.point_latest_at(newest)
    for directory in reversed(run.checkpoint_directories()):
        if step_of(directory) > step_of(newest):
            _remove(directory)
    flush_to_disk(run.checkpoints)


def _save_engine(engine: Any, directory: Path, state: dict[str, Any], rank: int, last: bool) -> None:
    def save_engine() -> None:
        engine.save_checkpoint(str(directory.parent), tag=directory.name, client_state=state, save_latest=False)

    swapper = getattr(engine.optimizer, "optimizer_swapper", None)
    if swapper is None or not last:
        save_engine()
        return
    # DeepSpeed would copy the files on NVMe, most of the checkpoint. Show it an empty directory and move them instead.
    swapped = Path(swapper.swap_folder)
    with tempfile.TemporaryDirectory(dir=swapped.parent) as empty:
        swapper.swap_folder = empty
        save_engine()
    for file in swapped.glob("*.tensor.swp"):
        if "_gradient_" not in file.name:
            shutil.move(file, directory / "offloaded_tensors" / f"rank{rank:02d}" / file.name)


def _prepare(checkpoint: Checkpoint, unfinished: Path, here: Collection[str]) -> None:
    """Write the manifest. Raises CheckpointError when any of the files that must be `here` is missing."""
    absent = [name for name in here if not (unfinished / name).is_file()]
    if absent:
        raise CheckpointError(
            list_problems(
                str(unfinished),
                [f"{name} was written by another host and is not visible here" for name in absent],
                "Put the run directory on a disk shared by all hosts.",
            )
        )
    checkpoint.write(unfinished)
    for directory in (*filter(Path.is_dir, unfinished.rglob("*")), unfinished, unfinished.parent):
        flush_to_disk(directory)


def _list_files(directory: Path, rank: int, digested: dict[Path, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return size and digest of the files this rank wrote, and fsync them; entries of `digested` are reused."""
    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path in digested:
            files[name] = digested[path]
        elif path.is_file() and (rank_of_file(name) or 0) == rank:
            flush_to_disk(path)
            files[name] = {"bytes": path.stat().st_size, "xxh3_128": digest_file(path)}
    return files


def check_identity(checkpoint: Checkpoint, wanted: dict[str, Any], settings: Mapping[str, Any] | None = None) -> None:
    """Raise CheckpointError unless the checkpoint's model, data, etc. match `wanted`, a `Recipe.identity`.

    Args:
        checkpoint: to resume from. Its identity has fewer keys if an older version wrote it.
        wanted: the identity of the run.
        settings: of the checkpoint, for such keys, if known.
    """
    saved = {**(settings or {}), **flatten(checkpoint.identity)}
    problems = [
        f"{key}: saved with {saved.get(key)}, now {value}"
        for key, value in wanted.items()
        if saved.get(key, value if key in ON_RESUME else None) != value
    ]
    if problems:
        fix = "Resume with the settings it was saved with, or start a run under another name (--set name=…)."
        raise CheckpointError(list_problems(str(checkpoint.path), problems, fix))


def load_checkpoint(engine: Any, checkpoint: Checkpoint, like: Checkpoint, ranks: Ranks) -> None:
    """Load weights and optimizer state. No pickle that could run code is loaded. Collective: all ranks must call.

    `like` describes what this run would save. A checkpoint with a different ZeRO stage, world size, precision, location
    of the optimizer state or other `zero_optimization` settings (some of which order its tensors) is loaded parameter
    by parameter, and so is any with optimizer state on NVMe: DeepSpeed 0.19.8 copies its files back, but does not
    restore AdamW's step, drops its moments, and leaves groups below 1 MiB as initialized.
    """
    layout = ("zero_stage", "world_size", "precision", "offload")
    differing = [name for name in layout if getattr(checkpoint, name) != getattr(like, name)]
    if differing:
        for name in differing:
            log.info(
                "%s: saved with %s %s, now %s",
                checkpoint.path.name,
                name.replace("_", " "),
                getattr(checkpoint, name),
                getattr(like, name),
            )
    zero_changed = any(
        key.startswith(f"{ENGINE}zero_optimization.") for key in changes_since(checkpoint, like.settings or {})
    )
    by_parameter = bool(differing) or zero_changed or checkpoint.universal or checkpoint.offload == "nvme"
    if ranks.on_many_disks:
        needed = [name for name in checkpoint.files if by_parameter or rank_of_file(name) in (None, ranks.rank)]
        disks.fetch(checkpoint, ranks, needed)
    if by_parameter:
        reshard.load_resharded(engine, checkpoint, ranks)
        return
    torch.serialization.add_safe_globals(classes_in_checkpoints())
    with silence_prints(), keep_settings(engine):
        path, state = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    if path is None or state["samples_seen"] != checkpoint.samples_seen:
        raise CheckpointError(f"{checkpoint.path}: DeepSpeed could not load it. Remove it to resume from an older one.")
