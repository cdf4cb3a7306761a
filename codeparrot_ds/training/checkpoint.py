"""Saving, publishing and resuming. A checkpoint becomes visible only when every rank's files are on disk.

The protocol: (1) all ranks save into `step-N.tmp`; (2) each flushes and hashes its files, while training goes on;
(3) all meet, which they do only if all went well; (4) rank 0 writes the manifest; (5) renames the directory;
(6) replaces `latest`; (7) removes old ones.
DeepSpeed's own `latest` is never written: rank 0 would publish it before the other ranks' files are on disk.

Where hosts keep what their ranks write each on its own disk, one rank of each does what rank 0 does here, with the
same manifest of all files, and all meet again between (4) and (5): see disks.py.
"""

import contextlib
import dataclasses
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.checkpoint.zero import rank_of_file
from codeparrot_ds.errors import CheckpointError, list_problems
from codeparrot_ds.run.directory import Checkpoint, RunDirectory, classes_in_checkpoints, step_of
from codeparrot_ds.system.files import digest_file, flush_to_disk
from codeparrot_ds.training import disks, reshard
from codeparrot_ds.training.engine import silence_prints
from codeparrot_ds.training.metrics import log
from codeparrot_ds.training.ranks import Ranks


@dataclass(frozen=True)
class Saving:
    """A checkpoint whose files are on their way to disk: `publish` it when no rank is `busy` any more.

    Attributes:
        engine: DeepSpeed's, with our writer.
        run: where it goes.
        checkpoint: its manifest, still without files.
        ranks: all of them must publish.
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
        """Save into a directory that is not yet a checkpoint; all ranks must call, and publish it before the next.

        Args:
            background: copy what is to be written to host memory, and return. Training may go on.
            last: the engine is of no more use afterwards: what is on NVMe is moved into the checkpoint.

        Raises CheckpointError on a rank that could not write: its end makes the launcher end the others, which may be
        waiting in DeepSpeed's own barrier.
        """
        saving = cls(engine, run, checkpoint, ranks)
        if ranks.is_fs_leader:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in run.checkpoints.glob("step-*.tmp"):  # of a crash, at this step or at another
                shutil.rmtree(leftover, ignore_errors=True)
        ranks.gather(None)  # nobody writes before the place is cleared
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
        """Whether this rank still writes."""
        return bool(self.engine.checkpoint_engine.busy)

    def publish(self, keep_last: int, keep_every_steps: int | None = None) -> None:
        """Wait for the files of all ranks, give the checkpoint its name, and remove old ones. All ranks must call.

        Raises CheckpointError on all ranks when one could not write. Older checkpoints are then untouched.
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
        self.ranks.agree(failure)  # no disk has it under its name before all have the manifest
        if self.ranks.is_fs_leader:
            self.run.publish(self.checkpoint.step)
        if self.ranks.on_many_disks:  # no disk removes its part of an old one before all have this one
            self.ranks.gather(None)
        if self.ranks.is_fs_leader:
            # DeepSpeed's own converters: they load pickles, and nothing here runs them.
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
    """Remove a published checkpoint: a crash leaves it whole, or under a name that the next save clears away."""
    doomed = directory.with_name(f"{directory.name}.removed.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed)


def abandon_after(run: RunDirectory, newest: Path) -> None:
    """Remove the checkpoints that are later than `newest`, from which the run goes another way. For one rank a disk."""
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
    # DeepSpeed copies the files on NVMe, which are nearly all of the checkpoint. Let it see none, and move them.
    swapped = Path(swapper.swap_folder)
    with tempfile.TemporaryDirectory(dir=swapped.parent) as empty:
        swapper.swap_folder = empty
        save_engine()
    for file in swapped.glob("*.tensor.swp"):
        if "_gradient_" not in file.name:
            shutil.move(file, directory / "offloaded_tensors" / f"rank{rank:02d}" / file.name)


def _prepare(checkpoint: Checkpoint, unfinished: Path, here: Collection[str]) -> None:
    """Write the manifest. Raises CheckpointError when one of the files that must be `here` did not arrive."""
    absent = [name for name in here if not (unfinished / name).is_file()]
    if absent:
        raise CheckpointError(
            list_problems(
                str(unfinished),
                [f"{name} was written by another host and is not here" for name in absent],
                "Put the run directory on a disk that all hosts share.",
            )
        )
    checkpoint.write(unfinished)
    for directory in (*filter(Path.is_dir, unfinished.rglob("*")), unfinished, unfinished.parent):
        flush_to_disk(directory)


def _list_files(directory: Path, rank: int, digested: dict[Path, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size and digest of the files that this rank wrote, which are then on disk. Those `digested` are there already."""
    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path in digested:
            files[name] = digested[path]
        elif path.is_file() and (rank_of_file(name) or 0) == rank:
            flush_to_disk(path)
            files[name] = {"bytes": path.stat().st_size, "xxh3_128": digest_file(path)}
    return files


def check_identity(checkpoint: Checkpoint, wanted: dict[str, Any]) -> None:
    """Raise CheckpointError unless `checkpoint` is of the `wanted` model, data, …: `Recipe.identity`."""
    saved = checkpoint.identity
    problems = [
        f"{key}: saved with {saved.get(key)}, now {value}" for key, value in wanted.items() if saved.get(key) != value
    ]
    if problems:
        mend = "Go on with what it was saved with, or start under another name (--set name=…)."
        raise CheckpointError(list_problems(str(checkpoint.path), problems, mend))


def load(engine: Any, checkpoint: Checkpoint, like: Checkpoint, ranks: Ranks) -> None:
    """Load weights and optimizer state; nothing that could run code is unpickled. All ranks must call.

    `like` is what this run would save: a checkpoint of another ZeRO stage, number of ranks, precision or place of
    the optimizer's state is read by parameter. So is any whose optimizer is on NVMe: DeepSpeed 0.19.8 copies its files
    back, but not AdamW's step, forgets its moments, and leaves groups below 1 MiB as they were initialised.
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
    by_parameter = bool(differing) or checkpoint.universal or checkpoint.offload == "nvme"
    if ranks.on_many_disks:
        needed = [name for name in checkpoint.files if by_parameter or rank_of_file(name) in (None, ranks.rank)]
        disks.fetch(checkpoint, ranks, needed)
    if by_parameter:
        reshard.load(engine, checkpoint, ranks)
        return
    torch.serialization.add_safe_globals(classes_in_checkpoints())
    with silence_prints():
        path, state = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    if path is None or state["samples_seen"] != checkpoint.samples_seen:
        raise CheckpointError(f"{checkpoint.path}: DeepSpeed could not load it. Remove it to go on from an older one.")
