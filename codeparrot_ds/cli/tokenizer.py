"""The `codeparrot-ds tokenizer` commands."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from codeparrot_ds.cli.fields import TextField
from codeparrot_ds.cli.output import JsonOption, group, print_result, printable

app = group("Train byte-level BPE tokenizers, and measure any tokenizer.")


@app.command("train")
def tokenizer_train(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Corpora, directories, files (JSON Lines, CSV, parquet, zip), globs, URLs (s3://, hf://), hub:DATASET."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Tokenizer directory to create.")],
    vocab_size: Annotated[
        int, typer.Option(help="Number of tokens, including 256 bytes, <|endoftext|> and the reserved tokens.")
    ] = 32_768,
    max_seq_len: Annotated[
        int, typer.Option(help="Context length that the tokenizer states, in tokens; no text is cut.")
    ] = 1024,
    documents: Annotated[
        int | None,
        typer.Option(help="Train on a reproducible sample of this many documents. Default: on all.", min=1),
    ] = None,
    reserve: Annotated[
        int, typer.Option(help="Tokens to reserve, in addition to those for fill-in-the-middle.", min=0)
    ] = 0,
    text_field: TextField = None,
    suffix: Annotated[
        str | None, typer.Option(help="Read files with this suffix, e.g. .py, as one document each.")
    ] = None,
    on_bad_document: Annotated[
        str, typer.Option(help="fail: stop the training. skip: omit the document, list it in quarantine.jsonl.")
    ] = "fail",
    trainer: Annotated[str, typer.Option(help="ffbpe, tokenizers, or auto: ffbpe where its result is equal.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="Worker processes. Default: one per core.", min=1)] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for the cluster at RAY_ADDRESS.")] = "local",
    json_output: JsonOption = False,
) -> None:
    """Train a byte-level BPE tokenizer on documents. Run the command again to resume an interrupted training."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # unused here, and its threads interfere with fork
    from codeparrot_ds.tokenizer.train import TrainOptions, train

    options = TrainOptions(
        documents=documents,
        reserve=reserve,
        text_field=text_field or "content",
        suffix=suffix,
        on_bad_document=on_bad_document,
        trainer=trainer,
        workers=workers,
        engine=engine,
    )
    manifest = train(inputs, output, vocab_size, max_seq_len, options)
    rows = [
        ("vocabulary", f"{manifest['vocab_size']:,} tokens"),
        ("text", f"{manifest['trained_on']['bytes'] / 1e6:,.1f} MB"),
        *((f"documents {name}", f"{count:,}") for name, count in manifest["documents"].items() if count),
        *((f"files not read: {reason}", f"{count:,}") for reason, count in manifest["skipped_files"].items()),
        ("trainer", manifest["trainer"]),
        ("digest", manifest["digest"]),
    ]
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
    text_field: TextField = None,
    suffix: Annotated[
        str | None, typer.Option(help="Read files with this suffix, e.g. .py, as one document each.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Measure how well a tokenizer fits documents. In all, and by kind of text."""
    from codeparrot_ds.tokenizer.report import report

    found = report(tokenizer, inputs, against or [], text_field=text_field or "content", suffix=suffix)
    if json_output:
        print(json.dumps(found.as_json(), indent=2))
    else:
        print(*map(printable, found.table()), sep="\n")
