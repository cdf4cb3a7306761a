"""Build shards from documents: encode, split by content, write, and publish the manifest last.

Tasks are planned from the list of input files only, with one shard per split and task, and each task writes a receipt
next to its shards. Any number of processes, hosts or array jobs can therefore share the work, and any of them may be
killed: a second call keeps tasks with a receipt and runs the others. The manifest is written when all receipts exist.
"""

import dataclasses
import re
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from codeparrot_ds.documents.document import BadDocument, Document
from codeparrot_ds.documents.inputs import search_inputs, text_bytes
from codeparrot_ds.documents.read import read_documents, require_document
from codeparrot_ds.documents.splits import SPLITS
from codeparrot_ds.documents.versions import sources_of, versions_of
from codeparrot_ds.documents.walk import QUARANTINE, REJECTED, count_reasons, encode_skipped
from codeparrot_ds.errors import ClusterError, DataError
from codeparrot_ds.shards.encoders import choose_with_sample, load_encoders, load_referee, trusted_labels
from codeparrot_ds.shards.format import Manifest, ShardWriter, dtype_for
from codeparrot_ds.shards.identity import finished_shards
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.shards.tasks import BYTES_PER_TOKEN, Job, Receipt, Task, divide, plan, read_receipt
from codeparrot_ds.system.files import MANIFEST, exclusive_lock, require_free_space
from codeparrot_ds.system.inputs_record import INPUTS_RECORD, encode_record
from codeparrot_ds.system.jobs import Slice, progress, run_tasks, say
from codeparrot_ds.system.paths import Address, expand_address, is_remote
from codeparrot_ds.system.processes import available_cores
from codeparrot_ds.system.storage import Directory, LocalDirectory, open_directory
from codeparrot_ds.tokenizer.directory import TOKENIZER_FILE, tokenizer_digest, tokenizer_files
from codeparrot_ds.tokenizer.encode import Encoder, FastEncoder
from codeparrot_ds.tokenizer.lossless import require_lossless
from codeparrot_ds.tokenizer.proof import record_proof

_SHARD_FILE = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.(bin|idx|docs\.parquet)")
_STALE_SECONDS = 3600.0  # scratch files untouched for an hour were left by a killed process
_BATCH_CHARACTERS = 1 << 18  # encoded at a time: large enough for few calls, small enough for the CPU caches
_TASKS = 64  # target number of tasks when the shard size is not given
_MIN_SHARD_TOKENS, _MAX_SHARD_TOKENS = 4_000_000, 128_000_000
_REFEREE_EVERY = 1000  # about one in 1000 documents is also encoded by the reference encoder
_REFEREE_CHARACTERS = 1 << 16  # largest document it checks: each character takes 150 bytes and half a microsecond
_PRELOAD = "codeparrot_ds.shards.preload"


