"""The quickstart: its time and memory, and what its training gives on held-out code.

Usage: python benchmarks/quickstart.py [--keep DIR]
       python benchmarks/quickstart.py --held-out [--only NAME ...] [--keep DIR]

The first runs `launch/quickstart.sh --fresh` in a copy of the tree and prints the time of each part. Memory is the sum
of proportional set sizes (PSS) over the script and all its descendants, sampled twice a second.

The second trains the recipe, the recipe before it and the recipe with one setting changed back, each on two CPU ranks,
and prints bits per byte on modules of the standard library that none was trained on. Training documents that nearly
duplicate one of them are removed. CPU time is that of the whole training job, of all its processes. With --keep,
trained runs are not trained again.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from measure import MemorySampler

from codeparrot_ds.run.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "launch" / "recipes" / "quickstart.yaml"
COLLECT = ("--installed-python", "--max-file-size", "32kB", "--sample", "30MB")  # as in launch/quickstart.sh

HELD_OUT = """
argparse ast base64 bdb calendar cmd codecs colorsys configparser contextlib copy csv dataclasses difflib enum filecmp
fileinput fnmatch fractions ftplib functools getopt gettext glob graphlib gzip heapq imaplib inspect ipaddress linecache
mailbox netrc numbers optparse pathlib pickle platform plistlib pprint queue random sched selectors shelve shlex shutil
smtplib socketserver statistics string tarfile tempfile textwrap threading timeit tokenize trace typing uuid warnings
wave weakref zipfile
"""

BEFORE = {  # the recipe of commit 5643c9b
    "model.vocab_size": 8192,
    "model.seq_len": 256,
    "model.n_layer": 4,
    "model.n_head": 3,
    "model.n_embd": 192,
    "model.init_std": 0.02,
    "model.activation_checkpointing": "full",
    "engine.float32_matmul_precision": "highest",
    "engine.loss_chunk_tokens": 4096,
    "batch.global_batch_size": 8,
    "optimizer.learning_rate": 1.5e-3,
    "optimizer.betas": [0.9, 0.95],
    "schedule.name": "cosine",
    "schedule.steps": 400,
    "schedule.warmup_steps": 40,
    "schedule.min_ratio": 0.05,
    "evaluation.every_steps": 200,
    "evaluation.sequences": 128,
    "evaluation.samples": 0,
    "checkpoints.every_steps": 200,
    "logging.every_steps": 25,
}


# name -> settings that replace those of the recipe
VARIANTS: dict[str, dict[str, Any]] = {"before": BEFORE, "now": {}}


def copy_tree(target: Path) -> Path:
    """Copy the files that git tracks to `target`, like a clone."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        destination = target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, destination, follow_symlinks=False)
    return target


