"""What a directory is, for `codeparrot-ds report`: decided by its files alone."""

from pathlib import Path

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.run.directory import CERTIFICATE, RunDirectory
from codeparrot_ds.system.files import MANIFEST, read_json
from codeparrot_ds.tokenizer.directory import has_tokenizer

RUN, CORPUS, TOKENIZER = "run", "corpus", "tokenizer"
_ACCEPTED = (
    "Name a run (recipe.yaml and status.json, metrics.jsonl or launches.jsonl), a corpus (manifest.json of `corpus "
    "collect` or `corpus clean`), a tokenizer (tokenizer.json), or two runs."
)
_OTHERS = {
    "shards": "these are shards: `codeparrot-ds shards inspect` shows them, and the page of a run counts them",
    "checkpoint": "this is a checkpoint: name its run",
    "certificate": "this is a converted model: name its run, or use `codeparrot-ds tokenizer report` for its tokenizer",
}


def subject_of(directory: Path) -> str:
    """RUN, CORPUS or TOKENIZER. Raises ConfigError listing what is accepted, DataError for a damaged manifest."""
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory. {_ACCEPTED}")
    manifest = read_json(directory / MANIFEST, "manifest") if (directory / MANIFEST).is_file() else None
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    if kind in (CORPUS, TOKENIZER):
        return str(kind)
    run = RunDirectory(directory)
    if kind is None and run.recipe.is_file() and any(f.is_file() for f in (run.status_file, run.metrics, run.launches)):
        return RUN
    if kind is None and (directory / CERTIFICATE).is_file():
        kind = "certificate"
    if kind is None and has_tokenizer(directory) and not any(directory.glob("*.safetensors")):
        return TOKENIZER
    what = _OTHERS.get(str(kind), "not a directory that a page can be made of")
    raise ConfigError(f"{directory}: {what}. {_ACCEPTED}")
