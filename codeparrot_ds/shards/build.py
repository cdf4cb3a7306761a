"""Documents to shards: encode, split by content, write, and publish the manifest last.

One task a corpus file, one shard a split and task. A shard's bytes are a function of its corpus file, the
tokenizer and the options; killed anywhere, a second call keeps the shards that are whole and makes the rest.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.corpus.documents import Corpus, Document, read_documents
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.files import (
    digest_json,
    exclusive_lock,
    finished_manifest,
    make_directory,
    read_json,
    require_free_space,
    write_json,
)
from codeparrot_ds.jobs import progress, run_tasks
from codeparrot_ds.shards.format import SPLITS, Manifest, ShardInfo, ShardWriter, dtype_for
from codeparrot_ds.tokenizer.encode import Encoder, copy_tokenizer

_BATCH_DOCUMENTS = 256
_BYTES_PER_TOKEN = 3  # of Python source; 3.5 with 8,192 tokens, more with larger vocabularies
_DIGEST_SPACE = 1 << 32


@dataclass(frozen=True)
class _Task:
    number: int
    file: Path
    tokenizer: Path
    output: Path
    valid_fraction: float
    fingerprint: str  # of all that decides the bytes


def build(
    corpus_directory: Path,
    tokenizer_directory: Path,
    output: Path,
    *,
    valid_fraction: float = 0.005,
    workers: int | None = None,
) -> Manifest:
    """Encode a corpus into shards and return their manifest.

    Args:
        corpus_directory: a finished corpus.
        tokenizer_directory: holds `tokenizer.json`; copied into `output`/tokenizer.
        output: made if missing; finished shards of the same inputs are kept as they are.
        valid_fraction: share of documents that go to validation, by a digest of their content.
        workers: processes; all cores by default.

    Raises:
        ConfigError: bad option, no permission, disk too small.
        DataError: damaged input, or `output` holds other shards.
    """
    if not 0.0 < valid_fraction < 1.0:
        raise ConfigError(f"valid fraction {valid_fraction}: must lie between 0 and 1, e.g. 0.005.")
    corpus = Corpus.open(corpus_directory)
    encoder = Encoder(tokenizer_directory)
    inputs: dict[str, Any] = {
        "corpus_digest": corpus.digest,
        "tokenizer_digest": encoder.digest,
        "options": {"valid_fraction": valid_fraction},
    }
    if finished_manifest(output, "shards", inputs):
        return Manifest.read(output)
    make_directory(output)
    tokens = corpus.manifest["text_bytes"] / _BYTES_PER_TOKEN
    require_free_space(output, int(tokens * dtype_for(encoder.vocab_size).itemsize), "the shards")
    busy = f"{output}: another process is building shards here. Wait for it, or stop it."
    with exclusive_lock(output / ".lock", busy):
        return _build(corpus, tokenizer_directory, encoder, output, inputs, valid_fraction, workers)


def _build(
    corpus: Corpus,
    tokenizer_directory: Path,
    encoder: Encoder,
    output: Path,
    inputs: dict[str, Any],
    valid_fraction: float,
    workers: int | None,
) -> Manifest:
    tasks = [
        _Task(number, file, tokenizer_directory, output, valid_fraction, digest_json(inputs))
        for number, file in enumerate(corpus.files)
    ]
    shards: list[ShardInfo] = []
    results = run_tasks(_build_one, tasks, workers or os.cpu_count() or 1)
    for finished in progress(results, "encoding", len(tasks)):
        shards.extend(finished)
    manifest = Manifest(
        directory=output,
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
        tokenizer_digest=encoder.digest,
        corpus=str(corpus.directory),
        corpus_digest=corpus.digest,
        options=inputs["options"],
        shards=tuple(sorted(shards, key=lambda shard: (SPLITS.index(shard.split), shard.name))),
        dtype=dtype_for(encoder.vocab_size).name,
    )
    for split in SPLITS:
        if not manifest.split(split):
            raise DataError(
                f"{corpus.directory}: no document fell to the {split} split at a valid fraction of {valid_fraction}. "
                "Collect more documents, or change --valid-fraction."
            )
    copy_tokenizer(tokenizer_directory, output / "tokenizer")
    manifest.write()
    for task in tasks:
        _receipt(task).unlink(missing_ok=True)
    (output / ".lock").unlink()
    return manifest


def _receipt(task: _Task) -> Path:
    """Says that a task is done, and what it made; gone once the manifest says so."""
    return task.output / f".task-{task.number:05d}.json"


def _build_one(task: _Task) -> list[ShardInfo]:
    receipt = _receipt(task)
    if receipt.exists():
        done: dict[str, Any] = read_json(receipt, "task receipt")
        if done["fingerprint"] == task.fingerprint:
            return [ShardInfo(**shard) for shard in done["shards"]]
        receipt.unlink()  # of other inputs: it must not outlive the shards that it speaks of
    encoder = Encoder(task.tokenizer)
    dtype = dtype_for(encoder.vocab_size)
    writers = {split: ShardWriter(task.output, f"{split}-{task.number:05d}", split, dtype) for split in SPLITS}
    try:
        for batch in _batches(read_documents(task.file), _BATCH_DOCUMENTS):
            for document, ids in zip(batch, encoder.encode_batch([d.text for d in batch]), strict=True):
                ended = np.append(ids, encoder.eos_id)
                writers[split_of(document, task.valid_fraction)].append(ended, document)
        shards = [info for info in (writer.finish() for writer in writers.values()) if info]
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    write_json(receipt, {"fingerprint": task.fingerprint, "shards": [dataclasses.asdict(s) for s in shards]})
    return shards


def split_of(document: Document, valid_fraction: float) -> str:
    """ "valid" or "train" by a digest of the content alone, so that copies never straddle the split.

    The digest's last 32 bits decide: a corpus may have been sampled by the first.
    """
    return "valid" if int(document.digest()[-8:], 16) < valid_fraction * _DIGEST_SPACE else "train"


def _batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, size)):
        yield batch