def run_script(target: Path) -> int:
    """Run the quickstart in a copy of the tree, and print its time, memory and exit code."""
    copy_tree(target)
    started = time.monotonic()
    process = subprocess.Popen(
        ["./launch/quickstart.sh", "--fresh"], cwd=target, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    sampler = MemorySampler(process.pid, interval_seconds=0.5)
    sampler.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
    returncode = process.wait()
    seconds = time.monotonic() - started
    sampler.finish()
    result = {"returncode": returncode, "seconds": round(seconds, 1), "peak_memory_bytes": sampler.peak_pss_bytes}
    print(json.dumps(result))
    return returncode


def cli(*arguments: str | Path) -> str:
    """Run `codeparrot-ds` and return what it prints on stdout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "codeparrot_ds.cli", *map(str, arguments)]
    print("$ codeparrot-ds", *arguments, flush=True)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\nexit code {done.returncode}")
    return done.stdout


def build_corpora(work: Path) -> tuple[Path, Path]:
    """Collect and clean this machine's Python source; return the training and the held-out documents.

    Both are cleaned together, so that no training document is a near-duplicate of a held-out one.
    """
    train, held_out = work / "train.parquet", work / "held-out.parquet"
    if train.exists() and held_out.exists():
        return train, held_out
    modules = work / "held-out-modules"
    modules.mkdir(exist_ok=True)
    for name in HELD_OUT.split():
        with contextlib.suppress(FileNotFoundError):  # removed in a newer Python
            shutil.copy2(Path(sysconfig.get_path("stdlib"), f"{name}.py"), modules)
    collected, clean = (work / "held-out-raw", work / "raw"), work / "clean"
    cli("corpus", "collect", modules, "-o", collected[0])
    cli("corpus", "collect", *COLLECT, "-o", collected[1])
    cli("corpus", "clean", *collected, "--format", "parquet", "-o", clean)  # of equal documents the first is kept
    documents = pa.concat_tables(pq.read_table(path) for path in sorted(clean.glob("documents-*.parquet")))
    is_held_out = pc.equal(documents["repo_name"], modules.name)
    for path, wanted in ((train, pc.invert(is_held_out)), (held_out, is_held_out)):
        part = documents.filter(wanted)
        print(f"{path.stem}: {len(part):,} documents, {pc.sum(part['size']).as_py() / 1e6:.1f} MB")
        pq.write_table(part, path)
    return train, held_out


def train_variant(work: Path, corpora: tuple[Path, Path], name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate a variant of the recipe, unless that is done. Returns its figures."""
    result_file = work / f"{name}.json"
    if result_file.exists():
        return dict(json.loads(result_file.read_text()))
    recipe = load_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    vocab = recipe.model.vocab_size
    tokenizer, shards = work / f"tokenizer-{vocab}", work / f"shards-{vocab}"
    if not shards.exists():
        cli("tokenizer", "train", corpora[0], "--vocab-size", str(vocab), "--max-seq-len", "256", "-o", tokenizer)
        cli("shards", "build", corpora[0], "--valid-input", corpora[1], "--tokenizer", tokenizer, "-o", shards)
    run, model = work / "runs" / name, work / "models" / name
    shutil.rmtree(run, ignore_errors=True)  # whose time would not be counted
    used = {**settings, "name": name, "runs": str(run.parent), "data.shards": str(shards)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    cli("launch", RECIPE, *(word for key, value in used.items() for word in ("--set", f"{key}={json.dumps(value)}")))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cli("convert", run, model)
    loss = json.loads(cli("evaluate", "loss", model, shards, "--sequences", "1000000", "--json"))
    result = {
        "name": name,
        "settings": settings,
        "parameters": recipe.model.parameters,
        "tokens": recipe.schedule.last_step * recipe.batch.global_batch_size * recipe.model.seq_len,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "bits_per_byte": loss["bits_per_byte"],
        "bits_per_byte_error": loss["bits_per_byte_error"],
        "held_out_bytes": loss["bytes"],
        "held_out_documents": loss["documents"],
    }
    result_file.write_text(json.dumps(result))
    return result


def compare(work: Path, names: Sequence[str]) -> int:
    """Train the variants and print a table. Returns 1 if the recipe misses what the documentation claims."""
    corpora = build_corpora(work)
    results = {name: train_variant(work, corpora, name, VARIANTS[name]) for name in names}
    before, now = results["before"], results["now"]
    print(f"held out: {now['held_out_documents']} documents, {now['held_out_bytes']:,} bytes\n")
    print("| recipe | parameters | tokens | CPU s | bits per byte | change |\n|---|---|---|---|---|---|")
    for each in results.values():
        bits, error = each["bits_per_byte"], each["bits_per_byte_error"]
        print(
            f"| {each['name']} | {each['parameters'] / 1e6:.1f} M | {each['tokens']:,} | {each['cpu_seconds']:.0f} | "
            f"{bits:.3f} ± {error:.3f} | {bits / before['bits_per_byte'] - 1:+.1%} |"
        )
    print(json.dumps(list(results.values())))
    lower = now["bits_per_byte"] <= 0.85 * before["bits_per_byte"]
    in_time = now["cpu_seconds"] <= 1.02 * before["cpu_seconds"]
    print(f"at least 15 % fewer bits per byte: {lower}; in no more CPU time (within 2 %): {in_time}")
    return 0 if lower and in_time else 1


def main() -> None:
    """Run one of the two benchmarks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keep", type=Path, help="work in this directory and keep it")
    parser.add_argument("--held-out", action="store_true", help="bits per byte on held-out code, of several recipes")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    options = parser.parse_args()
    work = options.keep or Path(tempfile.mkdtemp(prefix="quickstart-"))
    work.mkdir(parents=True, exist_ok=True)
    names = [name for name in VARIANTS if name in ("before", "now", *options.only)]
    returncode = compare(work, names) if options.held_out else run_script(work)
    if options.keep is None:
        shutil.rmtree(work)
    sys.exit(returncode)


if __name__ == "__main__":
    main()
