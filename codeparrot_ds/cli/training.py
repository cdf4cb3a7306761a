"""The `codeparrot-ds doctor` and `launch` commands."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from codeparrot_ds.cli.completion import RecipeArgument, SetOption, complete_recipe, complete_recipe_name
from codeparrot_ds.cli.output import (
    JsonOption,
    printable,
)
from codeparrot_ds.errors import EXIT_USER_ERROR, ConfigError


def launch(
    recipe: RecipeArgument,
    hostfile: Annotated[
        Path | None, typer.Option(help="Hostfile with the hosts and their GPUs. Default: only this machine.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Ranks on this machine, or per host with srun. Default: one per GPU.", min=1)
    ] = None,
    overrides: SetOption = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            help="pdsh, ssh or mpirun; inside a Slurm allocation: srun. Default: pdsh if it is installed, else ssh."
        ),
    ] = None,
    min_hosts: Annotated[
        int | None, typer.Option(help="Minimum number of hosts to continue with when hosts are lost.", min=1)
    ] = None,
    spare_hosts: Annotated[
        int, typer.Option(help="Number of hosts at the end of the hostfile to use as spares.", min=0)
    ] = 0,
    regrow_seconds: Annotated[float, typer.Option(help="Seconds between checks for recovered hosts.", min=1)] = 300.0,
    wait_for_hosts: Annotated[
        float,
        typer.Option(help="Seconds to wait for hosts that do not answer before a restart; not counted as one.", min=0),
    ] = 600.0,
    address: Annotated[
        str | None,
        typer.Option(help="Address of this machine as the hosts see it, if its name resolves wrongly there."),
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="Address of the first host as the others see it, if its name resolves wrongly.")
    ] = None,
    doctor: Annotated[bool, typer.Option(help="Check all hosts first.")] = True,
    max_restarts: Annotated[int, typer.Option(help="Maximum restarts in a row without a new checkpoint.", min=0)] = 3,
    restart_delay: Annotated[
        float, typer.Option(help="Seconds before the second restart in a row; doubles each time.", min=0)
    ] = 5.0,
) -> None:
    """Train with `deepspeed`, and restart after a crash.

    Its command is printed. A restart resumes from the newest complete checkpoint.
    """
    from codeparrot_ds.supervision.attempt import Restarts
    from codeparrot_ds.supervision.launch import launch as run
    from codeparrot_ds.supervision.placement import Hosts

    if launcher not in (None, "pdsh", "ssh", "mpirun", "srun"):
        raise ConfigError(f"--launcher {launcher}: choose pdsh, ssh, mpirun or srun.")
    if (launcher == "srun") == (hostfile is not None) and launcher is not None:
        raise ConfigError("--launcher srun uses the hosts of its Slurm allocation; other launchers need --hostfile.")
    hosts = None
    if hostfile is not None or launcher == "srun":
        hosts = Hosts(
            hostfile,
            min_hosts,
            spare_hosts,
            regrow_seconds,
            address,
            master_addr,
            doctor,
            launcher,
            ranks,
            wait_for_hosts,
        )
    raise typer.Exit(run(recipe, hosts, ranks, overrides or [], Restarts(max_restarts, restart_delay)))


def init_command(
    directory: Annotated[Path, typer.Argument(help="Directory for the files; created if missing.")],
    recipe: Annotated[
        str,
        typer.Option(help="Name of the recipe to start from, e.g. quickstart.", autocompletion=complete_recipe_name),
    ] = "codeparrot-small",
) -> None:
    """Write a commented recipe and a hostfile to edit."""
    from codeparrot_ds.run.shipped import HOSTFILE, RECIPES, names
    from codeparrot_ds.system.files import make_directory, write_atomically

    files = {directory / "recipe.yaml": RECIPES / f"{recipe}.yaml", directory / "hostfile": HOSTFILE}
    if recipe not in names(RECIPES).split(", "):
        raise ConfigError(f"--recipe {recipe}: choose {names(RECIPES)}.")
    if there := [str(path) for path in files if path.exists() or path.is_symlink()]:
        raise ConfigError(f"{', '.join(there)}: already exists. Name another directory, or remove it first.")
    make_directory(directory)
    for path, source in files.items():
        write_atomically(path, source.read_bytes())
        print(path)


def doctor_command(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="Recipe, whose shards, disk space and DeepSpeed operators are checked too.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    hostfile: Annotated[Path, typer.Option(help="Hostfile with the hosts and their GPUs.")] = ...,  # type: ignore[assignment]
    overrides: SetOption = None,
    port: Annotated[int, typer.Option(help="Port at which ranks meet, on the first host.")] = 29500,
    json_output: JsonOption = False,
) -> None:
    """Check all hosts, and name each problem with its fix. Exits with 1 if a check fails."""
    from codeparrot_ds.doctor.examine import examine
    from codeparrot_ds.hosts.hostfile import read_hostfile
    from codeparrot_ds.hosts.launchers import forwarded
    from codeparrot_ds.run.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or []) if recipe else None
    cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    report = examine(read_hostfile(hostfile), loaded, port=port, cpu=cpu, environment=forwarded(os.environ))
    if json_output:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(printable("\n".join(report.table())))
    raise typer.Exit(EXIT_USER_ERROR if report.red else 0)
