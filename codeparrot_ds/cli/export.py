"""The `codeparrot-ds convert` and `push` commands."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from codeparrot_ds.cli.completion import complete_run
from codeparrot_ds.cli.output import JsonOption, parse_size, print_result
from codeparrot_ds.errors import ConfigError

_ATTENTION_SCALE = {
    "none": "none",
    "folded": "folded into the weights",
    "kept": "a setting, which needs transformers>=5.4",
}


def convert_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="Run directory or one checkpoint; with --check, a converted model.", autocompletion=complete_run
        ),
    ],
    output: Annotated[Path | None, typer.Argument(help="Hugging Face directory to create.")] = None,
    tag: Annotated[int | None, typer.Option(help="Step of the checkpoint. Default: the newest.")] = None,
    average: Annotated[int, typer.Option(help="Average the weights of the last N checkpoints.", min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16 or float16.")] = "float32",
    keep_attention_scale: Annotated[
        bool,
        typer.Option(
            "--keep-attention-scale",
            help="Write scale_attn_by_inverse_layer_idx as a setting, which most runtimes ignore, instead of folding "
            "the scale into the weights.",
        ),
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of one safetensors file.")] = "5GB",
    memory_cap: Annotated[str, typer.Option(help="Memory limit of this process.")] = "1.5GB",
    sequences: Annotated[
        int | None,
        typer.Option(
            help="Number of validation sequences to verify the model on. Default: all; without a GPU, at most as many "
            "as take a few minutes.",
            min=0,
        ),
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="Hosts of a run without a shared disk: fetch their checkpoint files first.")
    ] = None,
    universal: Annotated[
        bool, typer.Option("--to-universal", help="Write a DeepSpeed universal checkpoint to resume training from.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Verify a converted model against its certificate.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Convert a checkpoint to a Hugging Face model and verify it."""
    from codeparrot_ds.export import certificate as certificates

    if check == (output is not None):
        raise ConfigError("give a run and an output directory, or a converted model and --check.")
    if hostfile is not None and check:
        raise ConfigError("--check reads local files only: omit --hostfile.")
    if hostfile is not None:
        from codeparrot_ds.checkpoint.source import source_checkpoints
        from codeparrot_ds.hosts.gather import gather
        from codeparrot_ds.hosts.hostfile import read_hostfile

        for each in source_checkpoints(source, tag, average):
            gather(each, list(read_hostfile(hostfile)))
    if output is not None and universal:
        if (average, dtype, keep_attention_scale) != (1, "float32", False):
            raise ConfigError(
                "--to-universal keeps one checkpoint's weights unchanged: omit --average, --dtype and "
                "--keep-attention-scale."
            )
        from codeparrot_ds.checkpoint.source import source_checkpoint
        from codeparrot_ds.export.universal import to_universal

        made = to_universal(source_checkpoint(source, tag), output, parse_size(memory_cap))
        size = sum(file["bytes"] for file in made.files.values())
        facts = {"step": made.step, "parameters": made.parameters, "files": len(made.files), "bytes": size}
        rows = [("step", f"{made.step:,}"), ("parameters", f"{made.parameters:,}")]
        rows += [("files", f"{len(made.files):,}"), ("size", f"{size / 1e9:.3f} GB")]
        print_result(json_output, str(output), rows, facts)
        return
    if output is None:
        output = source
        certificate = certificates.check(source)
    else:
        from codeparrot_ds.checkpoint.source import source_checkpoints
        from codeparrot_ds.export.convert import convert

        certificate = convert(
            source_checkpoints(source, tag, average),
            output,
            dtype=dtype,
            keep_attention_scale=keep_attention_scale,
            max_shard_bytes=parse_size(max_shard_size),
            memory_cap_bytes=parse_size(memory_cap),
            sequences=sequences,
        )
    forward, engine = certificate["forward"], certificate["engine"]
    if engine["not_compared"] is not None:
        print(f"note: not compared with the loss measured in training: {engine['not_compared']}.", file=sys.stderr)
    rows = [
        ("step", ", ".join(f"{part['step']:,}" for part in certificate["source"])),
        ("parameters", f"{certificate['parameters']:,} in {certificate['dtype']}"),
    ]
    if "attention_scale" in certificate:  # like loss_transformers, not in certificates of earlier versions
        rows.append(("attention scale", _ATTENTION_SCALE[certificate["attention_scale"]]))
    if engine["loss_valid"] is not None:
        rows.append(("validation loss in training", f"{engine['loss_valid']:.6f}"))
    if forward is not None:
        over = f"over {forward['sequences']:,} sequences"
        rows += [
            ("validation loss of the checkpoint's weights", f"{forward['loss_master']:.6f} {over}"),
            ("validation loss of this model", f"{forward['loss_written']:.6f} {over}"),
            ("largest logit difference", f"{forward['largest_logit_difference']:.2g}"),
        ]
        if "loss_transformers" in forward:
            rows.append(("validation loss according to transformers", f"{forward['loss_transformers']:.6f}"))
    if check:
        rows.append(("every file and tensor", "matches the certificate"))
        rows.append(("the installed transformers", "computes what the weights and the configuration say"))
    print_result(json_output, str(output), rows, certificate)


def push_command(
    directory: Annotated[Path, typer.Argument(help="Converted model, tokenizer, shards or corpus.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face Hub; created if missing.")],
    branch: Annotated[str | None, typer.Option(help="Branch to push to, e.g. the run's name; main by default.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Also push the files to main.")] = False,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Visibility of a newly created repository.")
    ] = True,
    valid_fraction: Annotated[
        float | None, typer.Option(help="Of a corpus: fraction of documents in the validation split. Default: 0.005.")
    ] = None,
    tries: Annotated[int, typer.Option(help="Attempts when the network or the Hub fails.", min=1)] = 6,
    timeout: Annotated[float, typer.Option(help="Seconds without data after which an attempt fails.", min=1)] = 120,
    json_output: JsonOption = False,
) -> None:
    """Push a finished directory to the Hugging Face Hub. In one commit; a corpus as train and validation."""
    from codeparrot_ds.export.hub import push

    pushed = push(
        directory,
        repo,
        branch=branch,
        merge=merge,
        private=private,
        valid_fraction=valid_fraction,
        tries=tries,
        timeout_seconds=timeout,
    )
    rows = [("files", f"{pushed.files:,}"), *zip(pushed.branches, pushed.commits, strict=True)]
    print_result(json_output, f"{pushed.repo} ({pushed.repo_type})", rows, vars(pushed))
