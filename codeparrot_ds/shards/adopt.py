"""Train on token files of other software: Megatron-LM indexed datasets and bare `.bin` files, as of nanoGPT.

In place, nothing is copied or modified: a manifest and the tokenizer are written next to the files. Files whose type
training cannot read, or whose documents lack end tokens, are copied into shards on request.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.splits import VALID_FRACTION, require_fraction
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.shards.foreign import TokenFile, batches, open_tokens
from codeparrot_ds.shards.format import Manifest, ShardInfo, ShardWriter, dtype_for
from codeparrot_ds.shards.match import other_tokenizer
from codeparrot_ds.system.files import MANIFEST, publish_directory, require_free_space
from codeparrot_ds.system.jobs import say
from codeparrot_ds.system.storage import LocalDirectory
from codeparrot_ds.tokenizer.directory import TOKENIZER_FILE, tokenizer_files
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.tokenizer.lossless import require_lossless

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
    prefix: Path | Sequence[Path],
    tokenizer: Path,
    *,
    eos: str | None = None,
    valid_prefix: Path | Sequence[Path] = (),
    valid_fraction: float | None = None,
    dtype: str | None = None,
    append_eos: bool = False,
    output: Path | None = None,
) -> Manifest:
    """Make existing datasets fit to train on, as one, and return the manifest.

    Args:
        prefix: `PREFIX.bin` with `PREFIX.idx` is a Megatron-LM dataset; without, a bare array of ids, as of nanoGPT.
            Several must be in one directory, unless they are copied.
        tokenizer: directory of the tokenizer that produced the ids.
        eos: its token that ends a document; by default as `tokenizer.directory.end_token` says.
        valid_prefix: other datasets to use as the validation split; in the same directory, unless all are copied.
        valid_fraction: without `valid_prefix`, of each dataset the last documents with about this fraction of the
            tokens become the validation split; 0 for none, None for 0.005. It may contain copies of training
            documents, because the split is not by content. A dataset of one document is not split.
        dtype: type of the ids of a bare array, "uint16", "int32", "uint32" or "int64"; tested by default.
        append_eos: copy the datasets into shards, and end each document that does not end with the end token with one.
        output: copy the datasets into this new shard directory. By default, shards with end tokens are written next to
            them.

    Raises:
        ConfigError: there is a manifest already, or an option is invalid.
        DataError: files are missing or damaged, their ids are not from this tokenizer, or are of a type that cannot be
            used in place, or documents lack end tokens; or the tokenizer loses text.
    """
    train, valid = _prefixes(prefix), _prefixes(valid_prefix)
    if valid_fraction is None:
        valid_fraction = 0.0 if valid else VALID_FRACTION
    _check_options(train, valid, valid_fraction, output)
    encoder = Encoder(tokenizer, eos)
    if changes := require_lossless(encoder, tokenizer):
        say(f"note: {tokenizer / TOKENIZER_FILE}: {'; '.join(changes)}.")
    opened = [open_tokens(each, encoder, dtype) for each in (*train, *valid)]
    problems = [other_tokenizer(each, encoder) for each in opened]
    if not append_eos:
        problems += [_missing_end_tokens(each, encoder) for each in opened]
    if output is None and not append_eos:
        problems += [_obstacle(each, opened[0]) for each in opened]
    if any(problems):
        raise DataError("\n".join(filter(None, problems)))
    parts = _split(opened[: len(train)], opened[len(train) :], valid_fraction, append_eos)
    facts = {
        "inputs": list(map(str, train)),
        "valid_inputs": list(map(str, valid)),
        "options": {
            "adopted": True,
            "valid_fraction": None if valid else valid_fraction,
            "append_eos": append_eos,
            **({"text_changes": changes} if changes else {}),
        },
        "documents": _counts(opened, parts),
    }
    directory = train[0].parent
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


def _prefixes(given: Path | Sequence[Path]) -> list[Path]:
    """Each without the suffix that shell completion adds."""
    prefixes = [given] if isinstance(given, Path) else given
    return [each.with_suffix("") if each.suffix in (".bin", ".idx") else each for each in prefixes]


def _check_options(train: list[Path], valid: list[Path], valid_fraction: float, output: Path | None) -> None:
    directory = train[0].parent
    if output is None and (directory / MANIFEST).exists():
        raise ConfigError(_already_adopted(directory, [*train, *valid]))
    for each in (*train[1:], *valid):
        if output is None and each.parent.resolve() != directory.resolve():
            raise ConfigError(f"{each}: must be in {directory}, next to {train[0].name}, or use --output DIR.")
    places = [each.resolve() for each in (*train, *valid)]
    for number, each in enumerate((*train, *valid)):
        if number >= len(train) and places[number] in places[: len(train)]:
            raise ConfigError(f"{each}: is the training data itself. Name other data, or omit --valid-prefix.")
        if places[number] in places[:number]:
            raise ConfigError(f"{each}: named twice. Name it once.")
    require_fraction(valid_fraction, none=True)
    if valid and valid_fraction:
        raise ConfigError(
            f"--valid-fraction {valid_fraction} and --valid-prefix both say what is validated on: omit one of them."
        )


def _already_adopted(directory: Path, wanted: list[Path]) -> str:
    """What to do where there is a manifest: of these datasets, or of others in the same directory."""
    path = directory / MANIFEST
    try:
        found = Manifest.read(directory)
    except DataError:
        return f"{path}: already exists. Remove it to adopt the dataset again."
    stored = {Path(each).name for each in (*found.inputs, *found.valid_inputs)}
    if not found.options.get("adopted") or stored & {each.name for each in wanted}:
        return f"{path}: already exists. Remove it to adopt the dataset again."
    listed = ", ".join(sorted(stored))
    return (
        f"{path}: is of other data in this directory ({listed}), and a directory has one manifest. To train on all of "
        "it as one dataset, remove the manifest and name all prefixes in one command; to weigh them against each "
        "other, copy this one: --output DIR."
    )


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


def _split(train: list[TokenFile], valid: list[TokenFile], valid_fraction: float, append_eos: bool) -> list[_Part]:
    """The splits: datasets of their own, or of each dataset the end."""

    def whole(split: str, tokens: TokenFile) -> _Part:
        appended = ~tokens.ended & append_eos
        return _Part(split, tokens, tokens.lengths + appended, appended, 0, len(tokens.lengths))

    parts = [whole("train", tokens) for tokens in train] + [whole("valid", tokens) for tokens in valid]
    if valid or not valid_fraction:
        return parts
    ends = []
    for number, part in enumerate(parts):
        if part.stop > 1:
            cut = _cut(part, valid_fraction)
            parts[number] = dataclasses.replace(part, stop=cut)
            ends.append(dataclasses.replace(part, split="valid", start=cut))
    if not ends:
        raise DataError(
            f"{', '.join(str(tokens.data) for tokens in train)}: contains a single document, which cannot be split. "
            "Name a validation set with --valid-prefix, or do without one: --valid-fraction 0."
        )
    return parts + ends


def _cut(whole: _Part, valid_fraction: float) -> int:
    """Index of the first document of the validation split, of at least two documents."""
    ends = np.cumsum(whole.lengths, dtype=np.int64)
    cut = int(np.searchsorted(ends, ends[-1] * (1 - valid_fraction), side="right"))
    return min(max(cut, 1), len(ends) - 1)


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
    names = _shard_names(parts)
    for name in names:
        for path in sorted(directory.glob(f"{name}.*")):
            raise ConfigError(f"{path}: already exists. Remove it if it is of an earlier try, or use --output DIR.")
    each_bytes = [part.lengths[part.start : part.stop] * id_type.itemsize + _BYTES_PER_DOCUMENT for part in parts]
    require_free_space(directory, sum(int(each.sum()) for each in each_bytes), "the copy")
    shards = tuple(_copy(part, name, directory, encoder, id_type) for part, name in zip(parts, names, strict=True))
    return _manifest(directory, encoder, id_type.name, shards, facts)


def _shard_names(parts: list[_Part]) -> list[str]:
    """One for each part, numbered within its split."""
    splits = [part.split for part in parts]
    return [f"{split}-{splits[:number].count(split):05d}" for number, split in enumerate(splits)]


def _copy(part: _Part, name: str, directory: Path, encoder: Encoder, id_type: np.dtype) -> ShardInfo:
    """Write a part into `directory` as a shard of its own."""
    if int(part.lengths.max()) > _MAX_DOCUMENT_TOKENS:
        raise DataError(f"{part.tokens.data}: has a document of more than {_MAX_DOCUMENT_TOKENS:,} tokens. Split it.")
    store, source, repository = LocalDirectory(directory), part.tokens.ids(), part.tokens.prefix.name
    stored = np.cumsum(part.tokens.lengths, dtype=np.int64)  # one past the last id of each document
    with store.scratch() as scratch:
        writer = ShardWriter(scratch, name, part.split, id_type)
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
