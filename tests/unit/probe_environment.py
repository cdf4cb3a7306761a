"""Collect, clean, tokenize and build shards of SOURCE in OUT, and print a digest of every file in it."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from codeparrot_ds.corpus.clean import CleanOptions, clean
from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.corpus.options import Cleaning
from codeparrot_ds.errors import DataError
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.system.files import digest_bytes, digest_file
from codeparrot_ds.tokenizer.train import train


def main(source: Path, out: Path, umask: str) -> None:
    """See the module."""
    os.umask(int(umask, 8))
    time.tzset()
    out.mkdir()
    os.chdir(out)  # manifests name their inputs by relative paths, which are the same everywhere
    collect(Path("corpus"), [source])
    rules = Cleaning.model_validate({"heuristics": None, "decontamination": {"enabled": False}})
    clean(["corpus"], Path("clean"), CleanOptions(cleaning=rules, workers=1))
    train(Path("clean"), Path("tokenizer"), 300, 64)
    options = BuildOptions(valid_fraction=0.3, workers=1, encoder="tokenizers")
    build(["clean", str(source / "*.jsonl")], Path("tokenizer"), Path("shards"), options)
    options = dataclasses.replace(options, suffix=".py", on_bad_document="skip")
    build(str(source), Path("tokenizer"), Path("files"), options)
    found = {str(path.relative_to(out)): digest_file(path) for path in sorted(out.rglob("*")) if path.is_file()}
    found |= {"mode": oct(out.stat().st_mode)}
    order = Dataset.open({Path("shards"): 1.0}, 16).order(1)
    found["order"] = digest_bytes(order.take(0, 20).tobytes())
    recipe = load_recipe(source / "recipe.yaml")
    found["directory that a recipe names"] = ", ".join(path.name for path in next(iter(recipe.data.sources)).iterdir())
    try:
        build(str(source / "bad"), Path("tokenizer"), Path("never"), BuildOptions(workers=1))
    except DataError as error:
        found["error"] = str(error).replace(str(source), "")
    print(json.dumps({"encoding": sys.getfilesystemencoding(), "timezone": time.tzname[0], "found": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
