"""The `codeparrot-ds corpus` commands."""

from pathlib import Path
from typing import Annotated

import typer

from codeparrot_ds.cli.output import JsonOption, group, parse_size, print_result
from codeparrot_ds.errors import ConfigError

app = group("Collect source files into a corpus that records the origin of each document.")


@app.command("collect")
def corpus_collect(
    output: Annotated[Path, typer.Option("--output", "-o", help="Corpus directory to create.")],
    directories: Annotated[list[Path] | None, typer.Argument(help="Directories to search recursively.")] = None,
    installed_python: Annotated[
        bool, typer.Option(help="Also collect this Python's standard library and installed packages.")
    ] = False,
    suffix: Annotated[str, typer.Option(help="Suffix of the files to collect.")] = ".py",
    max_file_size: Annotated[str, typer.Option(help="Skip larger files.")] = "1MB",
    sample: Annotated[str | None, typer.Option(help="Keep a uniform sample of this much text, e.g. 30MB.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Collect source files from this machine and drop exact duplicates."""
    from codeparrot_ds.corpus.collect import collect

    if not directories and not installed_python:
        raise ConfigError("nothing to collect from: give directories, or add --installed-python.")
    manifest = collect(
        output,
        directories or [],
        installed_python=installed_python,
        suffix=suffix,
        max_file_bytes=parse_size(max_file_size),
        sample_bytes=None if sample is None else parse_size(sample),
    )
    rows = [
        ("documents", f"{manifest['documents']:,}"),
        ("text", f"{manifest['text_bytes'] / 1e6:,.1f} MB"),
        *((f"skipped: {reason}", f"{count:,}") for reason, count in manifest["skipped"].items()),
    ]
    print_result(json_output, str(output), rows, manifest)
