"""The settings that a run directory states: those that all ranks train with, from the moment they take effect."""

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from codeparrot_ds.errors import ConfigError, DataError, list_problems
from codeparrot_ds.run.changes import Changes, changes, describe, settings
from codeparrot_ds.run.directory import Checkpoint, RunDirectory
from codeparrot_ds.system.files import digest_json, read_json, write_atomically, write_json
from codeparrot_ds.training.metrics import log
from codeparrot_ds.training.preflight import CheckedRun
from codeparrot_ds.training.ranks import Ranks

_OF_A_HOST = ("zero_optimization.offload_optimizer.nvme_path", "zero_optimization.offload_param.nvme_path")


def require_same_on_all_ranks(checked: CheckedRun, ranks: Ranks) -> None:
    """Raise ConfigError on all ranks unless all have read the same settings and data. Collective: all ranks must call.

    Hosts may have different copies of the files. ZeRO would train each part of a weight with other settings.
    """
    mine = settings(checked.recipe.model_dump(mode="json"), checked.ds_config)
    mine = {key: value for key, value in mine.items() if not key.endswith(_OF_A_HOST)}
    mine["digest of data.shards"] = checked.data.digest
    if len(set(ranks.gather(digest_json(mine)))) == 1:
        return
    everywhere = ranks.gather((ranks.rank, socket.gethostname(), mine))
    first_rank, first_host, first = everywhere[0]
    problems = []
    for key in sorted(set[str]().union(*(of_rank for _, _, of_rank in everywhere))):
        other = next((each for each in everywhere if each[2].get(key) != first.get(key)), None)
        if other is not None:
            rank, host, of_rank = other
            here, there = f"rank {first_rank} ({first_host})", f"rank {rank} ({host})"
            problems.append(f"{key}: {first.get(key)} on {here}, {of_rank.get(key)} on {there}")
    fix = "Copy recipe, DeepSpeed JSON and shards from one host to all."
    raise ConfigError(list_problems("the ranks do not have the same settings", problems, fix))


def settings_now(checked: CheckedRun) -> dict[str, Any]:
    """The settings by dotted key, with absolute paths."""
    return settings(checked.recipe.resolved(checked.run.ds_config).model_dump(mode="json"), checked.ds_config)


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings that a checkpoint was trained with, by dotted key; {} if unknown.

    Older versions did not store them in the manifest. Their last settings are in the run directory.
    """
    if checkpoint.settings is not None:
        return checkpoint.settings
    run, found = checkpoint.run, dict[str, Any]()
    with contextlib.suppress(
        OSError, DataError, yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError, KeyError
    ):
        found = settings(yaml.safe_load(run.recipe.read_bytes()), read_json(run.ds_config, "DeepSpeed JSON"))
        if found.get("model.init_from"):  # may be relative to the working directory
            found["model.init_from"] = str(Path(found["model.init_from"]).absolute())
    return found


def changes_since(checkpoint: Checkpoint, now: Mapping[str, Any]) -> Changes:
    """The settings that differ from those that a checkpoint was trained with."""
    return changes(settings_of(checkpoint), now) if now else {}


def record_changes(run: RunDirectory, ranks: Ranks, checkpoint: Checkpoint, now: Mapping[str, Any]) -> None:
    """Log and record what changed since a checkpoint from which training goes on. One rank per disk records."""
    changed = changes_since(checkpoint, now)
    if not changed:
        return
    log.info("recipe changed since step %d: %s", checkpoint.step, describe(changed))
    if ranks.is_fs_leader:
        with open(run.recipe_changes, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "step": checkpoint.step, "changes": changed}) + "\n")


def write_settings(checked: CheckedRun, ranks: Ranks) -> None:
    """Write recipe and DeepSpeed JSON to the run directory. Call when nothing can refuse them any more."""
    if ranks.is_fs_leader:
        write_json(checked.run.ds_config, checked.ds_config)
        write_atomically(checked.run.recipe, checked.recipe.resolved(checked.run.ds_config).to_yaml())
