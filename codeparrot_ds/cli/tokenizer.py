"""The `codeparrot-ds tokenizer` commands."""

import json
from pathlib import Path
from typing import Annotated

import typer

from codeparrot_ds.cli.output import JsonOption, group, print_result, printable

app = group("Train byte-level BPE tokenizers, and measure any tokenizer.")


@app.command("train")
def tokenizer_train(
    corpus: Annotated[Path, typer.Argument(help="Corpus directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Tokenizer directory to create.")],
    vocab_size: Annotated[int, typer.Option(help="Number of tokens, including bytes and <|endoftext|>.")] = 32_768,
    max_seq_len: Annotated[int, typer.Option(help="Maximum input length to record, in tokens.")] = 1024,
    json_output: JsonOption = False,
) -> None:
    """Train a byte-level BPE tokenizer on a corpus."""
    from codeparrot_ds.tokenizer.train import train

    manifest = train(corpus, output, vocab_size, max_seq_len)
    rows = [("vocabulary", f"{manifest['vocab_size']:,} tokens"), ("digest", manifest["digest"])]
    print_result(json_output, str(output), rows, manifest)


@app.command("report")
def tokenizer_report(
    tokenizer: Annotated[str, typer.Argument(help="Tokenizer directory, or a model on the Hub.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Corpora, directories, files (JSON Lines, CSV, parquet, zip), globs, URLs (s3://, hf://), hub:DATASET."
        ),
    ],
    against: Annotated[
        list[str] | None, typer.Option(help="Another tokenizer, directory or on the Hub, to compare with; repeatable.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "content",
    suffix: Annotated[
        str | None, typer.Option(help="Read files with this suffix, e.g. .py, as one document each.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Measure how well a tokenizer fits documents, in all and by kind of text."""
    from codeparrot_ds.tokenizer.report import report

    found = report(tokenizer, inputs, against or [], text_field=text_field, suffix=suffix)
    if json_output:
        print(json.dumps(found.as_json(), indent=2))
    else:
        print(*map(printable, found.table()), sep="\n")