def build(
    inputs: Sequence[str | Path] | str | Path, tokenizer: Path, output: Address, options: BuildOptions | None = None
) -> Manifest | None:
    """Encode documents into shards and return their manifest, or None while other slices have not finished.

    Args:
        inputs: what `documents.inputs.find_inputs` takes: corpus directories, data files, globs, URLs, Hub datasets.
            With `options.valid_inputs`, they are all for training.
        tokenizer: directory of `tokenizer.json`, or `vocab.json` and `merges.txt`; copied into `output`/tokenizer.
        output: path or fsspec URL, created if missing. Finished shards of the same inputs are kept.
        options: None for the defaults.

    Raises:
        ConfigError: invalid option, no permission, or disk too small.
        DataError: damaged input, a tokenizer that loses text, or `output` contains other shards.
        ClusterError: workers were lost permanently.
    """
    options = options or BuildOptions()
    output = expand_address(output)
    arguments = [str(inputs)] if isinstance(inputs, str | Path) else [str(argument) for argument in inputs]
    fields = options.fields
    found = search_inputs([*arguments, *options.valid_inputs], options.suffix)
    train, valid = divide(found, len(arguments))
    text = sum(map(text_bytes, found.pieces))
    referee = load_referee(tokenizer.resolve(), tokenizer_digest(tokenizer), options.eos)
    changes = require_lossless(referee, tokenizer)
    if changes:
        say(f"note: {tokenizer / TOKENIZER_FILE}: {'; '.join(changes)}.")
    manifest = Manifest(
        directory=output,
        vocab_size=referee.vocab_size,
        eos_id=referee.eos_id,
        tokenizer_digest=referee.digest,
        dtype=dtype_for(referee.vocab_size).name,
        shards=(),
        inputs=arguments,
        valid_inputs=list(options.valid_inputs),
        sources=[*sources_of(train), *({**source, "split": "valid"} for source in sources_of(valid))],
        options={
            "text_field": options.text_field,
            **({"provenance": fields.named} if fields.named else {}),
            "suffix": options.suffix,
            "valid_fraction": options.fraction,
            "shard_tokens": options.shard_tokens or _shard_tokens(text),
            "on_bad_document": options.on_bad_document,
            **({"text_changes": changes} if changes else {}),
        },
        skipped_files=count_reasons(found.skipped),
    )
    files = versions_of(found.pieces)
    # An absolute path, because workers may run in another directory.
    target = open_directory(output if is_remote(output) else Path(output).resolve())
    if finished := finished_shards(target, manifest, files):
        _clean(target)  # a process may have been killed after writing the manifest
        return finished
    target.make()
    if isinstance(target, LocalDirectory):
        existing_bytes = sum(target.size(name) or 0 for name in target.names() if _SHARD_FILE.fullmatch(name))
        ids_bytes = text / BYTES_PER_TOKEN * dtype_for(referee.vocab_size).itemsize
        require_free_space(target.path, int(ids_bytes) - existing_bytes, "the shards")
    with _lock(target, options.part):
        if finished := finished_shards(target, manifest, files):  # by the process that held the lock
            return finished
        target.remove_leftovers(older_than_seconds=_STALE_SECONDS)
        chosen = choose_with_sample(tokenizer, referee, options.encoder, found.pieces, fields)
        skip_bad = options.on_bad_document == "skip"
        job = Job(
            target,
            tokenizer.resolve(),
            referee.digest,
            options.eos,
            referee.eos_token,
            fields,
            options.fraction,
            skip_bad,
            chosen,
        )
        tasks = [Task(share, job) for share in plan(train, valid, manifest.options["shard_tokens"])]
        labels = trusted_labels(chosen, referee)
        mine = options.part.of(tasks) if options.part else tasks
        unfinished = [task for task in mine if read_receipt(task, labels) is None]
        share_encoders = partial(load_encoders, job.tokenizer, referee.digest, chosen, job.eos_token)
        results = run_tasks(
            _build_one,
            unfinished,
            options.workers or available_cores(),
            engine=options.engine,
            preload=_PRELOAD,
            prepare=share_encoders,
        )
        for _ in progress(results, "encoding", len(mine), "task", done=len(mine) - len(unfinished)):
            pass
        beside = {
            REJECTED: encode_skipped(found.skipped),
            INPUTS_RECORD: encode_record(files),
            **{f"tokenizer/{name}": data for name, data in tokenizer_files(tokenizer, referee.eos_token).items()},
        }
        return _finish(tasks, labels, target, manifest, beside, alone=options.part is None)


def _shard_tokens(text: float) -> int:
    """Default shard size (tokens): few enough shards to open all of them, enough to distribute the work."""
    return int(min(max(text / BYTES_PER_TOKEN / _TASKS, _MIN_SHARD_TOKENS), _MAX_SHARD_TOKENS))


def _lock(target: Directory, part: Slice | None) -> Any:
    """Keep a second process from the same work. Object stores have no locks, but all writers write the same bytes."""
    if not isinstance(target, LocalDirectory):
        return nullcontext()
    name = ".lock" if part is None else f".lock-{part.index}-of-{part.count}"
    busy = f"{target}: another process is building shards here. Wait for it, or stop it."
    return exclusive_lock(target.path / name, busy)


