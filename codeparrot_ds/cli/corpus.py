"""The `codeparrot-ds corpus` commands."""

from pathlib import Path
from typing import Annotated

import typer

from codeparrot_ds.cli.fields import (
    CommitField,
    LanguageField,
    LicenceField,
    PathField,
    RepositoryField,
    SourceField,
    TextField,
)
from codeparrot_ds.cli.output import JsonOption, group, parse_size, print_result
from codeparrot_ds.errors import ConfigError

_LISTED = 5  # suffixes in a note

app = group("Collect and clean source code, with the origin of each file.")


@app.command("collect")
def corpus_collect(
    output: Annotated[Path, typer.Option("--output", "-o", help="Corpus directory to create.")],
    directories: Annotated[list[Path] | None, typer.Argument(help="Directories to search recursively.")] = None,
    installed_python: Annotated[
        bool, typer.Option(help="Also collect this Python's standard library and installed packages.")
    ] = False,
    suffix: Annotated[
        list[str] | None, typer.Option(help="Suffix of the files to collect, e.g. .js; repeatable. Default: .py.")
    ] = None,
    max_file_size: Annotated[str, typer.Option(help="Skip larger files.")] = "1MB",
    sample: Annotated[str | None, typer.Option(help="Keep a uniform sample of this much text, e.g. 30MB.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Collect source files from this machine and drop exact duplicates."""
    from codeparrot_ds.corpus.collect import collect, other_suffixes
    from codeparrot_ds.system.jobs import say

    if not directories and not installed_python:
        raise ConfigError("nothing to collect from: give directories, or add --installed-python.")
    manifest = collect(
        output,
        directories or [],
        installed_python=installed_python,
        suffixes=suffix or [".py"],
        max_file_bytes=parse_size(max_file_size),
        sample_bytes=None if sample is None else parse_size(sample),
    )
    rows = [
        ("documents", f"{manifest['documents']:,}"),
        ("text", f"{manifest['text_bytes'] / 1e6:,.1f} MB"),
        *((f"skipped: {reason}", f"{count:,}") for reason, count in manifest["skipped"].items()),
    ]
    print_result(json_output, str(output), rows, manifest)
    if directories and (others := other_suffixes(output)):
        listed = ", ".join(f"{suffix} {count:,}" for suffix, count in others[:_LISTED])
        more = f" and {len(others) - _LISTED:,} more suffixes" if len(others) > _LISTED else ""
        say(f"note: files of other suffixes are not collected ({listed}{more}). --suffix selects them.")


@app.command("clean")
def corpus_clean(
    inputs: Annotated[list[str], typer.Argument(help="Corpus directories, data files, globs, URLs or hub:NAME.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Corpus directory to create.")],
    config: Annotated[Path | None, typer.Option(help="YAML file with thresholds. Default: CodeParrot's.")] = None,
    text_field: TextField = None,
    repository_field: RepositoryField = None,
    path_field: PathField = None,
    licence_field: LicenceField = None,
    source_field: SourceField = None,
    language_field: LanguageField = None,
    commit_field: CommitField = None,
    suffix: Annotated[
        str | None, typer.Option(help="Read files with this suffix, e.g. .py, as one document each.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer, for the rule on characters per token. Default: the rule is off.")
    ] = None,
    licences: Annotated[
        str | None, typer.Option(help="Licences to keep: permissive, or a list: mit,apache-2.0. Default: any.")
    ] = None,
    secrets: Annotated[
        str | None,
        typer.Option(help="What to do about secrets and personal data: report, redact or drop. Default: report."),
    ] = None,
    decontaminate: Annotated[bool, typer.Option(help="Remove documents that contain a problem of HumanEval.")] = True,
    on_bad_document: Annotated[
        str, typer.Option(help="fail: stop. skip: omit the document, list it in rejected.parquet.")
    ] = "fail",
    file_format: Annotated[
        str, typer.Option("--format", help="Format of the files: jsonl.zst or parquet.")
    ] = "jsonl.zst",
    file_size: Annotated[str, typer.Option(help="Text per file of the result.")] = "64MB",
    workers: Annotated[int | None, typer.Option(help="Worker processes. Default: one per core.", min=1)] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for the cluster at RAY_ADDRESS.")] = "local",
    part: Annotated[
        str | None, typer.Option("--slice", help="I/N: measure only slice I of N; the last slice finishes the corpus.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what would be removed; write nothing.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Remove duplicates and unsuitable documents. Near-duplicates too; each removed one is listed with the reason."""
    from codeparrot_ds.corpus.clean import CleanOptions, clean
    from codeparrot_ds.corpus.options import Cleaning, load_cleaning, override
    from codeparrot_ds.system.jobs import Slice, say

    cleaning = load_cleaning(config) if config is not None else Cleaning()
    fields = {
        "text": text_field,
        "repository": repository_field,
        "path": path_field,
        "licence": licence_field,
        "source": source_field,
        "language": language_field,
        "commit": commit_field,
    }
    options = CleanOptions(
        cleaning=override(cleaning, licences=licences, secrets=secrets, decontaminate=decontaminate, fields=fields),
        suffix=suffix,
        tokenizer=tokenizer,
        on_bad_document=on_bad_document,
        file_format=file_format,
        file_bytes=parse_size(file_size),
        workers=workers,
        engine=engine,
        part=None if part is None else Slice.parse(part),
        dry_run=dry_run,
    )
    manifest = clean(inputs, output, options)
    if manifest is None:
        return
    rows = [
        ("read", f"{manifest['read']:,}"),
        *((f"removed: {reason}", f"{count:,}") for reason, count in manifest["removed"].items()),
        ("documents", f"{manifest['documents']:,}"),
    ]
    if "text_bytes" in manifest:
        rows.append(("text", f"{manifest['text_bytes'] / 1e6:,.1f} MB"))
    found = manifest["read_by"]["secrets"]
    rows += [(f"found: {kind}", f"{count:,}") for kind, count in found.items()]
    print_result(json_output, f"{output} (dry run)" if dry_run else str(output), rows, manifest)
    rule = options.cleaning.secrets
    if found and rule is not None and rule.mode == "report":
        say("note: what was found is kept. --secrets redact replaces it, --secrets drop removes the documents.")


@app.command("stats")
def corpus_stats(
    directory: Annotated[Path, typer.Argument(help="Cleaned corpus.")],
    examples: Annotated[int, typer.Option(help="Removed documents to show per reason.", min=0)] = 2,
    json_output: JsonOption = False,
) -> None:
    """Show what came in, what was removed and what is left.

    By step and with examples: groups of duplicates, sizes, licences and languages.
    """
    from codeparrot_ds.corpus.stats import summarize

    found = summarize(directory, examples)
    print_result(json_output, str(directory), found.rows(), found.as_json())
