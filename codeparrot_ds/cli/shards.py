"""The `codeparrot-ds shards` commands."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

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
from codeparrot_ds.cli.output import (
    JsonOption,
    group,
    print_result,
    printable,
    without_option,
)
from codeparrot_ds.errors import ConfigError

app = group("Build, verify and inspect shards: token ids for training.")


@app.command("build")
def shards_build(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Corpora, directories, files (JSON Lines, CSV, parquet, zip), globs, URLs (s3://, hf://), hub:DATASET."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Shard directory or URL to create.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer directory.")],
    eos: Annotated[
        str | None, typer.Option(help="Token that ends each document. Default: the tokenizer's eos_token.")
    ] = None,
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
    valid_fraction: Annotated[
        float | None,
        typer.Option(
            help="Fraction of documents in the validation split; 0: none. Default: 0.005, with --valid-input 0."
        ),
    ] = None,
    valid_input: Annotated[
        list[str] | None, typer.Option(help="Input like INPUTS that is for validation alone; repeatable.")
    ] = None,
    shard_tokens: Annotated[
        int | None,
        typer.Option(help="Approximate tokens per shard. Default: 1/64 of all tokens, within 4 to 128 million.", min=1),
    ] = None,
    on_bad_document: Annotated[
        str, typer.Option(help="fail: stop the build. skip: omit the document, list it in quarantine.jsonl.")
    ] = "fail",
    encoder: Annotated[
        str, typer.Option(help="fastokens, tokenizers, or auto: fastokens where its ids are proved equal.")
    ] = "auto",
    workers: Annotated[int | None, typer.Option(help="Worker processes. Default: one per core.", min=1)] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for the cluster at RAY_ADDRESS.")] = "local",
    part: Annotated[
        str | None,
        typer.Option(
            "--slice", help="I/N: process only slice I of N, counted from 0. Detected under Slurm, torchrun, MPI."
        ),
    ] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Split the work over these hosts, via ssh.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Encode documents into shards. Run the command again to resume an interrupted build."""
    if hostfile is not None:
        from codeparrot_ds.hosts.slices import run_slices
        from codeparrot_ds.shards.format import Manifest

        run_slices(hostfile, without_option(sys.argv[1:], "--hostfile"))
        _print_shards(Manifest.read(output), json_output)
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # unused here, and its threads interfere with fork
    from codeparrot_ds.shards.build import build
    from codeparrot_ds.shards.options import BuildOptions
    from codeparrot_ds.system.jobs import Slice, say, slice_from_environment

    share = Slice.parse(part) if part else None
    if share is None and engine == "local" and (share := slice_from_environment(os.environ)):
        say(f"building only slice {share}, as set by the scheduler's environment (to build everything: --slice 0/1)")
    manifest = build(
        inputs,
        tokenizer,
        output,
        BuildOptions(
            text_field=text_field or "content",
            eos=eos,
            provenance={
                "repository": repository_field,
                "path": path_field,
                "licence": licence_field,
                "source": source_field,
                "language": language_field,
                "commit": commit_field,
            },
            suffix=suffix,
            valid_fraction=valid_fraction,
            valid_inputs=tuple(valid_input or ()),
            shard_tokens=shard_tokens,
            on_bad_document=on_bad_document,
            encoder=encoder,
            workers=workers,
            engine=engine,
            part=share,
        ),
    )
    if manifest is not None:
        _print_shards(manifest, json_output)
    elif json_output:
        print(json.dumps({"directory": output, "finished": False}))


