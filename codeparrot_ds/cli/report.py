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
    directories: Annotated[
        list[Path],
        typer.Argument(help="A run, a corpus or a tokenizer; or two runs.", autocompletion=complete_run),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a page to this HTML file.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Also measure this converted model on the run's validation sequences."),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer of the run. Default: that of its shards.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Wall time of the run to report, in seconds. Default: that of its attempts.")
    ] = None,
    summary_file: Annotated[
        Path | None, typer.Option("--summary", help="Also write the figures to this JSON file.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure a tokenizer on; repeatable. Default: what it was trained on."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another tokenizer, directory or on the Hub, to compare a tokenizer with; repeatable."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Report on a run, two runs, a corpus or a tokenizer.

    Prints the figures, or writes a page that needs no network (--output).

    Reads only what is there: a run may still be training, have failed, or have been copied from another machine.
    """
    from codeparrot_ds.report.make import Options, make
    from codeparrot_ds.system.files import require_file_place, write_atomically, write_json

    for path in filter(None, (output, summary_file)):
        require_file_place(path)
    made = make(directories, Options(model, tokenizer, seconds, text or [], against or []))
    rows = [(name, printable(value)) for name, value in made.rows]
    if summary_file is not None:
        write_json(summary_file, made.as_json)
    if output is not None:
        page = made.html().encode()
        write_atomically(output, page)
        rows.append(("page", f"{output} ({len(page) / 1000:,.0f} kB)"))
    print_result(json_output, " and ".join(map(str, directories)), rows, made.as_json)
