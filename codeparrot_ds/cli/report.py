"""The `codeparrot-ds status`, `compare` and `report` commands: results of runs."""

from pathlib import Path
from typing import Annotated

import typer

from codeparrot_ds.cli.completion import RunArgument, complete_run
from codeparrot_ds.cli.output import JsonOption, parse_steps, print_result, printable
from codeparrot_ds.errors import EXIT_USER_ERROR


def status(
    run: RunArgument,
    json_output: JsonOption = False,
) -> None:
    """Show the state of a run, and how its attempts ended."""
    from codeparrot_ds.report.status import run_status
    from codeparrot_ds.run.directory import RunDirectory

    found = run_status(RunDirectory(run))
    print_result(json_output, str(run), [(name, printable(value)) for name, value in found.rows()], found.to_dict())


def compare_command(
    run_a: RunArgument,
    run_b: Annotated[
        Path, typer.Argument(help="Run directory with the same global batch size.", autocompletion=complete_run)
    ],
    tolerance: Annotated[float, typer.Option(help="Relative tolerance of losses; 0: bit-identical.")] = 1e-3,
    steps: Annotated[str, typer.Option(help="Steps to compare: A:B (B excluded); 100: is all from 100 on.")] = ":",
    json_output: JsonOption = False,
) -> None:
    """Check that two runs saw the same data and had the same losses. Exits with 0 if they did, else with 1."""
    from codeparrot_ds.report.compare import compare
    from codeparrot_ds.report.compare_text import as_rows, as_table
    from codeparrot_ds.run.directory import RunDirectory

    comparison = compare(RunDirectory(run_a), RunDirectory(run_b), tolerance, *parse_steps(steps))
    rows = [(printable(name), printable(value)) for name, value in as_rows(comparison)]
    print_result(json_output, "two runs, step by step", rows, comparison.to_dict())
    if not json_output:
        print("", *as_table(comparison), sep="\n")
    raise typer.Exit(0 if comparison.same else EXIT_USER_ERROR)


def report(
    run: RunArgument,
    model: Annotated[Path, typer.Option(help="Converted model of the run.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer directory of the run.")],
    seconds: Annotated[float | None, typer.Option(help="Wall time to report, in seconds.")] = None,
    summary_file: Annotated[
        Path | None, typer.Option("--summary", help="Also write the figures to this JSON file.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Print the figures of a finished run. From source files to converted model."""
    from codeparrot_ds.evaluation.loss import validation_loss
    from codeparrot_ds.report.summary import as_rows, summarize
    from codeparrot_ds.run.directory import RunDirectory
    from codeparrot_ds.run.recipe import load_recipe
    from codeparrot_ds.system.files import write_json

    directory = RunDirectory(run)
    recipe = load_recipe(directory.recipe)
    loss = validation_loss(model, recipe.data.sources, recipe.evaluation.sequences_afterwards)
    summary = summarize(directory, model, tokenizer, loss, seconds)
    if summary_file is not None:
        write_json(summary_file, summary.to_dict())
    print_result(json_output, str(run), as_rows(summary), summary.to_dict())
