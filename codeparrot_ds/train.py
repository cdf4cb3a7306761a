"""What every rank runs: `deepspeed [--hostfile H] --module codeparrot_ds.train RECIPE [--set key=value …]`.

Everything that can be refused is refused before anything is allocated, on one host before torch is imported. A run
started again on its directory goes on from its newest checkpoint.
"""

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeparrot_ds.cluster.hostfile import check_launch_command
from codeparrot_ds.errors import EXIT_USER_ERROR, ClusterError, ConfigError, UserError, list_problems
from codeparrot_ds.files import (
    exclusive_lock,
    explain_os_error,
    make_directory,
    require_free_space,
    write_atomically,
    write_json,
)
from codeparrot_ds.recipe import Recipe, load_recipe
from codeparrot_ds.run_directory import RunDirectory
from codeparrot_ds.shards.format import Manifest
from codeparrot_ds.shards.sequences import PackedSequences
from codeparrot_ds.shards.verify import verify
from codeparrot_ds.tokenizer.encode import copy_tokenizer
from codeparrot_ds.training.engine import check_compiler, load_ds_config, required_ops, resolve

if TYPE_CHECKING:
    from codeparrot_ds.training.ranks import Ranks

_CHECKPOINT_BYTES_PER_PARAMETER = 18  # fp32 weights and two fp32 moments, bf16 weights, and room for a file system


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of every rank; returns the exit code."""
    parser = argparse.ArgumentParser(prog="codeparrot_ds.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path, help="YAML file, e.g. launch/recipes/quickstart.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--local_rank", type=int, default=0, help="set by deepspeed")
    options = parser.parse_args(arguments)
    try:
        train(options.recipe, options.set)
    except (UserError, OSError) as error:
        message = error if isinstance(error, UserError) else explain_os_error(error)
        if message is None:
            raise
        if _environment("RANK", 0) == 0:
            print(f"error: {message}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    return 0


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no other rank and no memory."""

    recipe: Recipe
    ds_config: dict[str, Any]
    manifest: Manifest
    run: RunDirectory


def train(recipe_path: Path, overrides: Sequence[str] = ()) -> None:
    """Train one recipe to its last step on this rank. Raises UserError for what a user can mend."""
    world_size = _environment("WORLD_SIZE", 1)
    plan, failure = None, None
    try:
        plan = check(recipe_path, overrides, world_size)
    except UserError as error:
        if _environment("LOCAL_SIZE", world_size) == world_size:
            raise
        failure = error  # other hosts may find nothing wrong: tell them, or they would wait for this one

    from codeparrot_ds.training import ranks as rank_module

    rank_module.die_with_launcher()
    ranks = rank_module.join()
    _refuse_on_all_hosts(ranks, failure)
    assert plan is not None
    with contextlib.ExitStack() as stack:
        if ranks.rank == 0:
            busy = f"{plan.run.path}: another process is training in this directory. Stop it, or use --set name=…"
            stack.enter_context(exclusive_lock(plan.run.path / ".lock", busy))
        try:
            _train_on_rank(plan, ranks)
        except BaseException as error:
            if ranks.rank == 0:
                plan.run.write_status("failed", error=f"{type(error).__name__}: {error}")
            raise
    rank_module.leave()


def check(recipe_path: Path, overrides: Sequence[str], world_size: int) -> Plan:
    """Check all that this host can know before training: recipe, DeepSpeed JSON, shards, compiler, run directory."""
    check_launch_command()
    recipe = load_recipe(recipe_path, overrides)
    ds_config = resolve(load_ds_config(recipe.engine.deepspeed), recipe, world_size)
    check_compiler(ds_config)
    manifest = check_shards(recipe)
    run = RunDirectory(recipe.run_directory)
    make_directory(run.path)
    return Plan(recipe, ds_config, manifest, run)


