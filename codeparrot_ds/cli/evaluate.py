"""The `codeparrot-ds evaluate` commands."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codeparrot_ds.cli import sampling
from codeparrot_ds.cli.output import (
    JsonOption,
    ModelArgument,
    group,
    parse_size,
    print_result,
    printable,
    without_option,
)
from codeparrot_ds.errors import ConfigError

if TYPE_CHECKING:
    from codeparrot_ds.evaluation.loss import Group, ValidationLoss

_SHOWN, _NAME_WIDTH = 8, 48  # groups of a kind in a table, characters of a name
SequencesOption = Annotated[int, typer.Option(help="Maximum number of validation sequences.", min=1)]
SeqLenOption = Annotated[
    int | None, typer.Option(help="Tokens per sequence. Default: the model's context.", min=1, show_default=False)
]
app = group("Measure a model: bits per byte, HumanEval, against another.")
for _command in (sampling.humaneval, sampling.mbpp, sampling.infill):
    app.command(_command.__name__)(_command)


@app.command("loss")
def evaluate_loss(
    model: ModelArgument,
    shards: Annotated[Path, typer.Argument(help="Shard directory.")],
    sequences: SequencesOption = 512,
    seq_len: SeqLenOption = None,
    part: Annotated[str | None, typer.Option("--slice", help="I/N: evaluate only slice I (from 0) of N.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Split the work over these hosts, via ssh.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Compute validation loss, bits per byte and perplexity.

    With a unigram baseline over the same tokens, and by licence, length and repository.

    With --slice and --json, the losses of the documents are printed, which `--hostfile` merges.
    """
    from codeparrot_ds.evaluation.document_loss import measure
    from codeparrot_ds.evaluation.loss import ValidationLoss, dump_measured, merge_measured
    from codeparrot_ds.evaluation.pretrained import load_pretrained
    from codeparrot_ds.system.jobs import Slice

    if hostfile is not None:
        from codeparrot_ds.hosts.slices import run_slices

        words = [word for word in without_option(sys.argv[1:], "--hostfile") if word != "--json"]
        measured = merge_measured(run_slices(hostfile, [*words, "--json"]))
    else:
        slice_ = Slice.parse(part) if part else None
        measured = measure(load_pretrained(model), {shards: 1.0}, sequences, seq_len, slice_)
        if slice_ is not None and json_output:
            print(dump_measured(measured))
            return
    result = ValidationLoss.of(measured)
    print_result(json_output, model, _loss_rows(result), result.to_dict())


def _loss_rows(result: "ValidationLoss") -> list[tuple[str, str]]:
    loss = f"{result.loss_valid:.4f}{_error(result.loss_error)} (unigram {result.loss_unigram:.4f})"
    rows = [
        ("validation loss", loss),
        ("perplexity", f"{result.perplexity_valid:,.1f} (unigram {result.perplexity_unigram:,.1f})"),
        ("bits per byte", _bits(result.bits_per_byte, result.bits_per_byte_error)),
        ("evaluated on", f"{result.tokens:,} tokens in {result.sequences:,} sequences"),
        ("", f"{result.bytes:,} bytes of {result.documents:,} documents"),
    ]
    kinds = {"licence": result.by_licence, "length": result.by_length, "repository": result.by_repository}
    for kind, groups in kinds.items():
        rows += [(printable(f"{kind} {each.name}")[:_NAME_WIDTH], _group(each)) for each in groups[:_SHOWN]]
        if len(groups) > _SHOWN:
            rest = sum(each.documents for each in groups[_SHOWN:])
            rows.append((f"{len(groups) - _SHOWN:,} other values of {kind}", f"{rest:,} documents (--json lists them)"))
    return rows


def _group(group: "Group") -> str:
    bits = _bits(group.bits_per_byte, group.bits_per_byte_error)
    return f"{bits} ({group.documents:,} documents, {group.bytes:,} bytes)"


def _bits(bits: float | None, error: float | None) -> str:
    return "no text" if bits is None else f"{bits:.4f}{_error(error)}"


def _error(error: float | None) -> str:
    return "" if error is None else f" \u00b1 {error:.4f}"


@app.command("compare")
def evaluate_compare(
    model_a: ModelArgument,
    model_b: ModelArgument,
    shards: Annotated[Path, typer.Argument(help="Shard directory, built with the tokenizer of both models.")],
    sequences: SequencesOption = 512,
    seq_len: SeqLenOption = None,
    json_output: JsonOption = False,
) -> None:
    """Compare two models by bits per byte. On the same validation sequences, with a 95 % confidence interval."""
    from codeparrot_ds.evaluation.compare import compare_losses

    found = compare_losses(model_a, model_b, {shards: 1.0}, sequences, seq_len)
    interval = "" if found.low is None else f" (95 % interval {found.low:+.4f} to {found.high:+.4f})"
    rows = [
        ("A", f"{found.a:.4f} bits per byte, loss {found.loss_a:.4f}"),
        ("B", f"{found.b:.4f} bits per byte, loss {found.loss_b:.4f}"),
        ("B minus A", f"{found.difference:+.4f} bits per byte{interval}"),
        ("B is better on", f"{found.b_better:.1%} of {found.documents:,} documents"),
        ("evaluated on", f"{found.tokens:,} tokens, {found.bytes:,} bytes"),
        ("result", found.verdict()),
    ]
    print_result(json_output, f"A: {model_a}\nB: {model_b}", rows, found.to_dict())


@app.command("score")
def evaluate_score(
    samples: Annotated[Path, typer.Argument(help="JSON Lines with task_id and completion; plain or .gz.")],
    problems: Annotated[
        Path | None, typer.Option(help="File of problems in the format of HumanEval, MBPP or HumanEval-Infilling.")
    ] = None,
    k: Annotated[list[int] | None, typer.Option(help="k of pass@k; repeat for several. [default: 1, 10, 100]")] = None,
    timeout: Annotated[float, typer.Option(help="CPU time of a program (seconds).", min=0.01)] = 3.0,
    memory: Annotated[str, typer.Option(help="Memory of a program.")] = "512MiB",
    package: Annotated[
        list[str] | None, typer.Option(help="Installed package that programs may import, e.g. numpy; repeatable.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Programs to run at a time; one per core.", min=1)] = None,
    results: Annotated[Path | None, typer.Option(help="Write each sample with its verdict to this file.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Run given samples of a benchmark in a sandbox, for pass@k.

    Without --problems, the samples are of HumanEval (pip install 'codeparrot-ds[evaluate]'). The sandbox needs
    bubblewrap.
    """
    from codeparrot_ds.evaluation.problems import load_humaneval, load_problems
    from codeparrot_ds.evaluation.sandbox.outcome import Limits
    from codeparrot_ds.evaluation.score import KS, load_samples, rows_of, score, write_results
    from codeparrot_ds.system.files import make_directory

    known = load_problems(problems) if problems is not None else load_humaneval()
    read = load_samples(samples, known)
    if results is not None:
        if results.resolve() == samples.resolve():
            raise ConfigError(f"{results}: contains the samples. Name another file for --results.")
        make_directory(results.parent)
    limits = Limits(timeout=timeout, memory=parse_size(memory))
    scores = score(read, known, k or KS, limits, workers, package or ())
    if results is not None:
        write_results(results, read, scores.outcomes)
    print_result(json_output, str(samples), rows_of(scores), scores.as_json())
