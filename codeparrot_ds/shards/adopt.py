"""Train on token files of other software: Megatron-LM indexed datasets and bare `.bin` files, as of nanoGPT.

In place, nothing is copied or modified: a manifest and the tokenizer are written next to the files. Files whose type
training cannot read, or whose documents lack end tokens, are copied into shards on request.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.splits import require_fraction
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.shards.foreign import TokenFile, batches, open_tokens
from codeparrot_ds.shards.format import Manifest, ShardInfo, ShardWriter, dtype_for
from codeparrot_ds.system.files import MANIFEST, publish_directory, require_free_space
from codeparrot_ds.system.storage import LocalDirectory
from codeparrot_ds.tokenizer.directory import tokenizer_files
from codeparrot_ds.tokenizer.encode import Encoder

_COPIED_TOKENS = 1 << 20  # at a time
_BYTES_PER_DOCUMENT = 64  # of a copy: 20 in the index, and its provenance
_MANIFEST_BYTES = 10_000_000  # with the tokenizer
_MAX_DOCUMENT_TOKENS = 2**31 - 1  # the index holds 32-bit lengths
_LISTED = 3


@dataclass(frozen=True)
class _Part:
    """Documents `start` .. `stop` - 1 of a token file, as one split; `lengths` and `appended` are of the whole file.

    Attributes:
        lengths: tokens of each document, with appended end tokens, [documents] int64.
        appended: whether an end token is appended to each document, [documents] bool.
    """

    split: str
    tokens: TokenFile
    lengths: np.ndarray
    appended: np.ndarray
    start: int
    stop: int


def adopt(
    prefix: Path,
    tokenizer: Path,
    *,
    eos: str | None = None,
    valid_prefix: Path | None = None,
    valid_fraction: float = 0.005,
    dtype: str | None = None,
    append_eos: bool = False,
    output: Path | None = None,
) -> Manifest:
    """Make an existing dataset fit to train on, and return its manifest.

    Args:
        prefix: `PREFIX.bin` with `PREFIX.idx` is a Megatron-LM dataset; without, a bare array of ids, as of nanoGPT.
        tokenizer: directory of the tokenizer that produced the ids.
        eos: its token that ends a document; by default as `tokenizer.directory.end_token` says.
        valid_prefix: another dataset to use as the validation split; in the same directory, unless both are copied.
        valid_fraction: without `valid_prefix`, the last documents with about this fraction of the tokens become the
            validation split. It may contain copies of training documents, because the split is not by content.
        dtype: type of the ids of a bare array, "uint16", "int32", "uint32" or "int64"; tested by default.
        append_eos: copy the dataset into shards, and end each document that does not end with the end token with one.
        output: copy the dataset into this new shard directory. By default, shards with end tokens are written next to
            the dataset.

    Raises:
        ConfigError: there is a manifest already, or an option is invalid.
        DataError: files are missing or damaged, their ids are not from this tokenizer, or are of a type that cannot be
            used in place, or documents lack end tokens.
    """
    prefixes = [_strip(each) for each in (prefix, valid_prefix) if each is not None]
    _check_options(prefixes, valid_fraction, output)
    encoder = Encoder(tokenizer, eos)
    opened = [open_tokens(each, encoder, dtype) for each in prefixes]
    problems = [] if append_eos else [_missing_end_tokens(each, encoder) for each in opened]
    if output is None and not append_eos:
        problems += [_obstacle(each, opened[0]) for each in opened]
    if any(problems):
        raise DataError("\n".join(filter(None, problems)))
    parts = _split(opened, valid_fraction, append_eos)
    facts = {
        "inputs": [str(each) for each in prefixes],
        "options": {
            "adopted": True,
            "valid_fraction": valid_fraction if valid_prefix is None else None,
            "append_eos": append_eos,
        },
        "documents": _counts(opened, parts),
    }
    directory = prefixes[0].parent
    if output is not None:
        with publish_directory(output) as unfinished:
            _write(_copy_all(parts, unfinished, encoder, facts), tokenizer, encoder.eos_token)
        return Manifest.read(output)
    if append_eos:
        manifest = _copy_all(parts, directory, encoder, facts)
    else:
        manifest = _manifest(directory, encoder, opened[0].type_name, tuple(map(_in_place, parts)), facts)
    _write(manifest, tokenizer, encoder.eos_token)
    return manifest


def _strip(prefix: Path) -> Path:
    """`prefix` without the suffix that shell completion adds."""
    return prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix


def _check_options(prefixes: list[Path], valid_fraction: float, output: Path | None) -> None:
    directory = prefixes[0].parent
    if output is None and (directory / MANIFEST).exists():
        raise ConfigError(f"{directory / MANIFEST}: already exists. Remove it to adopt the dataset again.")
    if output is None and any(each.parent.resolve() != directory.resolve() for each in prefixes):
        raise ConfigError(f"{prefixes[1]}: must be in {directory}, next to {prefixes[0].name}, or use --output DIR.")
    if len({each.resolve() for each in prefixes}) < len(prefixes):
        raise ConfigError(f"{prefixes[1]}: is the training data itself. Name other data, or omit --valid-prefix.")
    require_fraction(valid_fraction)


def _missing_end_tokens(tokens: TokenFile, encoder: Encoder) -> str:
    """What is wrong with the ends of the documents of an index; empty if nothing is.

    A bare file is separated at its end tokens, so that only its last document may lack one: the file may be a part of
    a longer one.
    """
    missing = np.flatnonzero(~tokens.ended)
    if not tokens.has_index or not len(missing):
        return ""
    listed = ", ".join(f"{number:,}" for number in missing[:_LISTED]) + (", …" if len(missing) > _LISTED else "")
    end_token = f"the end token (id {encoder.eos_id}, {encoder.eos_token})"
    if len(missing) == len(tokens.ended) > 1 and len(tokens.last_ids) == 1:
        cause = (
            f"They all end with id {tokens.last_ids[0]:,}: if that is the end token of the tokenizer that produced "
            "them, name that one with --tokenizer"
        )
    else:
        cause = "Preprocess them again with Megatron-LM's --append-eod"
    return (
        f"{tokens.data}: {len(missing):,} of {len(tokens.ended):,} documents ({listed}) do not end with {end_token}, "
        f"so that training would not see where they end. {cause}, or add --append-eos, which copies them into shards "
        "with end tokens: next to the dataset, or into --output DIR."
    )


def _obstacle(tokens: TokenFile, first: TokenFile) -> str:
    """Why a dataset cannot be used in place beside the `first`; empty if it can."""
    if obstacle := tokens.obstacle():
        return f"{tokens.data}: {obstacle}. Copy them into shards: --output DIR."
    if tokens.dtype != first.dtype:
        return (
            f"{tokens.data}: its ids are {tokens.type_name}, but those of {first.data} are {first.type_name}. Copy "
            "both into shards of one type: --output DIR."
        )
    return ""


def _split(opened: list[TokenFile], valid_fraction: float, append_eos: bool) -> list[_Part]:
    """The splits: one dataset each, or both of the only one."""
    parts = []
    for split, tokens in zip(("train", "valid"), opened, strict=False):
        appended = ~tokens.ended & append_eos
        parts.append(_Part(split, tokens, tokens.lengths + appended, appended, 0, len(tokens.lengths)))
    if len(parts) == 1:
        whole = parts[0]
        cut = _cut(whole, valid_fraction)
        common = (whole.tokens, whole.lengths, whole.appended)
        parts = [_Part("train", *common, 0, cut), _Part("valid", *common, cut, whole.stop)]
    return parts


def _cut(whole: _Part, valid_fraction: float) -> int:
    """Index of the first document of the validation split."""
    ends = np.cumsum(whole.lengths, dtype=np.int64)
    cut = int(np.searchsorted(ends, ends[-1] * (1 - valid_fraction), side="right"))
    cut = min(max(cut, 1), len(ends) - 1)
    if len(ends) < 2:
        raise DataError(
            f"{whole.tokens.data}: contains a single document, which cannot be split. Name a validation set with "
            "--valid-prefix."
        )
    return cut


def _counts(opened: list[TokenFile], parts: list[_Part]) -> dict[str, int]:
    """Counts of documents, as in the manifest."""
    written, empty = sum(len(each.lengths) for each in opened), sum(each.empty for each in opened)
    appended = sum(int(part.appended[part.start : part.stop].sum()) for part in parts)
    missing = sum(int((~each.ended).sum()) for each in opened) - appended
    counts = {"read": written + empty, "written": written, "empty": empty, "quarantined": 0}
    more = {"end tokens appended": appended, "without end token": missing}
    return counts | {name: count for name, count in more.items() if count}


def _in_place(part: _Part) -> ShardInfo:
    """The shard that is a part of the files as they are."""
    inside = part.lengths[part.start : part.stop]
    return ShardInfo(
        name=part.tokens.prefix.name,
        split=part.split,
        documents=len(inside),
        tokens=int(inside.sum(dtype=np.int64)),
        files=part.tokens.files,
        first_document=part.start,
        first_token=part.tokens.first + int(part.lengths[: part.start].sum(dtype=np.int64)),
    )


def _copy_all(parts: list[_Part], directory: Path, encoder: Encoder, facts: dict[str, Any]) -> Manifest:
    """Write all parts into `directory` as shards, and return their manifest."""
    id_type = dtype_for(encoder.vocab_size)
    for part in parts:
        for path in sorted(directory.glob(f"{_shard_name(part)}.*")):
            raise ConfigError(f"{path}: already exists. Remove it if it is of an earlier try, or use --output DIR.")
    each_bytes = [part.lengths[part.start : part.stop] * id_type.itemsize + _BYTES_PER_DOCUMENT for part in parts]
    require_free_space(directory, sum(int(each.sum()) for each in each_bytes), "the copy")
    shards = tuple(_copy(part, directory, encoder, id_type) for part in parts)
    return _manifest(directory, encoder, id_type.name, shards, facts)


def _shard_name(part: _Part) -> str:
    return f"{part.split}-00000"


def _copy(part: _Part, directory: Path, encoder: Encoder, id_type: np.dtype) -> ShardInfo:
    """Write a part into `directory` as a shard of its own."""
    if int(part.lengths.max()) > _MAX_DOCUMENT_TOKENS:
        raise DataError(f"{part.tokens.data}: has a document of more than {_MAX_DOCUMENT_TOKENS:,} tokens. Split it.")
    store, source, repository = LocalDirectory(directory), part.tokens.ids(), part.tokens.prefix.name
    stored = np.cumsum(part.tokens.lengths, dtype=np.int64)  # one past the last id of each document
    with store.scratch() as scratch:
        writer = ShardWriter(scratch, _shard_name(part), part.split, id_type)
        try:
            for batch in batches(part.lengths[part.start : part.stop], _COPIED_TOKENS):
                start, stop = part.start + batch.start, part.start + batch.stop
                first = int(stored[start - 1]) if start else 0
                ids = source[first : int(stored[stop - 1])].astype(id_type)
                places = stored[start:stop][part.appended[start:stop]] - first
                ids = np.insert(ids, places, encoder.eos_id)
                provenance = [Document("", repository, f"document {i}", "", "adopted") for i in range(start, stop)]
                writer.append(ids, part.lengths[start:stop].astype(np.int32), provenance)
            shard = writer.finish()
        finally:
            writer.close()
        assert shard is not None
        store.publish(writer.files)
    return shard


def _manifest(
    directory: Path, encoder: Encoder, dtype: str, shards: tuple[ShardInfo, ...], facts: dict[str, Any]
) -> Manifest:
    return Manifest(
        directory=directory,
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
        tokenizer_digest=encoder.digest,
        dtype=dtype,
        shards=shards,
        sources=[{"name": f"{shard.name}.bin", **shard.files[".bin"]} for shard in shards],
        **facts,
    )


def _write(manifest: Manifest, tokenizer: Path, eos_token: str) -> None:
    """Write the tokenizer and the manifest into the directory of the shards."""
    directory = Path(manifest.directory)
    store = LocalDirectory(directory)
    store.make()
    require_free_space(directory, _MANIFEST_BYTES, "the manifest and the tokenizer")
    for name, data in tokenizer_files(tokenizer, eos_token).items():
        if store.exists(f"tokenizer/{name}") and store.read(f"tokenizer/{name}") != data:
            raise ConfigError(f"{directory / 'tokenizer' / name}: another tokenizer is already here. Move it away.")
    for name, data in tokenizer_files(tokenizer, eos_token).items():
        store.write(f"tokenizer/{name}", data)
    manifest.write()
