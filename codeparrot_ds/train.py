"""Training, on every rank: `deepspeed [--hostfile H] --module codeparrot_ds.train RECIPE [--set key=value …]`.

All input is validated before anything is allocated; on a single host, before torch is imported. A run that is started
again in its directory resumes from its newest checkpoint.
"""

import argparse
import contextlib
import logging
import os
import platform
import socket
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from codeparrot_ds import __version__
from codeparrot_ds.errors import (
    EXIT_CRASHED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    ConfigError,
    TrainingError,
    UserError,
)
from codeparrot_ds.hosts.lifeline import Lifeline, Supervisor
from codeparrot_ds.hosts.working_directory import (
    WorkingDirectory,
    check_common_directory,
    check_directory_of_runner,
)
from codeparrot_ds.run.changes import describe
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.ds_config import (
    nvme_path,
    offload_device,
    required_ops,
)
from codeparrot_ds.run.ds_keys import untested_keys
from codeparrot_ds.run.events import cpu_name, record_event
from codeparrot_ds.system.files import (
    as_user_error,
    exclusive_lock,
    write_json,
)
from codeparrot_ds.system.launched import local_world_size, rank_of_scheduler
from codeparrot_ds.system.processes import interrupt_imports
from codeparrot_ds.tokenizer.directory import copy_tokenizer
from codeparrot_ds.training.preflight import CheckedRun, check, check_precision, check_space, scarce_data
from codeparrot_ds.training.swap import check_locked_memory, hold_swap_directory

if TYPE_CHECKING:
    from codeparrot_ds.run.directory import Checkpoint
    from codeparrot_ds.training.ranks import Ranks

_CANNOT_START = "training cannot start"
_VERSIONS = ("torch", "deepspeed", "transformers", "tokenizers", "numpy")  # recorded at each start


