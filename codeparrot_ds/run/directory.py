"""The layout of a run directory and the manifest of its checkpoints: what training, export and evaluation share.

    runs/NAME/  recipe.yaml  ds_config.json  tokenizer/  status.json  metrics.jsonl  logs/rank_00000.log
                tensorboard/  checkpoints/latest  checkpoints/step-00001000/{manifest.json, DeepSpeed's files}  hf/

A checkpoint is complete when its directory has its final name; `manifest.json` lists size and digest of every file.
"""

import re
import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import CheckpointError, ConfigError, DataError, list_problems
from codeparrot_ds.system.files import (
    FORMAT_VERSION,
    MANIFEST,
    digest_file,
    exclusive_lock,
    flush_to_disk,
    read_json,
    read_manifest,
    write_atomically,
    write_json,
)

_READERS = 4  # files read at once: one thread does not keep a disk busy
_STEP_DIRECTORY = re.compile(r"step-(\d{8,})")


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint directory is named after."""
    return int(checkpoint.name.removeprefix("step-"))


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def ds_config(self) -> Path:
        """The resolved DeepSpeed JSON."""
        return self.path / "ds_config.json"

    @property
    def tokenizer(self) -> Path:
        """Copy of the tokenizer that made the shards, so that the run can be converted without them."""
        return self.path / "tokenizer"

    @property
    def metrics(self) -> Path:
        """One JSON line a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def status_file(self) -> Path:
        """What became of the run; see `write_status`."""
        return self.path / "status.json"

    @property
    def stop_file(self) -> Path:
        """Made by a user to have the run save and end."""
        return self.path / "stop"

    @property
    def lock(self) -> Path:
        """Held by rank 0 while it trains."""
        return self.path / ".lock"

    def in_use(self) -> bool:
        """Whether some process trains here now."""
        if not self.lock.exists():
            return False
        try:
            with exclusive_lock(self.lock, "busy"):
                return False
        except ConfigError:
            return True

    @property
    def launches(self) -> Path:
        """One JSON line an attempt of `codeparrot-ds launch`: when, from which step to which, and why it ended."""
        return self.path / "launches.jsonl"

    @property
    def incidents(self) -> Path:
        """One JSON line a loss spike: its step, its samples and where they come from, and what was done."""
        return self.path / "incidents.jsonl"

    @property
    def skipped_ranges_file(self) -> Path:
        """Stretches of the data's order that are not trained on, after spikes."""
        return self.path / "left_out.json"

    def skipped_ranges(self) -> list[tuple[int, int]]:
        """The stretches of the order, (first place, one past the last), that are left out. Raises DataError."""
        if not self.skipped_ranges_file.exists():
            return []
        stretches = read_json(self.skipped_ranges_file, "list of left out samples")
        try:
            return [(int(start), int(stop)) for start, stop in stretches]
        except (TypeError, ValueError):
            raise DataError(f"{self.skipped_ranges_file}: not a list of [first, one past the last].") from None

    @property
    def logs(self) -> Path:
        """One log file a rank."""
        return self.path / "logs"

    def log(self, rank: int) -> Path:
        """The log file of one rank; the stacks of its threads are in it when it has hung."""
        return self.logs / f"rank_{rank:05d}.log"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Directory of checkpoints."""
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        """Models converted while the run trains."""
        return self.path / "exports"

    def export(self, step: int) -> Path:
        """The model converted from the checkpoint after `step` optimizer steps."""
        return self.exports / f"step-{step:08d}"

    def write_status(self, state: str, **facts: Any) -> None:
        """Replace status.json. States: running, finished, preempted, failed. Exit codes of launchers prove nothing."""
        write_json(self.status_file, {"state": state, **facts})

    def read_status(self) -> dict[str, Any]:
        """What `write_status` wrote last. Raises DataError when the run has none."""
        status = read_json(self.status_file, "run status")
        if not isinstance(status, dict):
            raise DataError(f"{self.status_file}: not a run status.")
        return status

    def checkpoint(self, step: int) -> Path:
        """Directory of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step-{step:08d}"

    def unfinished(self, step: int) -> Path:
        """Where that checkpoint is before it is whole."""
        return self.checkpoints / f"step-{step:08d}.tmp"

    def prepared_steps(self) -> set[int]:
        """Steps whose checkpoint has its manifest, and not yet its name."""
        found = [path for path in self.checkpoints.glob("step-*.tmp") if (path / MANIFEST).is_file()]
        return {int(match[1]) for path in found if (match := _STEP_DIRECTORY.fullmatch(path.stem))}

    def publish(self, step: int) -> None:
        """Give the checkpoint after `step` steps its name, when all its files and its manifest are on disk."""
        final = self.checkpoint(step)
        shutil.rmtree(final, ignore_errors=True)  # the same step, saved again after a fall-back
        self.unfinished(step).rename(final)
        flush_to_disk(self.checkpoints)
        self.point_latest_at(final)

    def set_aside(self, checkpoint: Path) -> None:
        """Rename a damaged checkpoint, so that nobody goes on from it or counts it. Nothing where there is none."""
        if checkpoint.exists():
            aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)  # the same step, damaged for a second time
            checkpoint.rename(aside)

    def checkpoint_directories(self, *, whole: bool = True) -> list[Path]:
        """Every published checkpoint, oldest first, damaged or not. Those still being written have other names.

        One that has lost its manifest is among them only when they need not be `whole`.
        """
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if _STEP_DIRECTORY.fullmatch(path.name)]
        return sorted((path for path in found if not whole or (path / MANIFEST).is_file()), key=step_of)

    def newest_checkpoint(self) -> "Checkpoint":
        """The newest published checkpoint. Raises CheckpointError when there is none, or it is damaged.

        The directories decide, not the `latest` file, which a crash may leave behind by one.
        """
        found = self.checkpoint_directories()
        if not found:
            raise CheckpointError(f"{self.checkpoints}: no complete checkpoint here. Train first, or name another run.")
        return Checkpoint.read(found[-1])

    def point_latest_at(self, checkpoint: Path) -> None:
        """Replace the `latest` file, which DeepSpeed's own tools read."""
        write_atomically(self.checkpoints / "latest", checkpoint.name)


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint and its manifest.

    Attributes:
        path: its directory.
        step: optimizer steps taken.
        samples_seen: position in the data, sequences.
        parameters: of the model, tied ones once.
        zero_stage: 0 to 3.
        world_size: ranks that wrote it.
        precision: "bf16", "fp16" or "fp32".
        identity: what a run must have in common with this checkpoint to go on from it.
        files: name -> {"bytes", "xxh3_128"}, and "host", which wrote it, where each keeps its own on its own disk.
        loss_valid: validation loss at this step (nats per token), or None when not evaluated here.
        offload: where the optimizer's state lived: "none", "cpu" or "nvme".
        universal: a file a tensor, as `convert --to-universal` writes; else as the ranks wrote it.
    """

    path: Path
    step: int
    samples_seen: int
    parameters: int
    zero_stage: int
    world_size: int
    precision: str
    identity: dict[str, Any]
    files: dict[str, dict[str, Any]]
    loss_valid: float | None
    offload: str = "none"
    universal: bool = False

    @property
    def run(self) -> RunDirectory:
        """The run that it is of. A universal checkpoint stands alone: it holds recipe and tokenizer itself."""
        return RunDirectory(self.path if (self.path / "recipe.yaml").is_file() else self.path.parent.parent)

    def write(self, directory: Path) -> None:
        """Write the manifest into `directory`, which becomes `path` when it is renamed."""
        body = {key: value for key, value in vars(self).items() if key != "path"}
        write_json(directory / MANIFEST, {"format_version": FORMAT_VERSION, "kind": "checkpoint", **body})

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint's manifest. Raises CheckpointError."""
        try:
            body = read_manifest(path, "checkpoint")
            body = {"offload": "none", "universal": False, **body}  # version 0.1.0 did not write them
            fields = {key: body[key] for key in cls.__dataclass_fields__ if key != "path"}
            for name in fields["files"]:  # some are fetched from other hosts, to be written here
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise DataError(f"{name!r} is no file of a checkpoint")
        except (DataError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: no readable manifest ({error}), so this is no complete checkpoint."
            ) from None
        return cls(path=path, **fields)

    def verify(self, names: Collection[str] | None = None) -> None:
        """Compare the size of every file, and the digest of those in `names` (or of all).

        Raises CheckpointError naming each that differs.
        """
        problems = self.problems(self.files, names)
        if problems:
            mend = "Training goes on from the checkpoint before it."
            if any("host" in self.files[name] and not (self.path / name).exists() for name in problems):
                mend = "Each host has what its ranks wrote: name them with --hostfile to bring all files here."
            raise CheckpointError(list_problems(str(self.path), list(problems.values()), mend))

    def problems(self, names: Iterable[str], to_digest: Collection[str] | None = None) -> dict[str, str]:
        """What is wrong with these files, by name. Digests are compared of those in `to_digest`, or of all."""

        def problem(name: str) -> str | None:
            file, expected = self.path / name, self.files[name]
            if not file.is_file():
                return f"{name} is missing" + (f": {expected['host']} wrote it" if "host" in expected else "")
            if (size := file.stat().st_size) != expected["bytes"]:
                return f"{name}: {size:,} bytes, the manifest says {expected['bytes']:,}"
            try:
                if (to_digest is None or name in to_digest) and digest_file(file) != expected["xxh3_128"]:
                    return f"{name}: its bytes are not those that were written (digests differ)"
            except OSError as error:
                return f"{name}: cannot be read ({error.strerror})"
            return None

        names = list(names)
        with ThreadPoolExecutor(_READERS) as pool:
            found = zip(names, pool.map(problem, names), strict=True)
            return {name: text for name, text in found if text is not None}


def classes_in_checkpoints() -> list[Any]:
    """The few plain classes that DeepSpeed puts beside tensors: all that a checkpoint may make torch build."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