@app.command("verify")
def shards_verify(
    shards: Annotated[str, typer.Argument(help="Shard directory or URL.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte: verify digests, indices and token ids.")
    ] = False,
    against_corpus: Annotated[
        bool, typer.Option("--against-corpus", help="Encode a sample of the input again and compare.")
    ] = False,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="Current location of the input, if it has moved.")
    ] = None,
    valid_input: Annotated[
        list[str] | None, typer.Option(help="Current location of the input for validation, if it has moved.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Verify shards against their manifest."""
    from codeparrot_ds.shards.verify import verify, verify_against_corpus

    manifest = verify(shards, deep=deep)
    compare = against_corpus or inputs or valid_input
    compared = verify_against_corpus(manifest, inputs or [], valid_input or []) if compare else None
    _print_shards(manifest, json_output, {} if compared is None else {"compared with the input": compared})


@app.command("inspect")
def shards_inspect(
    source: Annotated[Path, typer.Argument(help="Shard directory or recipe.")],
    sequence: Annotated[int | None, typer.Option(help="Index of the sequence to show.", min=0)] = None,
    split: Annotated[str, typer.Option(help="train or valid.")] = "train",
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per sequence. Default: the recipe's, else 1,024.", min=1)
    ] = None,
    step: Annotated[int | None, typer.Option(help="With a recipe: the optimizer step to show.", min=0)] = None,
    rank: Annotated[int | None, typer.Option(help="Show only this rank's part of the step.", min=0)] = None,
    world_size: Annotated[int, typer.Option(help="Number of ranks that share the step.", min=1)] = 1,
    json_output: JsonOption = False,
) -> None:
    """Show the text and the origin of a sequence. Or of all sequences that a step of a recipe reads."""
    from codeparrot_ds.run.recipe import load_recipe
    from codeparrot_ds.shards.inspect import inspect_sequence, sequences_of_step

    if (sequence is None) == (step is None):
        raise ConfigError("give either --sequence I, or a recipe and --step K.")
    if source.is_file():
        recipe = load_recipe(source)
        sources, length = recipe.data.sources, seq_len or recipe.model.seq_len
    elif step is not None:
        raise ConfigError(f"{source}: --step needs a recipe, which sets the batch, the seed and the shards.")
    else:
        sources, length = {source: 1.0}, seq_len or 1024
    numbers = [sequence] if sequence is not None else sequences_of_step(recipe, step or 0, rank, world_size)
    found = {number: inspect_sequence(sources, split, length, number) for number in numbers}
    if json_output:
        import msgspec

        print(json.dumps(msgspec.to_builtins(found)))
        return
    for number, excerpts in found.items():
        print(f"=== {split} sequence {number:,} of {length:,} tokens")
        for excerpt in excerpts:
            print(f"--- {printable(excerpt.describe())}\n{printable(excerpt.text)}")


@app.command("adopt")
def shards_adopt(
    prefix: Annotated[
        list[Path], typer.Argument(help="PREFIX of .bin and .idx (Megatron-LM), or of .bin alone (nanoGPT).")
    ],
    tokenizer: Annotated[Path, typer.Option(help="Directory of the tokenizer that produced the ids.")],
    eos: Annotated[
        str | None, typer.Option(help="Token that ends each document. Default: the tokenizer's eos_token.")
    ] = None,
    valid_prefix: Annotated[
        list[Path] | None, typer.Option(help="PREFIX of validation data, in the same directory; repeatable.")
    ] = None,
    valid_fraction: Annotated[
        float | None,
        typer.Option(
            help="Without --valid-prefix: fraction of the tokens, taken from the end; 0: none. Default: 0.005."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of a .bin without .idx: uint16, int32, uint32 or int64. Default: tested.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Copy it into this new shard directory.")
    ] = None,
    append_eos: Annotated[
        bool,
        typer.Option("--append-eos", help="Copy it into shards, with an end token after each document without one."),
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Use a Megatron-LM or nanoGPT dataset in place. A manifest is written next to it; or it is copied into shards."""
    from codeparrot_ds.shards.adopt import adopt

    manifest = adopt(
        prefix,
        tokenizer,
        eos=eos,
        valid_prefix=valid_prefix or (),
        valid_fraction=valid_fraction,
        dtype=dtype,
        append_eos=append_eos,
        output=output,
    )
    _print_shards(manifest, json_output)


def _print_shards(manifest: Any, json_output: bool, also: dict[str, int] | None = None) -> None:
    from codeparrot_ds.documents.splits import SPLITS

    rows = [
        (f"{split} tokens", f"{manifest.tokens(split):,} in {len(manifest.split(split))} shards") for split in SPLITS
    ]
    rows.append(("type", f"{manifest.dtype}, {manifest.vocab_size:,} tokens in the vocabulary"))
    counts = {**manifest.documents, **(also or {})}
    rows += [(f"documents {name}", f"{count:,}") for name, count in counts.items() if count or name == "read"]
    rows += [(f"files not read: {reason}", f"{count:,}") for reason, count in manifest.skipped_files.items()]
    result = {
        "directory": str(manifest.directory),
        "tokens": {split: manifest.tokens(split) for split in SPLITS},
        "documents": counts,
        "skipped_files": manifest.skipped_files,
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "digest": manifest.digest,
    }
    print_result(json_output, str(manifest.directory), rows, result)
