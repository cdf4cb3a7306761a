"""The `codeparrot-ds tokenizer` commands."""

from pathlib import Path
from typing import Annotated

import typer

from codeparrot_ds.cli.output import JsonOption, group, print_result

app = group("Train byte-level BPE tokenizers.")


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
