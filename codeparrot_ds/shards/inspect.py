"""Show what training saw: the text of any sequence, and the repository, path and licence of each document in it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.splits import SPLITS
from codeparrot_ds.errors import ConfigError
from codeparrot_ds.run.directory import RunDirectory
from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.shards.format import Manifest, ShardInfo, read_index, read_provenance
from codeparrot_ds.shards.order import positions_of_step
from codeparrot_ds.shards.sequences import Dataset
from codeparrot_ds.tokenizer.encode import Encoder


@dataclass(frozen=True)
class Excerpt:
    """The part of a document that is in a sequence.

    Attributes:
        shard: name of the shard that contains the document.
        document: index of the document in that shard.
        provenance: a document with empty text; None for an adopted dataset, which has no provenance.
        start, stop: token range of the document, including its end token, that is in the sequence.
        tokens: length of the whole document, including its end token.
        text: decoded; characters cut at either end become U+FFFD.
    """

    shard: str
    document: int
    provenance: Document | None
    start: int
    stop: int
    tokens: int
    text: str

    def describe(self) -> str:
        """One line with the provenance and the token range."""
        part = f"tokens {self.start:,} to {self.stop:,} of {self.tokens:,}"
        where = f"{self.shard} document {self.document:,}, {part}"
        if self.provenance is None:
            return where
        names = [self.provenance.repository, self.provenance.path, self.provenance.licence or "licence unknown"]
        return f"{' | '.join(name for name in names if name)} | {where}"


def sequences_of_step(
    recipe: Recipe, step: int, rank: int | None, world_size: int, data: Dataset | None = None
) -> list[int]:
    """Indices of the training sequences that optimizer step `step` (from 0) reads, on one rank or on all.

    Opens the recipe's shards unless `data` is given. Raises ConfigError when `world_size` does not divide the global
    batch, or there is no such step or rank.
    """
    if step < 0 or world_size < 1:
        raise ConfigError(f"step {step} of {world_size} ranks: must be at least 0, and at least 1 rank.")
    if rank is not None and not 0 <= rank < world_size:
        raise ConfigError(
            f"rank {rank} of {world_size}: must be between 0 and {world_size - 1}. Change --rank or --world-size."
        )
    micro, accumulation = recipe.batch.micro_batch_and_accumulation(world_size)
    share = micro * accumulation
    if data is None:
        data = Dataset.open(recipe.data.sources, recipe.model.seq_len)
    skipped_ranges = RunDirectory(recipe.run_directory).skipped_ranges()  # skipped after loss spikes
    numbers = data.order(recipe.seed).at(positions_of_step(step, recipe.batch.global_batch_size, skipped_ranges))
    return (numbers if rank is None else numbers[rank * share : (rank + 1) * share]).tolist()


def inspect_sequence(sources: Mapping[Path, float], split: str, seq_len: int, number: int) -> list[Excerpt]:
    """The content of sequence `number` of a split, per document: the inputs plus one final target.

    Args:
        sources: shard directories and weights, as in a recipe; sequences are numbered across all of them.
        split: "train" or "valid".
        seq_len: sequence length (tokens).
        number: index of the sequence, from 0.

    Raises:
        ConfigError: there is no such split or sequence.
        DataError: damaged shards.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r}: must be {' or '.join(SPLITS)}.")
    data = Dataset.open(sources, seq_len)
    sequences = data.train if split == "train" else data.require_valid()
    if not 0 <= number < len(sequences):
        raise ConfigError(
            f"{', '.join(map(str, sources))}: sequence {number:,} of {len(sequences):,} in the {split} split at "
            f"{seq_len:,} tokens each. Choose one from 0 to {len(sequences) - 1:,}."
        )
    which = 0
    while number >= len(sequences.parts[which]):
        number -= len(sequences.parts[which])
        which += 1
    manifest = sequences.parts[which].manifest
    encoder = Encoder(Path(manifest.directory) / "tokenizer")
    first = number * seq_len
    return list(_excerpts(manifest, split, first, first + seq_len + 1, encoder, {}))


