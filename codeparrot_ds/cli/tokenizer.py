"""`codeparrot-ds tokenizer`."""

from pathlib import Path
from typing import Annotated

import typer

from codeparrot_ds.cli.output import JsonOption, group, print_result

app = group("Byte-level BPE tokenizers.")


@app.command("train")
def tokenizer_train(
    corpus: Annotated[Path, typer.Argument(help="Corpus directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Tokenizer directory to make.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, bytes and <|endoftext|> included.")] = 32_768,
    max_seq_len: Annotated[int, typer.Option(help="Recorded as the model's longest input, tokens.")] = 1024,
    json_output: JsonOption = False,
) -> None:
    """Train a byte-level BPE tokenizer on a corpus."""
    from codeparrot_ds.tokenizer.train import train

    manifest = train(corpus, output, vocab_size, max_seq_len)
    rows = [("vocabulary", f"{manifest['vocab_size']:,} tokens"), ("digest", manifest["digest"])]
    print_result(json_output, str(output), rows, manifest)
