"""Verify a shard directory against its manifest: file sizes, optionally all bytes, and ids against the input."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from codeparrot_ds.documents.document import BadDocument, Document
from codeparrot_ds.documents.fields import Fields
from codeparrot_ds.documents.inputs import search_inputs
from codeparrot_ds.documents.read import Piece, read_documents
from codeparrot_ds.documents.splits import SPLITS
from codeparrot_ds.errors import ConfigError, DataError, list_problems
from codeparrot_ds.shards.format import Manifest, ShardInfo, parse_index, read_index, read_provenance
from codeparrot_ds.shards.tasks import divide, plan
from codeparrot_ds.system.files import digest_bytes
from codeparrot_ds.system.paths import Address, is_remote
from codeparrot_ds.system.storage import Directory, open_directory
from codeparrot_ds.tokenizer.directory import TOKENIZER_FILE
from codeparrot_ds.tokenizer.encode import Encoder

_READ_BYTES = 1 << 22
_COMPARED_TASKS = 32
_COMPARED_DOCUMENTS = 64  # per task, from its start


def verify(directory: Address, *, deep: bool = False) -> Manifest:
    """Check every shard of `directory` and return the manifest.

    Args:
        directory: finished shard directory, a local path or a URL.
        deep: also read all bytes of the shards to verify digests, index consistency and ids within the vocabulary.

    Raises:
        DataError: lists every file that is missing, truncated or altered.
    """
    manifest = Manifest.read(directory)
    store = open_directory(directory)
    problems = [problem for shard in manifest.shards for problem in _check_sizes(store, shard)]
    tokenizer = f"tokenizer/{TOKENIZER_FILE}"
    if not store.exists(tokenizer):
        problems.append(f"{tokenizer} is missing")
    elif digest_bytes(store.read(tokenizer)) != manifest.tokenizer_digest:
        problems.append(f"{tokenizer}: not the tokenizer that these shards were built with")
    if deep and not problems:
        problems = [problem for shard in manifest.shards for problem in _check_bytes(store, manifest, shard)]
    if problems:
        fix = "Copy these files again, or run `codeparrot-ds shards build` into a new directory."
        raise DataError(list_problems(str(directory), list(dict.fromkeys(problems)), fix))
    return manifest


def _check_sizes(store: Directory, shard: ShardInfo) -> list[str]:
    problems = []
    for suffix, expected in shard.files.items():
        size = store.size(f"{shard.name}{suffix}")
        if size is None:
            problems.append(f"{shard.name}{suffix} is missing")
        elif size != expected["bytes"]:
            problems.append(f"{shard.name}{suffix}: {size:,} bytes, the manifest says {expected['bytes']:,}")
    return problems


def _check_bytes(store: Directory, manifest: Manifest, shard: ShardInfo) -> list[str]:
    for suffix, expected in shard.files.items():
        digest = xxhash.xxh3_128()
        largest = 0
        with store.open(f"{shard.name}{suffix}") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                if suffix == ".bin":
                    largest = max(largest, int(np.frombuffer(block, manifest.id_type).max()))
        if digest.hexdigest() != expected["xxh3_128"]:
            return [f"{shard.name}{suffix}: content differs from what was written (digest mismatch)"]
        if largest >= manifest.vocab_size:
            return [f"{shard.name}{suffix}: contains id {largest:,}, the vocabulary ends at {manifest.vocab_size:,}"]
    if ".idx" not in shard.files:
        return []
    index = parse_index(store.read(f"{shard.name}.idx"), f"{shard.name}.idx")
    part = slice(shard.first_document, shard.first_document + shard.documents)
    if len(index.lengths[part]) != shard.documents or int(index.lengths[part].sum()) != shard.tokens:
        return [f"{shard.name}.idx: its counts differ from the manifest's"]
    if not index.is_contiguous():
        return [f"{shard.name}.idx: its documents are not contiguous in the .bin file"]
    return []


def verify_against_corpus(manifest: Manifest, inputs: Sequence[str] = (), valid_inputs: Sequence[str] = ()) -> int:
    """Re-encode a sample of the input documents with `tokenizers` and compare ids and provenance.

    Compares the first 64 documents of up to 32 tasks spread over the input.

    Args:
        manifest: of local shards built by `shards build`.
        inputs: current location of the input; by default the original one.
        valid_inputs: that of the input for validation alone.

    Returns:
        Number of documents compared.

    Raises:
        ConfigError: the shards are not local.
        DataError: the input is missing or has changed, or a document differs.
    """
    if is_remote(manifest.directory):
        raise ConfigError(f"{manifest.directory}: only local shards can be compared with their input. Copy them here.")
    options = manifest.options
    if "shard_tokens" not in options:
        raise DataError(f"{manifest.directory}: was adopted, not built, so there is no input to compare it with.")
    if valid_inputs and not manifest.valid_inputs:
        raise ConfigError(f"{manifest.directory}: was built without --valid-input. Omit it.")
    train = list(inputs) or manifest.inputs
    found = search_inputs([*train, *(valid_inputs or manifest.valid_inputs)], options["suffix"])
    fields = Fields(options["text_field"], **options.get("provenance", {}))
    tasks = plan(*divide(found, len(train)), options["shard_tokens"])
    encoder = Encoder(Path(manifest.directory) / "tokenizer")
    shards = {shard.name: shard for shard in manifest.shards}
    compared = 0
    for share in tasks[:: -(-len(tasks) // _COMPARED_TASKS)]:
        readers = {split: _documents_of(manifest, shards.get(f"{split}-{share.number:05d}")) for split in SPLITS}
        for document in islice(_readable(share.pieces, fields), _COMPARED_DOCUMENTS):
            split = share.split_of(int(document.digest(), 16), options["valid_fraction"])
            stored = next(readers[split], None)
            if stored is None or not _same(stored, document, encoder, manifest.eos_id):
                raise DataError(
                    f"{manifest.directory}/{split}-{share.number:05d}: does not contain {document.repository} "
                    f"{document.path} of the input at the expected position. The input or the shards have changed: "
                    "build them again."
                )
            compared += 1
    return compared


def _readable(pieces: Sequence[Piece], fields: Fields) -> Iterator[Document]:
    for piece in pieces:
        for read in read_documents(piece, fields):
            if not isinstance(read, BadDocument) and read.text:
                yield read


def _documents_of(manifest: Manifest, shard: ShardInfo | None) -> Iterator[tuple[np.ndarray, Document]]:
    """Yield ids (including the end token) and provenance of a shard's documents in order."""
    if shard is None:
        return
    ids = np.memmap(manifest.path(shard, ".bin"), manifest.id_type, "r")
    index = read_index(manifest.path(shard, ".idx"))
    path = manifest.path(shard, ".docs.parquet")
    provenance = read_provenance(path.read_bytes(), str(path))
    starts = np.cumsum(index.lengths) - index.lengths
    for start, length, document in zip(starts, index.lengths, provenance, strict=True):
        yield ids[start : start + length], document


def _same(stored: tuple[np.ndarray, Document], document: Document, encoder: Encoder, eos_id: int) -> bool:
    ids, provenance = stored
    fields = ("repository", "path", "licence", "source")
    return (
        all(getattr(provenance, field) == getattr(document, field) for field in fields)
        and int(ids[-1]) == eos_id
        and np.array_equal(ids[:-1], encoder.encode(document.text))
    )