def _build_one(task: Task) -> int:
    """Build a task's shards, then write its receipt. Returns the task's number."""
    job, number = task.job, task.share.number
    referee, encoder = load_encoders(job.tokenizer, job.tokenizer_digest, job.encoder, job.eos)
    job.output.remove(task.receipt)  # a stale receipt must not outlive the shards that it describes
    receipt = Receipt(task.fingerprint, encoder.label, [], 0, 0, [])
    dtype = dtype_for(referee.vocab_size)
    with job.output.scratch() as scratch, ExitStack() as stack:
        writers = {split: ShardWriter(scratch, f"{split}-{number:05d}", split, dtype) for split in SPLITS}
        for writer in writers.values():
            stack.callback(writer.close)
        splits = {split: _Split(encoder, referee, writer) for split, writer in writers.items()}
        for piece in task.share.pieces:
            for read in read_documents(piece, job.fields):
                if isinstance(read, BadDocument):
                    if not job.skip_bad:
                        require_document(read)
                    receipt.read += read.documents
                    receipt.quarantined.append(read)
                    continue
                receipt.read += 1
                if not read.text:
                    receipt.empty += 1
                else:
                    digest = xxhash.xxh3_128_intdigest(read.text.encode())
                    splits[task.share.split_of(digest, job.valid_fraction)].append(read, digest)
        for each in splits.values():
            each.flush()
        receipt.shards += [info for writer in writers.values() if (info := writer.finish())]
        try:
            job.output.publish({name: path for writer in writers.values() for name, path in writer.files.items()})
        except FileNotFoundError:  # another copy of this task was faster, and the build is finished and cleaned up
            if not job.output.exists(MANIFEST):
                raise
            return number
    # Losing the receipt only costs rerunning the task, so do not wait for the disk.
    job.output.write(task.receipt, msgspec.json.encode(receipt), durable=False)
    return number


