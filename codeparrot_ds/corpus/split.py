"""A corpus in files for training and for validation, in the split that `shards build` makes."""

from pathlib import Path
from typing import Any

import msgspec

from codeparrot_ds.corpus.writers import open_writer
from codeparrot_ds.documents.inputs import Corpus
from codeparrot_ds.documents.read import read_local
from codeparrot_ds.documents.splits import SPLITS, split_of
from codeparrot_ds.system.files import MANIFEST, digest_file, digest_json, flush_to_disk, require_free_space, write_json
from codeparrot_ds.system.jobs import progress, run_tasks
from codeparrot_ds.system.processes import available_cores

SPLIT_NAMES = {"train": "train", "valid": "validation"}  # the names that `datasets` and the Hub use


class _Task(msgspec.Struct, frozen=True):
    number: int
    file: Path
    valid_fraction: float
    output: Path

    def path(self, split: str) -> Path:
        """The file to write; files are numbered anew when it is known which of them have documents."""
        file_format = self.file.name.partition(".")[2]
        return self.output / f".{SPLIT_NAMES[split]}-{self.number:05d}.{file_format}"


def split_corpus(corpus: Corpus, output: Path, valid_fraction: float) -> dict[str, Any]:
    """Write the documents of a corpus into files for each split, in their order, and return the manifest.

    Args:
        corpus: finished.
        output: empty directory; becomes a finished corpus, without a card and without the lists beside the manifest.
        valid_fraction: share of documents for validation; 0 < `valid_fraction` < 1.

    Raises:
        ConfigError: the disk is too small.
        DataError: a file of the corpus is damaged.
    """
    require_free_space(output, sum(file.stat().st_size for file in corpus.files), "the corpus split for the Hub")
    tasks = [_Task(number, file, valid_fraction, output) for number, file in enumerate(corpus.files)]
    written = progress(run_tasks(_split_file, tasks, available_cores()), "splitting", len(tasks))
    counts = dict(written)  # number of the task -> documents of each split
    files, documents = [], {}
    for split in SPLITS:
        holders = [task for task in tasks if counts[task.number][split]]
        documents[SPLIT_NAMES[split]] = sum(counts[task.number][split] for task in holders)
        for number, task in enumerate(holders):
            suffixes = task.file.name.partition(".")[2]
            path = task.path(split).rename(output / f"{SPLIT_NAMES[split]}-{number:05d}.{suffixes}")
            flush_to_disk(path)
            facts = {"bytes": path.stat().st_size, "xxh3_128": digest_file(path)}
            files.append({"name": path.name, "documents": counts[task.number][split], **facts})
    manifest = {
        **corpus.manifest,
        "valid_fraction": valid_fraction,
        "splits": documents,
        "files": files,
        "digest": digest_json([entry["xxh3_128"] for entry in files]),
    }
    write_json(output / MANIFEST, manifest)
    return manifest


def _split_file(task: _Task) -> tuple[int, dict[str, int]]:
    """Split a file. Returns the task's number, and the number of documents of each split; empty files are removed."""
    file_format = task.file.name.partition(".")[2]
    with open_writer(task.path("train"), file_format) as train, open_writer(task.path("valid"), file_format) as valid:
        writers = {"train": train, "valid": valid}
        for document in read_local(task.file):
            writers[split_of(document, task.valid_fraction)].append(document)
    counts = {split: writer.documents for split, writer in writers.items()}
    for split, count in counts.items():
        if not count:
            task.path(split).unlink()
    return task.number, counts
