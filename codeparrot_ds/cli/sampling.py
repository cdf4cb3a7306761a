"""The `codeparrot-ds evaluate humaneval`, `mbpp` and `infill` commands: sample completions and score them."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from codeparrot_ds.cli.output import JsonOption, ModelArgument, print_result, without_option
from codeparrot_ds.errors import ConfigError

OutputOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Directory for samples and results. Default: evaluations/BENCHMARK/MODEL."),
]
SamplesOption = Annotated[int, typer.Option("-n", "--samples", help="Samples per problem and temperature.", min=1)]
TemperatureOption = Annotated[
    list[float] | None,
    typer.Option("--temperature", help="May be repeated. Default: 0.2, 0.6 and 0.8.", min=0.0, show_default=False),
]
TopPOption = Annotated[float, typer.Option(help="Nucleus sampling threshold.", min=0.01, max=1.0)]
MaxNewTokensOption = Annotated[int, typer.Option(help="Maximum tokens per completion.", min=1)]
SeedOption = Annotated[int, typer.Option(help="Random seed.", min=0)]
BatchSizeOption = Annotated[int, typer.Option(help="Samples generated at a time.", min=1)]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", help="End completions at this string; may be repeated. Default: the benchmark's.", show_default=False
    ),
]
StripOption = Annotated[
    bool,
    typer.Option("--strip-prompt/--keep-prompt", help="Strip the white space at the ends of a prompt for the model."),
]
ScoreOption = Annotated[bool, typer.Option("--score/--no-score", help="Run the samples' tests in the sandbox.")]
SliceOption = Annotated[
    str | None, typer.Option("--slice", help="I/N: only generate the samples of slice I (from 0) of N.")
]
HostfileOption = Annotated[Path | None, typer.Option(help="Generate on these hosts, via ssh, on a shared disk.")]


def humaneval(
    model: ModelArgument,
    problems: Annotated[Path | None, typer.Option(help="Other problems of the same form, JSON Lines.")] = None,
    output: OutputOption = None,
    samples: SamplesOption = 200,
    temperature: TemperatureOption = None,
    top_p: TopPOption = 0.95,
    max_new_tokens: MaxNewTokensOption = 256,
    seed: SeedOption = 1,
    batch_size: BatchSizeOption = 64,
    stop: StopOption = None,
    strip: StripOption = True,
    score: ScoreOption = True,
    part: SliceOption = None,
    hostfile: HostfileOption = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Also write pass@k to this TensorBoard directory.")] = None,
    step: Annotated[int, typer.Option(help="Optimizer step of the model, for TensorBoard.", min=0)] = 0,
    json_output: JsonOption = False,
) -> None:
    """Sample HumanEval and estimate pass@k. The tests of the completions are run in a sandbox.

    The defaults are those of CodeParrot's evaluation. A call that was killed resumes when it is made again.
    """
    how: dict[str, Any] = {"samples": samples, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    how |= {"batch_size": batch_size, "strip": strip, "temperatures": temperature}
    results = _evaluate("humaneval", model, problems, output, how, stop, score, (part, hostfile), json_output)
    if tensorboard is not None and results is not None:
        _write_to_tensorboard(tensorboard, step, results)


def mbpp(
    model: ModelArgument,
    problems: Annotated[Path, typer.Argument(help="MBPP's problems, JSON Lines.", metavar="FILE")],
    output: OutputOption = None,
    samples: SamplesOption = 200,
    temperature: TemperatureOption = None,
    top_p: TopPOption = 0.95,
    max_new_tokens: MaxNewTokensOption = 256,
    seed: SeedOption = 1,
    batch_size: BatchSizeOption = 64,
    stop: StopOption = None,
    strip: StripOption = True,
    score: ScoreOption = True,
    part: SliceOption = None,
    hostfile: HostfileOption = None,
    json_output: JsonOption = False,
) -> None:
    """Sample a file of MBPP's form and estimate pass@k. The tests of the answers are run in a sandbox."""
    how: dict[str, Any] = {"samples": samples, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    how |= {"batch_size": batch_size, "strip": strip, "temperatures": temperature}
    _evaluate("mbpp", model, problems, output, how, stop, score, (part, hostfile), json_output)


def infill(
    model: ModelArgument,
    problems: Annotated[Path, typer.Argument(help="Problems of HumanEval-Infilling, JSON Lines.", metavar="FILE")],
    output: OutputOption = None,
    samples: SamplesOption = 200,
    temperature: TemperatureOption = None,
    top_p: TopPOption = 0.95,
    max_new_tokens: MaxNewTokensOption = 256,
    seed: SeedOption = 1,
    batch_size: BatchSizeOption = 64,
    stop: StopOption = None,
    score: ScoreOption = True,
    part: SliceOption = None,
    hostfile: HostfileOption = None,
    json_output: JsonOption = False,
) -> None:
    """Fill in the middle of code and estimate pass@k. The tests of the results are run in a sandbox.

    The model's tokenizer must have tokens for prefix, suffix and middle.
    """
    how: dict[str, Any] = {"samples": samples, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    how |= {"batch_size": batch_size, "strip": False, "temperatures": temperature}
    _evaluate("infill", model, problems, output, how, stop, score, (part, hostfile), json_output)


def _evaluate(
    name: str,
    model: str,
    file: Path | None,
    output: Path | None,
    how: dict[str, Any],
    stop: list[str] | None,
    score: bool,
    where: tuple[str | None, Path | None],
    json_output: bool,
) -> dict[str, Any] | None:
    """Sample, score and print. Returns the results; None for a slice."""
    from codeparrot_ds.evaluation.benchmarks import BENCHMARKS, stops_of
    from codeparrot_ds.evaluation.pretrained import limit_threads, load_pretrained
    from codeparrot_ds.evaluation.sampling import Run, Settings
    from codeparrot_ds.run.directory import CERTIFICATE
    from codeparrot_ds.system.jobs import Slice, say

    benchmark = BENCHMARKS[name]
    problems = benchmark.load(file)
    temperatures = sorted(set(how["temperatures"] or Settings.temperatures))
    settings = Settings(**{**how, "temperatures": temperatures, "stops": stops_of(benchmark, stop)})
    part, hostfile = where
    if part is not None and hostfile is not None:
        raise ConfigError("--hostfile makes the slices itself: omit --slice.")
    if score and part is None:
        from codeparrot_ds.evaluation.sandbox.bubble import bubblewrap_version

        bubblewrap_version()  # rather than after hours of sampling
    found = load_pretrained(model, fp32=False)
    limit_threads(found)
    if name == "infill" and (found.directory / CERTIFICATE).is_file():
        say(
            f"note: {found.name}: codeparrot-ds does not train infilling; unless the model was trained further, its "
            "tokens for it mean nothing to it."
        )
    directory = output or Path("evaluations") / name / model.strip("/").replace("/", "--")
    run = Run(found, benchmark, problems, settings, directory)
    if hostfile is not None:
        from codeparrot_ds.hosts.slices import run_slices

        run_slices(hostfile, without_option(sys.argv[1:], "--hostfile"))
    made = run.sample(Slice.parse(part) if part else None)
    if part is not None:
        print_result(json_output, str(directory), [("samples", f"{made:,}")], {"samples": made})
        return None
    files = run.finish()
    results: dict[str, Any] = {"receipt": run.receipt, "temperatures": {}}
    rows: list[tuple[str, str]] = []
    for temperature, path in files.items():
        counts = run.counts(temperature)
        result: dict[str, Any] = {"samples_file": str(path), "sampling": counts}
        rows.append(("temperature", f"{temperature:g}"))
        if score:
            from codeparrot_ds.evaluation.score import load_samples, rows_of, write_results
            from codeparrot_ds.evaluation.score import score as score_samples

            read = load_samples(path, problems)
            scores = score_samples(read, problems)
            write_results(path.with_name(path.name.replace("samples", "verdicts")), read, scores.outcomes)
            result["scores"] = scores.as_json()
            rows += rows_of(scores)
        results["temperatures"][f"{temperature:g}"] = result
        rows += _count_rows(counts, path)
    from codeparrot_ds.system.files import write_json

    write_json(directory / "results.json", results)
    print_result(json_output, f"{name}: {found.name}", rows, results)
    return results


def _write_to_tensorboard(directory: Path, step: int, results: dict[str, Any]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(directory))
    for temperature, result in results["temperatures"].items():
        for k, estimate in result.get("scores", {}).get("pass_at_k", {}).items():
            board.add_scalar(f"humaneval/{k} at temperature {temperature}", estimate["value"], step)
    board.close()


def _count_rows(counts: dict[str, Any], path: Path) -> list[tuple[str, str]]:
    rows = [
        ("samples in", str(path)),
        ("ended by", ", ".join(f"{why} {count:,}" for why, count in sorted(counts["ended"].items()))),
    ]
    named = {
        "ended_at_the_context": "samples shortened by the context",
        "empty": "empty samples",
        "not_aligned": "samples not aligned with the prompt",
        "prompts_stripped": "prompts stripped",
        "prompts_truncated": "prompts truncated",
    }
    return rows + [(text, f"{counts[key]:,}") for key, text in named.items() if counts[key]]