class _Split:
    """Encodes the documents of one split in batches, and verifies some of them with the reference encoder."""

    def __init__(self, encoder: Encoder | FastEncoder, referee: Encoder, writer: ShardWriter) -> None:
        self.writer = writer
        self._encoder, self._referee = encoder, referee
        self._dtype = dtype_for(referee.vocab_size)
        self._documents: list[Document] = []
        self._characters = 0
        self._checked: list[int] = []  # indices in the batch of the documents to verify

    def append(self, document: Document, digest: int) -> None:
        """Add a document; `digest` is the digest of its content."""
        # Bits that neither the split nor corpus sampling uses.
        if (digest >> 48) % _REFEREE_EVERY == 0 and len(document.text) <= _REFEREE_CHARACTERS:
            self._checked.append(len(self._documents))
        self._documents.append(document)
        self._characters += len(document.text)
        if self._characters >= _BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Encode and write the pending documents."""
        if not self._documents:
            return
        documents = self._documents
        ids, ends = self._encoder.encode_flat([document.text for document in documents])
        starts = np.concatenate([[0], ends[:-1]])
        for i in self._checked:
            self._check(documents[i], ids[starts[i] : ends[i]])
        assert not len(ids) or int(ids.max()) < self._referee.vocab_size, f"{self._encoder.label}: impossible id"
        ended = np.empty(len(ids) + len(documents), self._dtype)
        for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            ended[start + i : end + i] = ids[start:end]
            ended[end + i] = self._referee.eos_id
        self.writer.append(ended, (ends - starts + 1).astype(np.int32), documents)
        self._documents, self._characters, self._checked = [], 0, []

    def _check(self, document: Document, ids: np.ndarray) -> None:
        if self._encoder is self._referee or np.array_equal(ids, self._referee.encode(document.text)):
            return
        where = f"{document.repository} {document.path}".strip()
        difference = f"{self._encoder.label} differs from {self._referee.label} on the document {where}"
        record_proof(self._referee, difference, {})
        raise DataError(
            f"{difference} (content xxh3-128 {document.digest()}). Its output is no longer trusted: run the same "
            f"command again, which uses {self._referee.label.split()[0]} instead, and report the document."
        )


def _finish(
    tasks: Sequence[Task],
    labels: set[str],
    target: Directory,
    manifest: Manifest,
    beside: dict[str, bytes],
    *,
    alone: bool,
) -> Manifest | None:
    """Write the manifest if every task has a receipt. Several slices may do so concurrently with the same result.

    `beside` is the content of the other files, by name; those without content are removed.
    """
    receipts = [read_receipt(task, labels) for task in tasks]
    if target.exists(MANIFEST):  # another slice was faster, and has removed receipts
        return Manifest.read(manifest.directory)
    missing = sum(receipt is None for receipt in receipts)
    if missing and alone:
        raise ClusterError(
            f"{target}: {missing:,} of {len(tasks):,} tasks ran, but their output is missing. Use a disk that all "
            f"workers share, and install the same {' and '.join(sorted(labels))} on all of them."
        )
    if missing:
        say(f"{target}: {missing:,} of {len(tasks):,} tasks remain for other slices; the last one finishes the build.")
        return None
    kept = [receipt for receipt in receipts if receipt is not None]
    shards = [shard for split in SPLITS for receipt in kept for shard in receipt.shards if shard.split == split]
    quarantined = [bad for receipt in kept for bad in receipt.quarantined]
    documents = {
        "read": sum(receipt.read for receipt in kept),
        "written": sum(shard.documents for shard in shards),
        "empty": sum(receipt.empty for receipt in kept),
        "quarantined": sum(bad.documents for bad in quarantined),
    }
    assert documents["read"] == documents["written"] + documents["empty"] + documents["quarantined"], documents
    manifest = dataclasses.replace(manifest, shards=tuple(shards), documents=documents)
    if problem := _empty_split(manifest):
        raise DataError(problem)
    try:
        lines = b"".join(msgspec.json.encode(bad) + b"\n" for bad in quarantined)
        _publish(target, manifest, {**beside, QUARANTINE: lines})
    except FileNotFoundError:  # another slice has finished meanwhile and removed our scratch files
        if not target.exists(MANIFEST):
            raise
    _clean(target)
    return manifest


def _empty_split(manifest: Manifest) -> str:
    """What is wrong with a corpus that leaves a split empty; empty if nothing is."""
    fraction, counts = manifest.options["valid_fraction"], manifest.documents
    where, written = ", ".join(manifest.inputs), counts["written"]
    left_out = ", ".join(f"{counts[why]:,} {why}" for why in ("empty", "quarantined") if counts[why])
    what = f"{written:,} document{'' if written == 1 else 's'} with text{f' ({left_out})' if left_out else ''}"
    of_hub = any(each.startswith("hub:") and "split=" not in each for each in manifest.inputs)
    hint = " A corpus on the Hub has two splits: hub:NAME?split=train+validation." if of_hub else ""
    if manifest.valid_inputs and not manifest.split("valid"):
        return f"{', '.join(manifest.valid_inputs)}: no document with text for validation. Name other files."
    if not written or (manifest.valid_inputs and not manifest.split("train")):
        return f"{where}: no document with text{f' ({left_out})' if left_out else ''}, so nothing to train on."
    if not manifest.split("train"):
        return (
            f"{where}: {what}, and --valid-fraction {fraction:g} put all of them into the validation split. Add "
            "documents, or lower --valid-fraction."
        )
    if fraction and not manifest.split("valid"):
        return (
            f"{where}: {what}, too few for --valid-fraction {fraction:g}, which takes about one in "
            f"{1 / fraction:,.0f} for validation: none was taken. Add documents, raise --valid-fraction, name "
            f"validation documents with --valid-input, or do without them: --valid-fraction 0.{hint}"
        )
    return ""


def _publish(target: Directory, manifest: Manifest, beside: dict[str, bytes]) -> None:
    """Write the files that accompany the shards, the manifest last."""
    for name, data in beside.items():
        if data:
            target.write(name, data)
        else:
            target.remove(name)  # from a killed run on an input that was fixed since
    listed = {f"{shard.name}{suffix}" for shard in manifest.shards for suffix in shard.files}
    for name in target.names():  # left by an unfinished build with other tasks; readers of *.bin would read them too
        if _SHARD_FILE.fullmatch(name) and name not in listed:
            target.remove(name)
    manifest.write()


def _clean(target: Directory) -> None:
    """Remove files that only an unfinished build needs."""
    for name in target.names():
        if name.startswith((".task-", ".lock")):
            target.remove(name)
    target.remove_leftovers()
