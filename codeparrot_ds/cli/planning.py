"""The `codeparrot-ds plan` and `tune` commands, used before a run."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from codeparrot_ds.cli.completion import RecipeArgument, SetOption
from codeparrot_ds.cli.output import (
    JsonOption,
    parse_bandwidth,
    parse_size,
    printable,
)
from codeparrot_ds.errors import ConfigError

GpusOption = Annotated[int | None, typer.Option(help="Number of GPUs. Default: those of this machine.", min=1)]
MfuOption = Annotated[float, typer.Option(help="Model FLOPs utilization to assume without communication, a fraction.")]


def plan_command(
    recipe: RecipeArgument,
    hostfile: Annotated[
        Path | None, typer.Option(help="Hostfile with the hosts and their GPUs, instead of --gpus.")
    ] = None,
    gpus: GpusOption = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory per GPU, e.g. 80GB.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="GPU model, e.g. A100, for its peak FLOP/s. Default: this machine's, else H100.")
    ] = None,
    gpus_per_host: Annotated[int, typer.Option(help="GPUs per host.", min=1)] = 8,
    host_memory: Annotated[str | None, typer.Option(help="Memory per host, e.g. 1TB.")] = None,
    interconnect: Annotated[str, typer.Option(help="Network bandwidth per host, bits per second.")] = "200Gb",
    mfu: MfuOption = 0.4,
    price: Annotated[float | None, typer.Option(help="Price of a GPU-hour, for the cost of the run.", min=0)] = None,
    overrides: SetOption = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run three steps on this machine and compare.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Estimate memory, time, cost and disk of a run before it starts. Exits with 1 if it cannot fit."""
    from codeparrot_ds.hosts.hostfile import read_hostfile
    from codeparrot_ds.planning.machine import MachineSpec, find_machine
    from codeparrot_ds.planning.plan import compare_with, make_plan, require_fit
    from codeparrot_ds.report.plan import as_text, comparison_text
    from codeparrot_ds.run.recipe import load_recipe

    if hostfile is not None and (gpus is not None or measure):
        raise ConfigError(
            "--hostfile sets the number of GPUs, and --measure runs on this machine: omit --hostfile, or omit --gpus "
            "and --measure."
        )
    slots = None if hostfile is None else list(read_hostfile(hostfile).values())
    loaded = load_recipe(recipe, overrides or [])
    machine = find_machine(
        loaded,
        MachineSpec(
            sum(slots) if slots else gpus,
            gpu=gpu,
            gpu_memory_bytes=None if gpu_memory is None else parse_size(gpu_memory),
            gpus_per_host=max(slots) if slots else gpus_per_host,
            host_memory_bytes=None if host_memory is None else parse_size(host_memory),
            host_bytes_per_second=parse_bandwidth(interconnect),
            hosts=len(slots) if slots else None,
            mfu=mfu,
            price_per_hour=price,
            on_cpu=os.environ.get("DS_ACCELERATOR") == "cpu",
        ),
    )
    made = make_plan(loaded, machine)
    result = made.to_dict()
    if not json_output:
        print(printable("\n".join(as_text(made))))
    if measure and made.own.fits:
        from codeparrot_ds.planning.tune import run_trial

        measured = run_trial(recipe, overrides or [], None, machine.cluster.gpus, 3, machine.on_cpu)
        result["measured"] = measured
        if not json_output:
            print("\n".join(comparison_text(None if measured is None else compare_with(measured, made.own), measured)))
    if json_output:
        print(json.dumps(result, indent=2))
    require_fit(made)
    if measure and result["measured"] is None:
        raise ConfigError(
            f"{recipe}: ran out of memory in the measured steps, although the plan predicts that it fits. Lower "
            "batch.micro_batch_size, or recompute more (model.activation_checkpointing)."
        )


def tune_command(
    recipe: RecipeArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Recipe to write. Default: RECIPE-tuned.yaml.")
    ] = None,
    gpus: GpusOption = None,
    steps: Annotated[int, typer.Option(help="Steps per trial; the first is not timed.", min=2)] = 4,
    trials: Annotated[int, typer.Option(help="Maximum number of trials.", min=1)] = 12,
    overrides: SetOption = None,
    json_output: JsonOption = False,
) -> None:
    """Time the layouts that fit, and write the fastest recipe."""
    from codeparrot_ds.planning.machine import MachineSpec, find_machine
    from codeparrot_ds.planning.plan import make_plan
    from codeparrot_ds.planning.tune import tune, winner, write_recipe
    from codeparrot_ds.report.plan import trial_head, trial_text
    from codeparrot_ds.run.recipe import load_recipe
    from codeparrot_ds.system.files import make_directory

    loaded = load_recipe(recipe, overrides or [])
    plan = make_plan(loaded, find_machine(loaded, MachineSpec(gpus, on_cpu=os.environ.get("DS_ACCELERATOR") == "cpu")))
    done = []
    written = output or recipe.with_name(f"{recipe.stem}-tuned.yaml")
    make_directory(written.parent)  # fail before the trials if the output cannot be written
    if not json_output:
        print(trial_head(), flush=True)
    for trial in tune(plan, recipe, overrides or [], steps, trials):
        done.append(trial)
        if not json_output:
            print(trial_text(trial), flush=True)
    fastest = winner(done)
    write_recipe(recipe, overrides or [], fastest, done, written)
    if json_output:
        rows = [{**each.prediction.to_dict(), "measured": each.result} for each in done]
        print(json.dumps({"recipe": str(written), "fastest": fastest.prediction.to_dict(), "trials": rows}, indent=2))
    else:
        print(f"{written}: {fastest.tokens_per_second:,.0f} tokens/s")
