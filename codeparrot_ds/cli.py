"""The `codeparrot-ds` command. Every verb imports its stage only when it is called, so that --help is quick."""

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from codeparrot_ds import __version__
from codeparrot_ds.errors import EXIT_USER_ERROR, ConfigError, UserError

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _group(help_text: str) -> typer.Typer:
    return typer.Typer(help=help_text, no_args_is_help=True, add_completion=False, context_settings=_SETTINGS)


app = _group("From folders of source code to a trained GPT-2 code model in Hugging Face format.")
corpus_app = _group("Documents with their provenance.")
tokenizer_app = _group("Byte-level BPE tokenizers.")
shards_app = _group("Token ids in memory-mapped shards.")
evaluate_app = _group("What a model is worth.")
app.add_typer(corpus_app, name="corpus")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(shards_app, name="shards")
app.add_typer(evaluate_app, name="evaluate")

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def main() -> NoReturn:
    """Run a verb. Exit codes: 0 done, 1 something you can mend, 2 usage; a traceback is a defect of ours."""
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        from codeparrot_ds.system.files import explain_os_error

        explained = explain_os_error(error)
        if explained is None:
            raise
        _fail(str(explained))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def _print_table(title: str, rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def _print_result(as_json: bool, title: str, rows: list[tuple[str, str]], result: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print_table(title, rows)


def parse_size(text: str) -> int:
    """Bytes from "30MB", "32kB", "5GB" or "1000" (decimal units). Raises ConfigError."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", text.strip().upper())
    if match is None:
        raise ConfigError(f"size {text!r}: write it like 30MB, 5GB or 32kB.")
    return int(float(match[1]) * units[match[2]])


def parse_bandwidth(text: str) -> float:
    """Bytes per second from "200Gb" or "800Mb" (bits per second, as networks are named). Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])(?:b|bps|b/s|bit|bit/s)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"network {text!r}: write it in bits per second, like 200Gb or 800Mb.")
    return float(match[1]) * {"M": 1e6, "G": 1e9}[match[2]] / 8


