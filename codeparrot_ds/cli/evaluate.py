"""The `codeparrot-ds evaluate` and `complete` commands."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from codeparrot_ds.cli.output import (
    JsonOption,
    group,
    print_result,
    printable,
    without_option,
)

app = group("Evaluate a converted model.")


@app.command("loss")
def evaluate_loss(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    shards: Annotated[Path, typer.Argument(help="Shard directory.")],
    sequences: Annotated[int, typer.Option(help="Maximum number of validation sequences.", min=1)] = 512,
    part: Annotated[str | None, typer.Option("--slice", help="I/N: evaluate only slice I (from 0) of N.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Split the work over these hosts, via ssh.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Compute validation loss and perplexity, with a unigram baseline over the same tokens."""
    from codeparrot_ds.evaluation.loss import ValidationLoss, validation_loss
    from codeparrot_ds.system.jobs import Slice

    if hostfile is not None:
        from codeparrot_ds.hosts.slices import run_slices

        words = [word for word in without_option(sys.argv[1:], "--hostfile") if word != "--json"]
        result = ValidationLoss.merge([ValidationLoss.parse(it) for it in run_slices(hostfile, [*words, "--json"])])
    else:
        result = validation_loss(model, shards, sequences, part=Slice.parse(part) if part else None)
    rows = [
        ("validation loss", f"{result.loss_valid:.4f} (unigram {result.loss_unigram:.4f})"),
        ("perplexity", f"{result.perplexity_valid:,.1f} (unigram {result.perplexity_unigram:,.1f})"),
        ("evaluated on", f"{result.tokens:,} tokens in {result.sequences:,} sequences"),
    ]
    print_result(json_output, str(model), rows, vars(result))


def complete_command(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; - (the default) reads one from standard input.")
    ] = None,
    num: Annotated[int, typer.Option(help="Completions per prompt.", min=1)] = 4,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.", min=0.01)] = 0.4,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling threshold.", min=0.01, max=1.0)] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens per completion.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Random seed.", min=0)] = 1,
    json_output: JsonOption = False,
) -> None:
    """Complete prompts with a converted model. Each completion ends where a new top-level block starts."""
    from codeparrot_ds.evaluation.complete import Sampling, complete
    from codeparrot_ds.system.paths import text_of

    # Python decodes arguments and standard input by the locale; a prompt is UTF-8.
    texts = [
        sys.stdin.buffer.read().decode(errors="replace") if prompt == "-" else text_of(prompt)
        for prompt in prompts or ["-"]
    ]
    completions = complete(model, texts, Sampling(num, temperature, top_p, max_new_tokens, seed))
    if json_output:
        print(json.dumps([{"prompt": p, "completions": c} for p, c in zip(texts, completions, strict=True)], indent=2))
        return
    for prompt, found in zip(texts, completions, strict=True):
        for number, completion in enumerate(found, start=1):
            print(f"--- completion {number} of {len(found)}\n{printable(prompt + completion)}")