def describe_sequences(data: Dataset, numbers: Iterable[int]) -> dict[int, list[list[str]]]:
    """Provenance of training sequences: index -> [repository, path] of each of its documents.

    For an adopted dataset, which has no provenance, [shard, index of the document].
    """
    return {
        number: [
            [each.provenance.repository, each.provenance.path] if each.provenance else [each.shard, str(each.document)]
            for each in excerpts
        ]
        for number, _, excerpts in documents_of(data, "train", numbers)
    }


def documents_of(data: Dataset, split: str, numbers: Iterable[int]) -> Iterator[tuple[int, int, list[Excerpt]]]:
    """The documents of sequences, without their text.

    Yields (index of the sequence, index of its shard directory, its seq_len + 1 tokens by document), in order.
    """
    sequences = data.train if split == "train" else data.valid
    memo: _Memo = {}
    for number in sorted(set(map(int, numbers))):  # so that each shard is read once
        which, place = 0, number
        while place >= len(sequences.parts[which]):
            place -= len(sequences.parts[which])
            which += 1
        first = place * sequences.seq_len
        stop = first + sequences.seq_len + 1
        yield number, which, list(_excerpts(data.manifests[which], split, first, stop, None, memo))


# Of the shard read last: ids, [tokens]; end of each document, [documents] int64; provenance of each document.
_Contents = tuple[np.ndarray, np.ndarray, list[Document] | None]
_Memo = dict[tuple[str, str], _Contents]


def _excerpts(
    manifest: Manifest, split: str, first: int, stop: int, encoder: Encoder | None, memo: _Memo
) -> Iterator[Excerpt]:
    """The documents that contain tokens `first` .. `stop` of a split."""
    start_of_shard = 0
    for shard in manifest.split(split):
        inside = range(max(first - start_of_shard, 0), min(stop - start_of_shard, shard.tokens))
        if inside:
            yield from _excerpts_of_shard(manifest, shard, inside.start, inside.stop, encoder, memo)
        start_of_shard += shard.tokens


def _excerpts_of_shard(
    manifest: Manifest, shard: ShardInfo, first: int, stop: int, encoder: Encoder | None, memo: _Memo
) -> Iterator[Excerpt]:
    key = (str(manifest.directory), shard.name)
    if key not in memo:
        memo.clear()
        memo[key] = _contents(manifest, shard)
    ids, ends, provenance = memo[key]
    for i in range(int(np.searchsorted(ends, first, side="right")), len(ends)):
        begin = int(ends[i - 1]) if i else 0
        if begin >= stop:
            return
        inside = slice(max(begin, first), min(int(ends[i]), stop))
        yield Excerpt(
            shard=shard.name,
            document=shard.first_document + i,
            provenance=provenance[i] if provenance is not None else None,
            start=inside.start - begin,
            stop=inside.stop - begin,
            tokens=int(ends[i]) - begin,
            text=encoder.decode(np.asarray(ids[inside])) if encoder else "",
        )


def _contents(manifest: Manifest, shard: ShardInfo) -> _Contents:
    all_ids = np.memmap(manifest.path(shard, ".bin"), manifest.id_type, "r")
    ids = all_ids[shard.first_token : shard.first_token + shard.tokens]
    ends = np.cumsum(_lengths(manifest, shard, ids), dtype=np.int64)
    if ".docs.parquet" not in shard.files:
        return ids, ends, None
    path = manifest.path(shard, ".docs.parquet")
    return ids, ends, read_provenance(path.read_bytes(), str(path))


def _lengths(manifest: Manifest, shard: ShardInfo, ids: np.ndarray) -> np.ndarray:
    """Tokens of each document: from the index, or if there is none, from the end tokens."""
    if ".idx" in shard.files:
        lengths = read_index(manifest.path(shard, ".idx")).lengths
        return lengths[shard.first_document : shard.first_document + shard.documents]
    ends = np.flatnonzero(ids == manifest.eos_id) + 1
    if len(ends) == 0 or ends[-1] < len(ids):
        ends = np.append(ends, len(ids))
    return np.diff(ends, prepend=0)
