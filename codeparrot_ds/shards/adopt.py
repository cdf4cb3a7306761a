"""Train in place on token files of other software: Megatron-LM indexed datasets and nanoGPT `.bin` files.

Nothing is copied or modified; a manifest and the tokenizer are written next to the files.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.shards.format import Manifest, ShardInfo, dtype_for, read_index
from codeparrot_ds.system.files import MANIFEST, digest_file, require_free_space
from codeparrot_ds.system.storage import LocalDirectory
from codeparrot_ds.tokenizer.encode import Encoder, tokenizer_files

_READ_TOKENS = 1 << 22


@dataclass(frozen=True)
class _TokenFile:
    prefix: Path  # without .bin
    dtype: np.dtype
    lengths: np.ndarray  # [documents] tokens
    files: dict[str, dict[str, int | str]]


def adopt(
    prefix: Path, tokenizer: Path, *, valid_prefix: Path | None = None, valid_fraction: float = 0.005
) -> Manifest:
    """Write the manifest of an existing dataset into its directory, so that it can be trained on, and return it.

    Args:
        prefix: `PREFIX.bin` with `PREFIX.idx` is a Megatron-LM dataset; without, a nanoGPT dataset (uint16).
        tokenizer: directory of the tokenizer that produced the ids.
        valid_prefix: another dataset in the same directory to use as the validation split.
        valid_fraction: without `valid_prefix`, the last documents with about this fraction of the tokens become the
            validation split. It may contain copies of training documents, because the split is not by content.

    Raises:
        ConfigError: the directory already has a manifest, or an option is invalid.
        DataError: files are missing or damaged, or their ids are not from this tokenizer.
    """
    prefix = _strip(prefix)
    directory = prefix.parent
    if (directory / MANIFEST).exists():
        raise ConfigError(f"{directory / MANIFEST}: already exists. Remove it to adopt the dataset again.")
    if valid_prefix is not None and _strip(valid_prefix).parent.resolve() != directory.resolve():
        raise ConfigError(f"{valid_prefix}: must be in {directory}, next to {prefix.name}.")
    if valid_prefix is not None and _strip(valid_prefix).name == prefix.name:
        raise ConfigError(f"{valid_prefix}: is the training data itself. Name other data, or omit --valid-prefix.")
    if not 0.0 < valid_fraction < 1.0:
        raise ConfigError(f"valid fraction {valid_fraction}: must be between 0 and 1, e.g. 0.005.")
    encoder = Encoder(tokenizer)
    train = _open(prefix, encoder)
    if valid_prefix is not None:
        valid = _open(_strip(valid_prefix), encoder)
        if valid.dtype != train.dtype:
            raise DataError(
                f"{valid_prefix}: ids of type {valid.dtype}, but {prefix} has {train.dtype}. Both must be the same."
            )
        shards = (_part(train, "train", 0, len(train.lengths)), _part(valid, "valid", 0, len(valid.lengths)))
    else:
        cut = _cut(train, valid_fraction)
        shards = (_part(train, "train", 0, cut), _part(train, "valid", cut, len(train.lengths)))
    documents = sum(shard.documents for shard in shards)
    manifest = Manifest(
        directory=directory,
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
        tokenizer_digest=encoder.digest,
        dtype=train.dtype.name,
        shards=shards,
        inputs=[str(prefix), *([str(valid_prefix)] if valid_prefix is not None else [])],
        sources=[{"name": f"{shard.name}.bin", **shard.files[".bin"]} for shard in shards],
        options={"adopted": True, "valid_fraction": None if valid_prefix is not None else valid_fraction},
        documents={"read": documents, "written": documents, "empty": 0, "quarantined": 0},
    )
    store = LocalDirectory(directory)
    store.make()
    require_free_space(directory, 10_000_000, "the manifest and the tokenizer")
    for name, data in tokenizer_files(tokenizer).items():
        if store.exists(f"tokenizer/{name}") and store.read(f"tokenizer/{name}") != data:
            raise ConfigError(f"{directory / 'tokenizer' / name}: another tokenizer is already here. Move it away.")
    for name, data in tokenizer_files(tokenizer).items():
        store.write(f"tokenizer/{name}", data)
    manifest.write()
    return manifest


def _strip(prefix: Path) -> Path:
    """`prefix` without the suffix that shell completion adds."""
    return prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _open(prefix: Path, encoder: Encoder) -> _TokenFile:
    """Read a whole dataset to compute digests, check the range of the ids, and find the document lengths."""
    data, index = _with_suffix(prefix, ".bin"), _with_suffix(prefix, ".idx")
    if not data.is_file():
        raise DataError(f"{data}: no such file. Expected PREFIX.bin and, for Megatron-LM, PREFIX.idx.")
    has_index = index.is_file()
    layout = read_index(index) if has_index else None
    dtype = layout.dtype if layout is not None else dtype_for(0)
    size = data.stat().st_size
    expected = int(layout.lengths.sum(dtype=np.int64)) * dtype.itemsize if layout is not None else size
    if size != expected or size % dtype.itemsize or size == 0:
        raise DataError(f"{data}: {size:,} bytes; expected {expected:,} of {dtype} by its index. Copy both again.")
    if layout is not None and not layout.is_contiguous():
        raise DataError(f"{index}: its documents are not contiguous in the .bin file, which is not supported.")
    ids = np.memmap(data, dtype, "r")
    digest = xxhash.xxh3_128()
    ends = []
    for start in range(0, len(ids), _READ_TOKENS):
        block = np.asarray(ids[start : start + _READ_TOKENS])
        digest.update(block.data)
        wrong = int(block.min()) if int(block.min()) < 0 else int(block.max())
        if not 0 <= wrong < encoder.vocab_size:
            raise DataError(
                f"{data}: contains id {wrong:,}, but the tokenizer has only {encoder.vocab_size:,} ids. The file was "
                "built with another tokenizer: name that one with --tokenizer."
            )
        if layout is None:
            ends.append(np.flatnonzero(block == encoder.eos_id) + start + 1)
    files: dict[str, dict[str, int | str]] = {".bin": {"bytes": size, "xxh3_128": digest.hexdigest()}}
    if layout is not None:
        files[".idx"] = {"bytes": index.stat().st_size, "xxh3_128": digest_file(index)}
        return _TokenFile(prefix, dtype, layout.lengths, files)
    bounds = np.concatenate(ends) if ends else np.empty(0, np.int64)
    if len(bounds) == 0:
        raise DataError(
            f"{data}: contains no end token (id {encoder.eos_id}), so its documents cannot be separated. It was "
            "built with another tokenizer, or without end tokens."
        )
    if bounds[-1] < len(ids):
        bounds = np.append(bounds, len(ids))
    return _TokenFile(prefix, dtype, np.diff(bounds, prepend=0), files)


def _cut(tokens: _TokenFile, valid_fraction: float) -> int:
    """Index of the first document of the validation split."""
    ends = np.cumsum(tokens.lengths, dtype=np.int64)
    cut = int(np.searchsorted(ends, ends[-1] * (1 - valid_fraction), side="right"))
    cut = min(max(cut, 1), len(ends) - 1)
    if len(ends) < 2:
        raise DataError(
            f"{tokens.prefix}.bin: contains a single document, which cannot be split. Name a validation set with "
            "--valid-prefix."
        )
    return cut


def _part(tokens: _TokenFile, split: str, start: int, stop: int) -> ShardInfo:
    """The shard of documents `start` .. `stop` - 1."""
    return ShardInfo(
        name=tokens.prefix.name,
        split=split,
        documents=stop - start,
        tokens=int(tokens.lengths[start:stop].sum(dtype=np.int64)),
        files=tokens.files,
        first_document=start,
        first_token=int(tokens.lengths[:start].sum(dtype=np.int64)),
    )
