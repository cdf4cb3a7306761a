"""Resolve the checkpoint that a user names: of a run, or a directory written by us or by DeepSpeed's script."""

from pathlib import Path

from codeparrot_ds.checkpoint.lazy_tensor import load_lazily
from codeparrot_ds.checkpoint.zero import OPTIMIZER_STATE, model_states
from codeparrot_ds.errors import CheckpointError
from codeparrot_ds.run.directory import Checkpoint, RunDirectory, step_of
from codeparrot_ds.system.files import MANIFEST, digest_file


def source_checkpoints(source: Path, step: int | None = None, last: int = 1) -> list[Checkpoint]:
    """The `last` checkpoints of a run, up to and including the one from `source_checkpoint`, oldest first.

    Raises CheckpointError when there are fewer.
    """
    newest = source_checkpoint(source, step)
    if last == 1:
        return [newest]
    run = newest.run
    found = [path for path in run.checkpoint_directories() if step_of(path) <= newest.step]
    if len(found) < last:
        raise CheckpointError(
            f"{run.checkpoints}: {len(found)} checkpoints up to step {newest.step:,}, but {last} are needed for the "
            "mean. Keep more of them by raising checkpoints.keep_last in the recipe."
        )
    return [Checkpoint.read(path) for path in found[-last:]]


def source_checkpoint(source: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint that `source` names: a run directory (its newest, or `step`) or a checkpoint directory.

    Raises CheckpointError when there is none.
    """
    source = source.resolve()
    if (source / "checkpoints").is_dir():
        run = RunDirectory(source)
        return run.newest_checkpoint() if step is None else Checkpoint.read(run.checkpoint(step))
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such run or checkpoint directory.")
    if (source / OPTIMIZER_STATE).is_file() and not (source / MANIFEST).exists():
        return _describe_universal(source)
    return Checkpoint.read(source)


def _describe_universal(path: Path) -> Checkpoint:
    """Reconstruct the manifest, which DeepSpeed's script does not write, of a universal checkpoint made from ours."""
    found = [stage for stage in (3, 0) if (path / model_states(stage)).is_file()]
    if not found:
        raise CheckpointError(f"{path}: no {model_states(0)}, so this checkpoint is incomplete.")
    state = load_lazily(path / model_states(found[0]))
    try:
        config = state["ds_config"]
        zero_stage = int(config["zero_optimization"]["stage"])
        enabled = [kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled")]
        names = {
            *(model_states(zero_stage), OPTIMIZER_STATE),
            *(file.relative_to(path).as_posix() for file in (path / "zero").glob("*/*.pt")),
        }
        return Checkpoint(
            path=path,
            step=int(state["step"]),
            samples_seen=int(state["samples_seen"]),
            parameters=sum(shape.numel() for group in state["param_shapes"] for shape in group.values()),
            zero_stage=zero_stage,
            world_size=int(state["dp_world_size"]),
            precision=enabled[0] if enabled else "fp32",
            identity={},
            files={
                name: {"bytes": (path / name).stat().st_size, "xxh3_128": digest_file(path / name)}
                for name in sorted(names)
            },
            loss_valid=None,
            universal=True,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: was not converted from a checkpoint of this package ({error!r}).") from None