def parse_steps(text: str) -> tuple[int, int | None]:
    """(first, end) from "100:200", "100:", ":200" or ":"; no end is None. Raises ConfigError."""
    match = re.fullmatch(r"(\d*):(\d*)", text.strip())
    first, end = (int(match[1] or 0), int(match[2]) if match[2] else None) if match else (0, 0)
    if end is not None and end <= first:
        raise ConfigError(f"steps {text!r}: write them like 100:200, 100: or :200, the first below the second.")
    return first, end


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@corpus_app.command("collect")
def corpus_collect(
    output: Annotated[Path, typer.Option("--output", "-o", help="Corpus directory to make.")],
    directories: Annotated[list[Path] | None, typer.Argument(help="Searched recursively.")] = None,
    installed_python: Annotated[
        bool, typer.Option(help="Also take this Python's standard library and installed packages.")
    ] = False,
    suffix: Annotated[str, typer.Option(help="Of the files to take.")] = ".py",
    max_file_size: Annotated[str, typer.Option(help="Leave larger files out.")] = "1MB",
    sample: Annotated[str | None, typer.Option(help="Stop at this much text: a uniform sample, e.g. 30MB.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Collect source files from this machine, without exact copies."""
    from codeparrot_ds.corpus.collect import collect

    if not directories and not installed_python:
        raise ConfigError("nothing to collect from: name directories, or add --installed-python.")
    manifest = collect(
        output,
        directories or [],
        installed_python=installed_python,
        suffix=suffix,
        max_file_bytes=parse_size(max_file_size),
        sample_bytes=None if sample is None else parse_size(sample),
    )
    rows = [
        ("documents", f"{manifest['documents']:,}"),
        ("text", f"{manifest['text_bytes'] / 1e6:,.1f} MB"),
        *((f"left out: {reason}", f"{count:,}") for reason, count in manifest["skipped"].items()),
    ]
    _print_result(json_output, str(output), rows, manifest)


@tokenizer_app.command("train")
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
    _print_result(json_output, str(output), rows, manifest)


@shards_app.command("build")
def shards_build(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Corpus directories, JSON Lines or parquet files, globs, URLs (s3://, hf://), hub:DATASET."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Shard directory or URL to make.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer directory.")],
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "content",
    suffix: Annotated[str | None, typer.Option(help="Take files like .py in a directory, one document each.")] = None,
    valid_fraction: Annotated[float, typer.Option(help="Share of documents for validation.")] = 0.005,
    shard_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a shard, about; a 64th of all by default, 4 to 128 million.", min=1)
    ] = None,
    on_bad_document: Annotated[str, typer.Option(help="fail, or skip and list it in quarantine.jsonl.")] = "fail",
    encoder: Annotated[str, typer.Option(help="auto, fastokens or tokenizers.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default.", min=1)] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for the cluster at RAY_ADDRESS.")] = "local",
    part: Annotated[
        str | None,
        typer.Option("--slice", help="I/N: this part of the work only; Slurm, torchrun and MPI say it themselves."),
    ] = None,
    hostfile: Annotated[Path | None, typer.Option(help="A slice on each of these hosts, over ssh.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Encode documents into shards. Run again, it goes on where it stopped."""
    if hostfile is not None:
        from codeparrot_ds.hosts.slices import run_slices
        from codeparrot_ds.shards.format import Manifest

        run_slices(hostfile, without_option(sys.argv[1:], "--hostfile"))
        _print_shards(Manifest.read(output), json_output)
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # not used here; its threads would stand in the way of forks
    from codeparrot_ds.shards.build import build
    from codeparrot_ds.system.jobs import Slice, say, slice_from_environment

    share = Slice.parse(part) if part else None
    if share is None and engine == "local" and (share := slice_from_environment(os.environ)):
        say(f"slice {share} of the work, as the scheduler's environment says (all of it: --slice 0/1)")
    manifest = build(
        inputs,
        tokenizer,
        output,
        text_field=text_field,
        suffix=suffix,
        valid_fraction=valid_fraction,
        shard_tokens=shard_tokens,
        on_bad_document=on_bad_document,
        encoder=encoder,
        workers=workers,
        engine=engine,
        part=share,
    )
    if manifest is not None:
        _print_shards(manifest, json_output)
    elif json_output:
        print(json.dumps({"directory": output, "finished": False}))


@shards_app.command("verify")
def shards_verify(
    shards: Annotated[str, typer.Argument(help="Shard directory or URL.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte: digests, indices, ids.")] = False,
    against_corpus: Annotated[
        bool, typer.Option("--against-corpus", help="Encode a sample of the input again and compare.")
    ] = False,
    inputs: Annotated[list[str] | None, typer.Option("--input", help="Where the input lies now, if it moved.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Hold shards against their manifest."""
    from codeparrot_ds.shards.verify import verify, verify_against_corpus

    manifest = verify(shards, deep=deep)
    compared = verify_against_corpus(manifest, inputs or []) if against_corpus or inputs else None
    _print_shards(manifest, json_output, {} if compared is None else {"compared with the input": compared})


@shards_app.command("inspect")
def shards_inspect(
    source: Annotated[Path, typer.Argument(help="Shard directory, or a recipe.")],
    sequence: Annotated[int | None, typer.Option(help="Number of a sequence.", min=0)] = None,
    split: Annotated[str, typer.Option(help="train or valid.")] = "train",
    seq_len: Annotated[int | None, typer.Option(help="Tokens; of a recipe by default, else 1,024.", min=1)] = None,
    step: Annotated[int | None, typer.Option(help="Of a recipe: what this optimizer step reads.", min=0)] = None,
    rank: Annotated[int | None, typer.Option(help="Only this rank's part of the step.", min=0)] = None,
    world_size: Annotated[int, typer.Option(help="Ranks that share the step.", min=1)] = 1,
    json_output: JsonOption = False,
) -> None:
    """Show the text of a sequence, or of all that a step reads, and where each document comes from."""
    from codeparrot_ds.run.recipe import load_recipe
    from codeparrot_ds.shards.inspect import inspect_sequence, sequences_of_step

    if (sequence is None) == (step is None):
        raise ConfigError("name either --sequence I, or --step K of a recipe.")
    if source.is_file():
        recipe = load_recipe(source)
        sources, length = recipe.data.sources, seq_len or recipe.model.seq_len
    elif step is not None:
        raise ConfigError(f"{source}: --step needs a recipe, which says the batch, the seed and the shards.")
    else:
        sources, length = {source: 1.0}, seq_len or 1024
    numbers = [sequence] if sequence is not None else sequences_of_step(recipe, step or 0, rank, world_size)
    found = {number: inspect_sequence(sources, split, length, number) for number in numbers}
    if json_output:
        import msgspec

        print(msgspec.json.encode(found).decode())
        return
    for number, excerpts in found.items():
        print(f"=== {split} sequence {number:,} of {length:,} tokens")
        for excerpt in excerpts:
            print(f"--- {printable(excerpt.describe())}\n{printable(excerpt.text)}")


@shards_app.command("adopt")
def shards_adopt(
    prefix: Annotated[Path, typer.Argument(help="PREFIX of .bin and .idx (Megatron-LM), or of .bin alone (nanoGPT).")],
    tokenizer: Annotated[Path, typer.Option(help="Directory of the tokenizer that made the ids.")],
    valid_prefix: Annotated[Path | None, typer.Option(help="A dataset beside it that is the validation split.")] = None,
    valid_fraction: Annotated[float, typer.Option(help="Else: share of the tokens, at the end.")] = 0.005,
    json_output: JsonOption = False,
) -> None:
    """Train on a dataset of Megatron-LM or nanoGPT where it lies: writes a manifest beside it."""
    from codeparrot_ds.shards.adopt import adopt

    _print_shards(adopt(prefix, tokenizer, valid_prefix=valid_prefix, valid_fraction=valid_fraction), json_output)


def _print_shards(manifest: Any, json_output: bool, also: dict[str, int] | None = None) -> None:
    from codeparrot_ds.shards.format import SPLITS

    rows = [
        (f"{split} tokens", f"{manifest.tokens(split):,} in {len(manifest.split(split))} shards") for split in SPLITS
    ]
    rows.append(("type", f"{manifest.dtype}, {manifest.vocab_size:,} tokens in the vocabulary"))
    counts = {**manifest.documents, **(also or {})}
    rows += [(f"documents {name}", f"{count:,}") for name, count in counts.items() if count or name == "read"]
    result = {
        "directory": str(manifest.directory),
        "tokens": {split: manifest.tokens(split) for split in SPLITS},
        "documents": counts,
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "digest": manifest.digest,
    }
    _print_result(json_output, str(manifest.directory), rows, result)


GpusOption = Annotated[int | None, typer.Option(help="How many; those of this machine by default.", min=1)]
MfuOption = Annotated[float, typer.Option(help="Share of its peak that a GPU reaches while nothing is sent.")]


@app.command("plan")
def plan_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe, e.g. launch/recipes/codeparrot-xl.yaml.")],
    hostfile: Annotated[Path | None, typer.Option(help="Hosts and slots, instead of --gpus.")] = None,
    gpus: GpusOption = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Of each, as its name says: 80GB.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Its name, for its speed; H100 if it is not here.")] = None,
    gpus_per_host: Annotated[int, typer.Option(min=1)] = 8,
    host_memory: Annotated[str | None, typer.Option(help="Of each host, e.g. 1TB.")] = None,
    interconnect: Annotated[str, typer.Option(help="Between hosts, all network cards of one together.")] = "200Gb",
    mfu: MfuOption = 0.4,
    price: Annotated[float | None, typer.Option(help="Of a GPU-hour.", min=0)] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe's.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Take three steps here, and compare.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Memory, time, cost and disk of a run before it is started. Exits with 1 if it cannot fit."""
    from codeparrot_ds.hosts.hostfile import read_hostfile
    from codeparrot_ds.planning.machine import find_machine
    from codeparrot_ds.planning.plan import compare_with, make_plan, require_fit
    from codeparrot_ds.report.plan import as_text, comparison_text
    from codeparrot_ds.run.recipe import load_recipe

    if hostfile is not None and (gpus is not None or measure):
        raise ConfigError(
            "--hostfile counts the GPUs, and --measure takes steps on this machine: leave one of them out."
        )
    slots = None if hostfile is None else list(read_hostfile(hostfile).values())
    loaded = load_recipe(recipe, overrides or [])
    machine = find_machine(
        loaded,
        sum(slots) if slots else gpus,
        gpu=gpu,
        gpu_memory_bytes=None if gpu_memory is None else parse_size(gpu_memory),
        gpus_per_host=max(slots) if slots else gpus_per_host,
        host_memory_bytes=None if host_memory is None else parse_size(host_memory),
        host_bytes_per_second=parse_bandwidth(interconnect),
        hosts=len(slots) if slots else None,
        mfu=mfu,
        price_per_hour=price,
        on_cpu=os.environ.get("DS_ACCELERATOR") == "cpu",
    )
    made = make_plan(loaded, machine)
    result = made.to_dict()
    if not json_output:
        print(printable("\n".join(as_text(made))))
    if measure and made.own.fits:
        from codeparrot_ds.planning.tune import run_trial

        measured = run_trial(recipe, overrides or [], None, machine.cluster.gpus, 3, machine.on_cpu)
        result["measured"] = measured
        if not json_output:
            print("\n".join(comparison_text(None if measured is None else compare_with(measured, made.own), measured)))
    if json_output:
        print(json.dumps(result, indent=2))
    require_fit(made)
    if measure and result["measured"] is None:
        raise ConfigError(f"{recipe}: ran out of memory in real steps, though by the plan it fits. Leave more room.")


@app.command("tune")
def tune_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="RECIPE-tuned.yaml by default.")] = None,
    gpus: GpusOption = None,
    steps: Annotated[int, typer.Option(help="Of each trial; the first is not counted.", min=2)] = 4,
    trials: Annotated[int, typer.Option(help="At most.", min=1)] = 12,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe's.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Time the ways to run a recipe that fit this machine, and write the recipe with the fastest."""
    from codeparrot_ds.planning.machine import find_machine
    from codeparrot_ds.planning.plan import make_plan
    from codeparrot_ds.planning.tune import tune, winner, write_recipe
    from codeparrot_ds.report.plan import trial_head, trial_text
    from codeparrot_ds.run.recipe import load_recipe
    from codeparrot_ds.system.files import make_directory

    loaded = load_recipe(recipe, overrides or [])
    plan = make_plan(loaded, find_machine(loaded, gpus, on_cpu=os.environ.get("DS_ACCELERATOR") == "cpu"))
    done = []
    written = output or recipe.with_name(f"{recipe.stem}-tuned.yaml")
    make_directory(written.parent)  # what cannot be written is told before the trials
    if not json_output:
        print(trial_head(), flush=True)
    for trial in tune(plan, recipe, overrides or [], steps, trials):
        done.append(trial)
        if not json_output:
            print(trial_text(trial), flush=True)
    fastest = winner(done)
    write_recipe(recipe, overrides or [], fastest, done, written)
    if json_output:
        rows = [{**each.prediction.to_dict(), "measured": each.result} for each in done]
        print(json.dumps({"recipe": str(written), "fastest": fastest.prediction.to_dict(), "trials": rows}, indent=2))
    else:
        print(f"{written}: {fastest.tokens_per_second:,.0f} tokens/s")


@app.command("launch")
def launch(
    recipe: Annotated[Path, typer.Argument(help="Recipe, e.g. launch/recipes/quickstart.yaml.")],
    hostfile: Annotated[Path | None, typer.Option(help="Hosts and slots; this machine alone without it.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Processes on this machine; all GPUs by default.", min=1)] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe's.")] = None,
    launcher: Annotated[str | None, typer.Option(help="pdsh, ssh or mpirun; srun inside a Slurm allocation.")] = None,
    min_hosts: Annotated[int | None, typer.Option(help="Go on with so few when hosts are lost.", min=1)] = None,
    spare_hosts: Annotated[int, typer.Option(help="So many, the last of the file, replace others.", min=0)] = 0,
    regrow_seconds: Annotated[float, typer.Option(help="Look so often for hosts that are back.", min=1)] = 300.0,
    address: Annotated[str | None, typer.Option(help="Of this machine, as the hosts reach it.")] = None,
    master_addr: Annotated[str | None, typer.Option(help="Of the first host, as the others reach it.")] = None,
    doctor: Annotated[bool, typer.Option(help="Look at all hosts first.")] = True,
    max_restarts: Annotated[int, typer.Option(help="In a row without a new checkpoint.", min=0)] = 3,
    restart_delay: Annotated[float, typer.Option(help="Seconds before the second in a row; it doubles.", min=0)] = 5.0,
) -> None:
    """Train with deepspeed, whose command is printed, and start again from the newest checkpoint after a crash."""
    from codeparrot_ds.supervision.attempt import Restarts
    from codeparrot_ds.supervision.launch import launch as run
    from codeparrot_ds.supervision.placement import Hosts

    if launcher not in (None, "pdsh", "ssh", "mpirun", "srun"):
        raise ConfigError(f"--launcher {launcher}: pdsh, ssh, mpirun or srun.")
    if (launcher == "srun") == (hostfile is not None) and launcher is not None:
        raise ConfigError("--launcher srun takes the hosts of its Slurm allocation; the others need a --hostfile.")
    hosts = None
    if hostfile is not None or launcher == "srun":
        hosts = Hosts(hostfile, min_hosts, spare_hosts, regrow_seconds, address, master_addr, doctor, launcher, ranks)
    raise typer.Exit(run(recipe, hosts, ranks, overrides or [], Restarts(max_restarts, restart_delay)))


@app.command("doctor")
def doctor_command(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe: looks for its shards, its disks, …")] = None,
    hostfile: Annotated[Path, typer.Option(help="Hosts and slots.")] = ...,  # type: ignore[assignment]
    overrides: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe's.")] = None,
    port: Annotated[int, typer.Option(help="Of the rendezvous.")] = 29500,
    json_output: JsonOption = False,
) -> None:
    """Look at all hosts at once: what is red, and how to mend it. Exits with 1 if anything is."""
    from codeparrot_ds.doctor.examine import examine
    from codeparrot_ds.hosts.hostfile import read_hostfile
    from codeparrot_ds.hosts.launchers import forwarded
    from codeparrot_ds.run.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or []) if recipe else None
    cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    report = examine(read_hostfile(hostfile), loaded, port=port, cpu=cpu, environment=forwarded(os.environ))
    if json_output:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(printable("\n".join(report.table())))
    raise typer.Exit(EXIT_USER_ERROR if report.red else 0)


@app.command("status")
def status(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    json_output: JsonOption = False,
) -> None:
    """What happened to a run: its state, and how each attempt of `codeparrot-ds launch` ended."""
    from codeparrot_ds.report.status import run_status
    from codeparrot_ds.run.directory import RunDirectory

    found = run_status(RunDirectory(run))
    _print_result(json_output, str(run), [(name, printable(value)) for name, value in found.rows()], found.to_dict())


@app.command("compare")
def compare_command(
    run_a: Annotated[Path, typer.Argument(help="Run directory.")],
    run_b: Annotated[Path, typer.Argument(help="Run directory of the same global batch.")],
    tolerance: Annotated[float, typer.Option(help="Of losses, relative; 0: equal to the bit.")] = 1e-3,
    steps: Annotated[
        str, typer.Option(help="A:B, from step A up to, but without, step B; 100: is all from 100.")
    ] = ":",
    json_output: JsonOption = False,
) -> None:
    """Did two runs see the same data and have the same losses? Exits with 0 if they did, else with 1."""
    from codeparrot_ds.report.compare import as_rows, as_table, compare
    from codeparrot_ds.run.directory import RunDirectory

    comparison = compare(RunDirectory(run_a), RunDirectory(run_b), tolerance, *parse_steps(steps))
    rows = [(printable(name), printable(value)) for name, value in as_rows(comparison)]
    _print_result(json_output, "two runs, step by step", rows, comparison.to_dict())
    if not json_output:
        print("", *as_table(comparison), sep="\n")
    raise typer.Exit(0 if comparison.same else EXIT_USER_ERROR)


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(help="Run directory, or one checkpoint; with --check, a converted model.")],
    output: Annotated[Path | None, typer.Argument(help="Hugging Face directory to make.")] = None,
    tag: Annotated[int | None, typer.Option(help="Step of the checkpoint; the newest by default.")] = None,
    average: Annotated[int, typer.Option(help="Take the mean of the weights of the last so many.", min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Size of one safetensors file.")] = "5GB",
    memory_cap: Annotated[str, typer.Option(help="What this process may hold in memory.")] = "1.5GB",
    sequences: Annotated[
        int | None,
        typer.Option(help="Validation sequences to prove it on; without a GPU what takes minutes, else all.", min=0),
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="Hosts of a run without a shared disk: bring what they wrote here first.")
    ] = None,
    universal: Annotated[
        bool, typer.Option("--to-universal", help="Make DeepSpeed's universal checkpoint, to train on from, instead.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Hold a converted model against its certificate.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Convert a ZeRO checkpoint to a Hugging Face directory, and prove it."""
    from codeparrot_ds.export import certificate as certificates

    if check == (output is not None):
        raise ConfigError("name a run and the directory to make, or a converted model and --check.")
    if hostfile is not None and check:
        raise ConfigError("--check looks at what is here alone: leave --hostfile out.")
    if hostfile is not None:
        from codeparrot_ds.checkpoint.zero import source_checkpoints
        from codeparrot_ds.hosts.gather import gather
        from codeparrot_ds.hosts.hostfile import read_hostfile

        for each in source_checkpoints(source, tag, average):
            gather(each, list(read_hostfile(hostfile)))
    if output is not None and universal:
        if (average, dtype) != (1, "float32"):
            raise ConfigError("--to-universal keeps one checkpoint as it is: leave out --average and --dtype.")
        from codeparrot_ds.checkpoint.zero import source_checkpoint
        from codeparrot_ds.export.universal import to_universal

        made = to_universal(source_checkpoint(source, tag), output, parse_size(memory_cap))
        size = sum(file["bytes"] for file in made.files.values())
        facts = {"step": made.step, "parameters": made.parameters, "files": len(made.files), "bytes": size}
        rows = [("step", f"{made.step:,}"), ("parameters", f"{made.parameters:,}")]
        rows += [("files", f"{len(made.files):,}"), ("size", f"{size / 1e9:.3f} GB")]
        _print_result(json_output, str(output), rows, facts)
        return
    if output is None:
        output = source
        certificate = certificates.check(source)
    else:
        from codeparrot_ds.checkpoint.zero import source_checkpoints
        from codeparrot_ds.export.convert import convert

        certificate = convert(
            source_checkpoints(source, tag, average),
            output,
            dtype=dtype,
            max_shard_bytes=parse_size(max_shard_size),
            memory_cap_bytes=parse_size(memory_cap),
            sequences=sequences,
        )
    forward, engine = certificate["forward"], certificate["engine"]
    if engine["not_compared"] is not None:
        print(f"note: not held against the loss measured in training: {engine['not_compared']}.", file=sys.stderr)
    rows = [
        ("step", ", ".join(f"{part['step']:,}" for part in certificate["source"])),
        ("parameters", f"{certificate['parameters']:,} in {certificate['dtype']}"),
    ]
    if engine["loss_valid"] is not None:
        rows.append(("validation loss in training", f"{engine['loss_valid']:.6f}"))
    if forward is not None:
        over = f"over {forward['sequences']:,} sequences"
        rows += [
            ("validation loss of the checkpoint's weights", f"{forward['loss_master']:.6f} {over}"),
            ("validation loss of this model", f"{forward['loss_written']:.6f} {over}"),
            ("largest difference of logits", f"{forward['largest_logit_difference']:.2g}"),
        ]
    if check:
        rows.append(("every file and tensor", "as in the certificate"))
    _print_result(json_output, str(output), rows, certificate)


@app.command("push")
def push_command(
    directory: Annotated[Path, typer.Argument(help="A converted model, a tokenizer, shards or a corpus.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face Hub; made if it is not there.")],
    branch: Annotated[str | None, typer.Option(help="Branch to send to, e.g. the run's name; main by default.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Bring the branch to main too.")] = False,
    private: Annotated[bool, typer.Option("--private/--public", help="Of a repository that is made here.")] = True,
    tries: Annotated[int, typer.Option(help="When the network or the Hub fails.", min=1)] = 6,
    timeout: Annotated[float, typer.Option(help="Seconds without a byte after which a try has failed.", min=1)] = 120,
    json_output: JsonOption = False,
) -> None:
    """Send a finished directory to the Hugging Face Hub, in one commit."""
    from codeparrot_ds.export.hub import push

    pushed = push(directory, repo, branch=branch, merge=merge, private=private, tries=tries, timeout_seconds=timeout)
    rows = [("files", f"{pushed.files:,}"), *zip(pushed.branches, pushed.commits, strict=True)]
    _print_result(json_output, f"{pushed.repo} ({pushed.repo_type})", rows, vars(pushed))


@evaluate_app.command("loss")
def evaluate_loss(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    shards: Annotated[Path, typer.Argument(help="Shard directory.")],
    sequences: Annotated[int, typer.Option(help="At most so many validation sequences.", min=1)] = 512,
    part: Annotated[str | None, typer.Option("--slice", help="I/N: this part of them only.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="A slice on each of these hosts, over ssh.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Validation loss and perplexity, beside those of the unigram distribution of the same tokens."""
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
        ("over", f"{result.tokens:,} tokens in {result.sequences:,} sequences"),
    ]
    _print_result(json_output, str(model), rows, vars(result))


@app.command("complete")
def complete_command(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; - reads one from standard input.")] = None,
    num: Annotated[int, typer.Option(help="Completions of each prompt.", min=1)] = 4,
    temperature: Annotated[float, typer.Option(min=0.01)] = 0.4,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0)] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    json_output: JsonOption = False,
) -> None:
    """Complete prompts, cut where a new block starts."""
    from codeparrot_ds.evaluation.complete import Sampling, complete

    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts or ["-"]]
    completions = complete(model, texts, Sampling(num, temperature, top_p, max_new_tokens, seed))
    if json_output:
        print(json.dumps([{"prompt": p, "completions": c} for p, c in zip(texts, completions, strict=True)], indent=2))
        return
    for prompt, found in zip(texts, completions, strict=True):
        for number, completion in enumerate(found, start=1):
            print(f"--- completion {number} of {len(found)}\n{printable(prompt + completion)}")


def without_option(arguments: list[str], name: str) -> list[str]:
    """Command-line arguments without an option and its value."""
    kept, words = [], iter(arguments)
    for word in words:
        if word == name:
            next(words, None)
        elif not word.startswith(f"{name}="):
            kept.append(word)
    return kept


def printable(text: str) -> str:
    """`text` with control characters escaped: what a model writes must not drive the user's terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


@app.command("report")
def report(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    model: Annotated[Path, typer.Option(help="Its converted model.")],
    tokenizer: Annotated[Path, typer.Option(help="Its tokenizer's directory.")],
    seconds: Annotated[float | None, typer.Option(help="Wall time to report.")] = None,
    summary_file: Annotated[Path | None, typer.Option("--summary", help="Also write the figures here.")] = None,
    json_output: JsonOption = False,
) -> None:
    """The figures of a finished run, from source files to converted model."""
    from codeparrot_ds.evaluation.loss import validation_loss
    from codeparrot_ds.report.summary import as_rows, summarise
    from codeparrot_ds.run.directory import RunDirectory
    from codeparrot_ds.run.recipe import load_recipe
    from codeparrot_ds.system.files import write_json

    directory = RunDirectory(run)
    recipe = load_recipe(directory.recipe)
    loss = validation_loss(model, recipe.data.sources, recipe.evaluation.sequences)
    summary = summarise(directory, model, tokenizer, loss, seconds)
    if summary_file is not None:
        write_json(summary_file, summary.to_dict())
    _print_result(json_output, str(run), as_rows(summary), summary.to_dict())


if __name__ == "__main__":
    main()