def main(arguments: Sequence[str] | None = None) -> int:
    """Run training on this rank and return the exit code."""
    interrupt_imports()
    parser = argparse.ArgumentParser(prog="codeparrot_ds.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path, help="YAML file, e.g. launch/recipes/quickstart.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--local_rank", type=int, default=0, help="set by deepspeed")
    parser.add_argument("--supervisor", type=Supervisor.parse, help="set by `codeparrot-ds launch`")
    parser.add_argument("--directory", type=WorkingDirectory.parse, help="set by `codeparrot-ds launch`")
    options = parser.parse_args(arguments)
    lifeline: Lifeline | None = None
    rank, message = _environment("RANK", 0), ""
    try:
        os.environ.update(rank_of_scheduler(os.environ))
        rank = _environment("RANK", 0)
        lifeline = Lifeline(options.supervisor, rank)
        code = 0 if train(options.recipe, options.set, lifeline, options.directory) else EXIT_PREEMPTED
    except Exception as error:
        explained = as_user_error(error)
        if explained is None:
            traceback.print_exc()
            code, message = EXIT_CRASHED, f"{type(error).__name__}: {error}"
        else:
            code, message = EXIT_USER_ERROR, str(explained)
            if rank == 0 or lifeline is None:
                print(f"error: {message}", file=sys.stderr, flush=True)
    if lifeline is not None:
        lifeline.end(code, message)
    return code


def train(
    recipe_path: Path, overrides: Sequence[str], lifeline: Lifeline, directory: WorkingDirectory | None = None
) -> bool:
    """Train a recipe on this rank.

    Args:
        recipe_path: YAML file.
        overrides: KEY=VALUE each.
        lifeline: connection to the supervisor, if there is one.
        directory: where the job was started; None if unknown.

    Returns:
        True when the last step is reached, False when the run saved and stopped early on request.

    Raises:
        UserError: for anything the user can fix.
    """
    world_size = _environment("WORLD_SIZE", 1)
    checked, failure = None, None
    try:
        if directory is not None:
            directory.check()
        else:
            check_directory_of_runner()
        checked = check(recipe_path, overrides, world_size)
    except (UserError, OSError) as error:
        failure = as_user_error(error)
        if failure is None:
            raise
        if not _spans_hosts(world_size):
            raise failure from None
        # Other hosts may have passed their checks: `_agree` below notifies them, or they would wait for this one.

    # torch warns about every address without a hostname, as on machines without DNS. Errors are still printed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from codeparrot_ds.training import ranks as rank_module
    from codeparrot_ds.training.resume import find_resume_point
    from codeparrot_ds.training.settings import require_same_on_all_ranks

    rank_module.die_with_launcher()
    ranks = rank_module.join(supervised=lifeline.connected)
    ranks.agree(failure, _CANNOT_START)
    assert checked is not None
    if directory is None and _spans_hosts(world_size):
        check_common_directory(ranks.gather((socket.gethostname(), WorkingDirectory.here())))
    require_same_on_all_ranks(checked, ranks)
    with contextlib.ExitStack() as stack:
        if _spans_hosts(world_size):
            ranks = rank_module.find_disks(ranks, checked.run.path)
        ranks.call(_take_run_directory, checked, ranks, stack, heading=_CANNOT_START)
        ranks.call(_check_humaneval, checked, ranks, heading=_CANNOT_START)
        resume_from = find_resume_point(checked.run, ranks)
        ranks.call(_accept, checked, ranks, resume_from, heading=_CANNOT_START)
        try:
            finished = _train_on_rank(checked, ranks, resume_from, lifeline)
        except BaseException as error:
            if ranks.rank == 0:
                with contextlib.suppress(OSError):  # on a full disk, still report the original error
                    checked.run.write_status("failed", error=f"{type(error).__name__}: {error}")
            elif isinstance(error, UserError) and not isinstance(error, TrainingError):  # raised by all ranks
                print(f"error: rank {ranks.rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
            raise
    rank_module.leave()
    return finished


def _environment(name: str, default: int) -> int:
    """Integer set by the launcher; `default` under plain `python -m codeparrot_ds.train`."""
    return int(os.environ.get(name, default))


def _spans_hosts(world_size: int) -> bool:
    """Whether the job has ranks on other hosts."""
    return local_world_size(world_size) < world_size


def _take_run_directory(checked: CheckedRun, ranks: "Ranks", stack: contextlib.ExitStack) -> None:
    """Lock the directories that this run writes to until `stack` closes."""
    from codeparrot_ds.training.metrics import open_log

    run = checked.run
    if not ranks.shares_disk(0) and checked.recipe.checkpoints.shared_disk:
        raise ConfigError(
            f"{run.path}: not the same directory as on rank 0's host. Mount a disk shared by all hosts, or keep each "
            "host's checkpoint files on its own disk: --set checkpoints.shared_disk=false."
        )
    if ranks.is_fs_leader:
        busy = f"{run.path}: another process is training in this directory. Stop it, or use --set name=…"
        stack.enter_context(exclusive_lock(run.lock, busy))
    swap = nvme_path(checked.ds_config)
    if swap is not None and ranks.local_rank == 0:
        stack.enter_context(hold_swap_directory(swap))
    open_log(run, ranks.rank)
    check_precision(checked.recipe.engine.precision)


def _check_humaneval(checked: CheckedRun, ranks: "Ranks") -> None:
    """Check that exports can be scored, if the recipe wants it, rather than find out at the first one."""
    if ranks.rank == 0 and checked.recipe.evaluation.humaneval:
        from codeparrot_ds.evaluation.problems import load_humaneval
        from codeparrot_ds.evaluation.sandbox.bubble import bubblewrap_version

        load_humaneval()
        bubblewrap_version()


def _accept(checked: CheckedRun, ranks: "Ranks", resume_from: "Checkpoint | None") -> None:
    """Check that the run can resume from this checkpoint, then copy its tokenizer to the run directory."""
    from codeparrot_ds.checkpoint.zero import check_pickles
    from codeparrot_ds.training.checkpoint import check_identity
    from codeparrot_ds.training.settings import settings_of

    if resume_from is not None:
        check_identity(resume_from, checked.recipe.identity(checked.data.digest), settings_of(resume_from))
    if not ranks.is_fs_leader:
        return
    if resume_from is not None:
        check_pickles(resume_from)
    source = next(iter(checked.recipe.data.sources)) / "tokenizer"
    copy_tokenizer(source, checked.run.tokenizer, checked.data.eos_id)


def _train_on_rank(checked: CheckedRun, ranks: "Ranks", resume_from: "Checkpoint | None", lifeline: Lifeline) -> bool:
    from codeparrot_ds.export.background import BackgroundExport
    from codeparrot_ds.system.memory import manage_freed_memory
    from codeparrot_ds.training.engine import build_engine
    from codeparrot_ds.training.guards import StopRequests, Watchdog
    from codeparrot_ds.training.loop import Trainer
    from codeparrot_ds.training.metrics import Metrics, log
    from codeparrot_ds.training.model import build_model
    from codeparrot_ds.training.settings import changes_since, settings_now, write_settings

    recipe, ds_config, data, run = checked.recipe, checked.ds_config, checked.data, checked.run
    if resume_from is not None and resume_from.step >= recipe.schedule.last_step:
        log.info("%s: already trained to step %d; nothing to do.", run.path, resume_from.step)
        if changed := changes_since(resume_from, settings_now(checked)):
            log.warning("These changes of the recipe have no effect: %s", describe(changed))
        if ranks.rank == 0:  # a kill after the last checkpoint may have left the status at "running"
            _write_finished(run, resume_from, ranks)
        return True
    for op in required_ops(ds_config):
        log.info("compiling DeepSpeed's %s operator unless it is built already; this takes minutes", op)
    facts: dict[str, Any] = {"world_size": ranks.world_size, "device": ranks.device.type}

    def on_hang(message: str) -> None:
        lifeline.end(EXIT_CRASHED, message)
        run.write_status("failed", **facts, error=f"rank {ranks.rank} {message}")

    if ranks.device.type == "cpu":
        manage_freed_memory(scarce=offload_device(ds_config) != "none")
    stop_requests = StopRequests(run.stop_file, ranks, lifeline)
    stacks = open(run.log(ranks.rank), "a", encoding="utf-8")  # noqa: SIM115 (the watchdog writes to it until the process exits)
    watchdog = Watchdog(recipe.guards.hang_seconds, stacks, on_hang)
    lifeline.report(lambda: watchdog.doing)
    network = build_model(
        recipe.model,
        data.eos_id,
        recipe.seed,
        ds_config,
        loss_chunk_tokens=recipe.engine.loss_chunk_tokens,
        from_checkpoint=resume_from is not None,
    )
    sizes = [getattr(p, "ds_numel", p.numel()) for p in network.parameters()]
    parameters = sum(sizes)
    facts["parameters"] = parameters
    if ranks.rank == 0:
        run.write_status("running", **facts)
        _record_start(run, ranks, recipe.engine.precision, resume_from, facts)
    check_locked_memory(ds_config, parameters // ranks.world_size, max(sizes) // ranks.world_size)
    check_space(checked, ranks, parameters, resume_from.step if resume_from else 0)
    engine = build_engine(network, recipe, ds_config)
    export = BackgroundExport(run, recipe) if ranks.rank == 0 else None
    trainer = Trainer(
        recipe=recipe,
        ranks=ranks,
        engine=engine,
        data=data,
        parameters=parameters,
        run=run,
        metrics=Metrics(run, recipe, resume_from.step if resume_from else 0) if ranks.rank == 0 else None,
        watchdog=watchdog,
        stop_requests=stop_requests,
        offload=offload_device(ds_config),
        skipped_ranges=_skipped_ranges(run, ranks),
        on_published=export.start if export is not None else None,
        settings=settings_now(checked),
    )
    if resume_from is not None:
        trainer.load(resume_from)
        log.info("resuming from %s", resume_from.path)
    ranks.call(write_settings, checked, ranks)
    if resume_from is not None and export is not None:
        export.start(resume_from.step)  # the previous run may have ended before its export
    log.info(
        "%s: %.1f M parameters, ZeRO-%d, %d ranks on %s, %s, %s training sequences of %d tokens",
        recipe.name,
        parameters / 1e6,
        ds_config["zero_optimization"]["stage"],
        ranks.world_size,
        ranks.device.type,
        recipe.engine.precision,
        f"{len(data.train):,}",
        recipe.model.seq_len,
    )
    if scarcity := scarce_data(data, recipe):
        log.warning("%s", scarcity)
    if untested := untested_keys(ds_config):
        log.warning("DeepSpeed keys that are not tested with this package: %s", ", ".join(untested))
    try:
        finished = trainer.fit()
    except TrainingError:  # raised by all ranks at the same step
        trainer.publish()
        raise
    watchdog.stop()
    if trainer.metrics is not None:
        trainer.metrics.close()
        if finished:
            _write_finished(run, run.newest_checkpoint(), ranks)
        else:
            run.write_status("preempted", **facts, step=trainer.step, reason=stop_requests.reason)
    if export is not None:
        export.finish(wait=finished)
    return finished


def _record_start(
    run: RunDirectory, ranks: "Ranks", precision: str, resume_from: "Checkpoint | None", facts: dict[str, Any]
) -> None:
    """Record the start of an attempt, with the hardware and the versions that it runs on."""
    import torch

    on_gpu = ranks.device.type == "cuda"
    run_on = {"codeparrot-ds": __version__, "python": platform.python_version()}
    run_on |= {name: version(name) for name in _VERSIONS}
    if on_gpu:
        run_on["CUDA"] = str(torch.version.cuda)
    record_event(
        run.events,
        "start",
        step=resume_from.step if resume_from else 0,
        **facts,
        precision=precision,
        hardware=torch.cuda.get_device_name(ranks.device) if on_gpu else cpu_name(),
        versions=run_on,
    )


def _skipped_ranges(run: RunDirectory, ranks: "Ranks") -> list[tuple[int, int]]:
    """Ranges of the sample order to skip, stored on every disk. Collective: all ranks must call."""
    mine = run.skipped_ranges() if ranks.is_fs_leader else []
    # Rank 0 may run on a different host than before. The list only grows, so the longest copy is current.
    longest: list[tuple[int, int]] = max(ranks.gather(mine), key=len)
    if ranks.is_fs_leader and mine != longest:
        write_json(run.skipped_ranges_file, longest)
    return longest


def _write_finished(run: RunDirectory, last: "Checkpoint", ranks: "Ranks") -> None:
    run.write_status(
        "finished",
        world_size=ranks.world_size,
        device=ranks.device.type,
        parameters=last.parameters,
        step=last.step,
        samples_seen=last.samples_seen,
        loss_valid=last.loss_valid,
        checkpoint=last.path.relative_to(run.path).as_posix(),
    )


def end(code: int) -> NoReturn:
    """Flush all output and exit the process without Python's finalization.

    During finalization gloo's threads may still try to acquire the GIL; Python 3.11 then terminates such a thread
    inside C++ code ("terminate called without an active exception", SIGABRT). Seen once in some hundred runs, after all
    work was done.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