def check_shards(recipe: Recipe) -> Manifest:
    """The manifest of the recipe's shards, whose sizes are checked. Raises DataError or ConfigError."""
    manifest = verify(recipe.data.shards)
    if manifest.vocab_size != recipe.model.vocab_size:
        raise ConfigError(
            f"{recipe.data.shards}: its tokenizer has {manifest.vocab_size:,} tokens, model.vocab_size is "
            f"{recipe.model.vocab_size:,}. Set model.vocab_size={manifest.vocab_size}, or name the right shards."
        )
    return manifest


def _environment(name: str, default: int) -> int:
    """What the launcher set; `default` for a bare `python -m codeparrot_ds.train`."""
    return int(os.environ.get(name, default))


def _refuse_on_all_hosts(ranks: "Ranks", failure: UserError | None) -> None:
    """Raise on every rank when any host found something wrong, so that none waits and rank 0 can name the host."""
    found = ranks.gather(None if failure is None else f"host {socket.gethostname()}: {failure}")
    problems = sorted({problem for problem in found if problem is not None})
    if problems:
        raise ClusterError(list_problems("not all hosts can train", problems))


def _train_on_rank(plan: Plan, ranks: "Ranks") -> None:
    from codeparrot_ds.training import checkpoint as checkpoints
    from codeparrot_ds.training.engine import build_engine
    from codeparrot_ds.training.loop import Trainer
    from codeparrot_ds.training.metrics import Metrics, log, open_log
    from codeparrot_ds.training.model import build_model

    recipe, ds_config, manifest, run = plan.recipe, plan.ds_config, plan.manifest, plan.run
    stage = ds_config["zero_optimization"]["stage"]
    open_log(run, ranks.rank)
    splits = {split: PackedSequences(manifest, split, recipe.model.seq_len) for split in ("train", "valid")}
    resume_from = checkpoints.find_resume_point(run, recipe.identity(manifest.digest), stage, ranks.world_size)
    if resume_from is not None and resume_from.step >= recipe.schedule.steps:
        log.info("%s: already trained to step %d; nothing to do.", run.path, resume_from.step)
        return
    if ranks.rank == 0:
        write_atomically(run.recipe, recipe.to_yaml())
        write_json(run.ds_config, ds_config)
        copy_tokenizer(recipe.data.shards / "tokenizer", run.tokenizer)
        run.write_status("running", world_size=ranks.world_size)
    for op in required_ops(ds_config):
        log.info("DeepSpeed's %s operator is built if this machine has not built it yet: about a minute.", op)

    network = build_model(recipe.model, manifest.eos_id, recipe.seed, ds_config)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in network.parameters())
    require_free_space(run.path, parameters * _CHECKPOINT_BYTES_PER_PARAMETER, "one checkpoint")
    engine = build_engine(network, recipe, ds_config)
    if resume_from is not None:
        checkpoints.load(engine, resume_from)
        log.info("going on from %s", resume_from.path)
    log.info(
        "%s: %.1f M parameters, ZeRO-%d, %d ranks on %s, %s, %s training sequences of %d tokens",
        recipe.name,
        parameters / 1e6,
        stage,
        ranks.world_size,
        ranks.device.type,
        recipe.engine.precision,
        f"{len(splits['train']):,}",
        recipe.model.seq_len,
    )
    step = resume_from.step if resume_from else 0
    metrics = Metrics(run, recipe, step) if ranks.rank == 0 else None
    trainer = Trainer(
        recipe=recipe,
        ranks=ranks,
        engine=engine,
        train=splits["train"],
        valid=splits["valid"],
        shards_digest=manifest.digest,
        run=run,
        metrics=metrics,
        step=step,
    )
    trainer.fit()
    if metrics is not None:
        metrics.close()
        run.write_status(
            "finished",
            world_size=ranks.world_size,
            device=ranks.device.type,
            parameters=parameters,
            step=trainer.step,
            samples_seen=trainer.samples_seen,
            loss_valid=trainer.loss_valid,
            checkpoint=str(run.checkpoint(trainer.step)),
        )


if __name__ == "__main__":
    sys.exit(main())
