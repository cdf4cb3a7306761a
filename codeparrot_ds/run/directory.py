"""Layout of a run directory and of its checkpoint manifests, shared by training, export and evaluation.

    runs/NAME/  recipe.yaml  ds_config.json  tokenizer/  status.json  metrics.jsonl  logs/rank_00000.log
                tensorboard/  checkpoints/latest  checkpoints/step-00001000/{manifest.json, DeepSpeed's files}  hf/

A checkpoint is complete once its directory has its final name; `manifest.json` lists size and digest of every file.
"""

import re
import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import CheckpointError, DataError, list_problems
from codeparrot_ds.run.events import record_event
from codeparrot_ds.system.files import (
    FORMAT_VERSION,
    MANIFEST,
    digest_file,
    flush_to_disk,
    is_locked,
    read_json,
    read_manifest,
    write_atomically,
    write_json,
)

CERTIFICATE = "certificate.json"  # written last into a converted model: a directory without it is unfinished
_READERS = 4  # files read concurrently: one thread does not saturate a disk
_STEP_DIRECTORY = re.compile(r"step-(\d{8,})")


def step_of(checkpoint: Path) -> int:
    """The optimizer step encoded in a checkpoint directory's name."""
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
        """Copy of the tokenizer that the shards were built with, so that the run can be converted without them."""
        return self.path / "tokenizer"

    @property
    def metrics(self) -> Path:
        """One JSON line per optimizer step, and one per evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def status_file(self) -> Path:
        """State of the run; see `write_status`."""
        return self.path / "status.json"

    @property
    def stop_file(self) -> Path:
        """Created by a user to make the run save a checkpoint and exit."""
        return self.path / "stop"

    @property
    def lock(self) -> Path:
        """Lock file held by rank 0 during training."""
        return self.path / ".lock"

    def in_use(self) -> bool:
        """Whether a process is currently training in this directory."""
        return is_locked(self.lock)

    @property
    def launches(self) -> Path:
        """One JSON line per attempt of `codeparrot-ds launch`: time, first and last step, and why it ended."""
        return self.path / "launches.jsonl"

    @property
    def incidents(self) -> Path:
        """One JSON line per suspect step of a loss spike and per skipped step: reason, samples, documents."""
        return self.path / "incidents.jsonl"

    @property
    def recipe_changes(self) -> Path:
        """One JSON line per resume with other settings: its step, and old and new value of each key."""
        return self.path / "recipe_changes.jsonl"

    @property
    def events(self) -> Path:
        """One JSON line per start, checkpoint, return to an earlier step and end of training, with its time."""
        return self.path / "events.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON line per text generated at an evaluation: its step, number, prompt and completion."""
        return self.path / "samples.jsonl"

    @property
    def skipped_ranges_file(self) -> Path:
        """Ranges of the data order that are skipped after loss spikes."""
        return self.path / "left_out.json"

    def skipped_ranges(self) -> list[tuple[int, int]]:
        """The skipped ranges of the data order, [start, stop) positions. Raises DataError."""
        if not self.skipped_ranges_file.exists():
            return []
        ranges = read_json(self.skipped_ranges_file, "list of skipped samples")
        try:
            return [(int(start), int(stop)) for start, stop in ranges]
        except (TypeError, ValueError):
            raise DataError(
                f"{self.skipped_ranges_file}: must be a list of [first, one past the last] pairs. Fix the file, or "
                "restore a copy."
            ) from None

    @property
    def logs(self) -> Path:
        """Directory with one log file per rank."""
        return self.path / "logs"

    def log(self, rank: int) -> Path:
        """The log file of one rank; contains the stacks of all its threads after a hang."""
        return self.logs / f"rank_{rank:05d}.log"

    @property
    def tensorboard(self) -> Path:
        """Directory of TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Directory of all checkpoints."""
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        """Directory of models converted during training."""
        return self.path / "exports"

    def export(self, step: int) -> Path:
        """The model converted from the checkpoint after `step` optimizer steps."""
        return self.exports / f"step-{step:08d}"

    def humaneval(self, step: int) -> Path:
        """Samples and scores of HumanEval of the export after `step` optimizer steps."""
        return self.path / "humaneval" / f"step-{step:08d}"

    @property
    def converted(self) -> Path:
        """The model converted after training, where the quickstart puts it."""
        return self.path / "hf"

    def newest_export(self) -> tuple[Path, int]:
        """The converted model of the latest step, and its step. Raises DataError when there is none."""
        found = []
        for path in (self.converted, *sorted(self.exports.glob("step-*"))):
            if not (path / CERTIFICATE).is_file():
                continue
            try:
                step = int(read_json(path / CERTIFICATE, "certificate")["source"][-1]["step"])
            except (KeyError, IndexError, TypeError, ValueError):
                raise DataError(f"{path / CERTIFICATE}: names no step. Convert the checkpoint again.") from None
            found.append((step, path))
        if not found:
            raise DataError(
                f"{self.path}: this run has no converted model yet. Create one with `codeparrot-ds convert {self.path} "
                f"{self.converted}`."
            )
        step, path = max(found)
        return path, step

    def write_status(self, state: str, **facts: Any) -> None:
        """Replace status.json, because launchers' exit codes are unreliable.

        States: running, finished, preempted, failed. All but the first are also recorded as the end of an attempt.
        """
        write_json(self.status_file, {"state": state, **facts})
        if state != "running":
            record_event(self.events, "end", state=state, **facts)

    def read_status(self) -> dict[str, Any]:
        """Read what `write_status` wrote last, with the path of the checkpoint completed.

        Raises DataError when the run has no status.
        """
        status = read_json(self.status_file, "run status")
        if not isinstance(status, dict):
            raise DataError(f"{self.status_file}: not a run status (must be a JSON object).")
        if isinstance(status.get("checkpoint"), str):  # older versions wrote it relative to the working directory
            status["checkpoint"] = str(self.checkpoints / Path(status["checkpoint"]).name)
        return status

    def checkpoint(self, step: int) -> Path:
        """Directory of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step-{step:08d}"

    def unfinished(self, step: int) -> Path:
        """Directory of that checkpoint while it is being written."""
        return self.checkpoints / f"step-{step:08d}.tmp"

    def prepared_steps(self) -> set[int]:
        """Steps whose checkpoint has its manifest but not yet its final name."""
        found = [path for path in self.checkpoints.glob("step-*.tmp") if (path / MANIFEST).is_file()]
        return {int(match[1]) for path in found if (match := _STEP_DIRECTORY.fullmatch(path.stem))}

    def publish(self, step: int) -> None:
        """Rename the checkpoint of `step` to its final name. Call when all its files and its manifest are on disk."""
        final = self.checkpoint(step)
        shutil.rmtree(final, ignore_errors=True)  # the same step, saved again after falling back to an older one
        self.unfinished(step).rename(final)
        flush_to_disk(self.checkpoints)
        self.point_latest_at(final)

    def set_aside(self, checkpoint: Path) -> None:
        """Rename a damaged checkpoint, so that no run resumes from it or counts it. No-op if it does not exist."""
        if checkpoint.exists():
            aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)  # the same step, damaged a second time
            checkpoint.rename(aside)

    def checkpoint_directories(self, *, whole: bool = True) -> list[Path]:
        """Every published checkpoint, oldest first, damaged or not. Unfinished checkpoints have other names.

        Args:
            whole: omit checkpoints without a manifest.
        """
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if _STEP_DIRECTORY.fullmatch(path.name)]
        return sorted((path for path in found if not whole or (path / MANIFEST).is_file()), key=step_of)

    def newest_checkpoint(self) -> "Checkpoint":
        """The newest published checkpoint. Raises CheckpointError when there is none, or its manifest is damaged.

        Determined from the directories, not from the `latest` file, which a crash may leave one checkpoint behind.
        """
        found = self.checkpoint_directories()
        if not found:
            raise CheckpointError(f"{self.checkpoints}: no complete checkpoint here. Train first, or name another run.")
        return Checkpoint.read(found[-1])

    def point_latest_at(self, checkpoint: Path) -> None:
        """Update the `latest` file, which DeepSpeed's own tools read."""
        write_atomically(self.checkpoints / "latest", checkpoint.name)


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint and its manifest.

    Attributes:
        path: checkpoint directory.
        step: optimizer steps taken.
        samples_seen: position in the data order (sequences).
        parameters: number of model parameters; tied parameters count once.
        zero_stage: ZeRO stage, 0 to 3.
        world_size: number of ranks that wrote it.
        precision: "bf16", "fp16" or "fp32".
        identity: settings that must match for a run to resume from this checkpoint.
        files: name -> {"bytes", "xxh3_128"}, plus "host" (which wrote the file) if hosts do not share a disk.
        loss_valid: validation loss at this step (nats per token), or None if not evaluated at this step.
        offload: where the optimizer state was kept: "none", "cpu" or "nvme".
        universal: True for one file per tensor, as `convert --to-universal` writes; False for per-rank files.
        settings: recipe and DeepSpeed JSON that it was trained with, by dotted key (see changes.py); None if unknown.
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
    settings: dict[str, Any] | None = None

    @property
    def run(self) -> RunDirectory:
        """The run of this checkpoint. A universal checkpoint is self-contained: it includes recipe and tokenizer."""
        return RunDirectory(self.path if (self.path / "recipe.yaml").is_file() else self.path.parent.parent)

    def write(self, directory: Path) -> None:
        """Write the manifest into `directory`, which is later renamed to `path`."""
        body = {key: value for key, value in vars(self).items() if key != "path"}
        write_json(directory / MANIFEST, {"format_version": FORMAT_VERSION, "kind": "checkpoint", **body})

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint's manifest. Raises CheckpointError."""
        try:
            body = read_manifest(path, "checkpoint")
            # Older versions did not write these keys.
            body = {"offload": "none", "universal": False, "settings": None, **body}
            fields = {key: body[key] for key in cls.__dataclass_fields__ if key != "path"}
            for name in fields["files"]:  # files may be fetched from other hosts and written under these names
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise DataError(f"{name!r} is not a valid checkpoint file name")
        except (DataError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: no readable manifest ({error}), so this is not a complete checkpoint."
            ) from None
        return cls(path=path, **fields)

    def verify(self, names: Collection[str] | None = None) -> None:
        """Verify the size of every file, and the digests of the files in `names` (default: all).

        Raises CheckpointError listing every mismatch.
        """
        problems = self.problems(self.files, names)
        if problems:
            fix = "Training resumes from the previous checkpoint."
            if any("host" in self.files[name] and not (self.path / name).exists() for name in problems):
                fix = "Each host has the files of its own ranks: name the hosts with --hostfile to copy all files here."
            raise CheckpointError(list_problems(str(self.path), list(problems.values()), fix))

    def problems(self, names: Iterable[str], to_digest: Collection[str] | None = None) -> dict[str, str]:
        """Problems found in the files `names`, by name. Verifies the digests of `to_digest` (default: all)."""

        def problem(name: str) -> str | None:
            file, expected = self.path / name, self.files[name]
            if not file.is_file():
                return f"{name} is missing" + (f" (written by {expected['host']})" if "host" in expected else "")
            if (size := file.stat().st_size) != expected["bytes"]:
                return f"{name}: {size:,} bytes, the manifest says {expected['bytes']:,}"
            try:
                if (to_digest is None or name in to_digest) and digest_file(file) != expected["xxh3_128"]:
                    return f"{name}: content differs from what was written (digest mismatch)"
            except OSError as error:
                return f"{name}: cannot be read ({error.strerror})"
            return None

        names = list(names)
        with ThreadPoolExecutor(_READERS) as pool:
            found = zip(names, pool.map(problem, names), strict=True)
            return {name: text for name, text in found if text is not None}


def classes_in_checkpoints() -> list[Any]:
    """The plain classes that DeepSpeed stores next to tensors; torch may instantiate no others from a checkpoint."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
