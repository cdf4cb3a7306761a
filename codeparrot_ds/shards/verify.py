"""Hold a shard directory against its manifest: sizes in a moment, digests and indices at disk speed."""

from pathlib import Path

from codeparrot_ds.errors import DataError, list_problems
from codeparrot_ds.files import digest_file
from codeparrot_ds.shards.format import Manifest, ShardInfo, read_index
from codeparrot_ds.tokenizer.train import TOKENIZER_FILE


def verify(directory: Path, *, deep: bool = False) -> Manifest:
    """Check every shard of `directory` and return the manifest.

    Args:
        directory: a finished shard directory.
        deep: also read all bytes of the shards: digests and index consistency.

    Raises:
        DataError: names every file that is missing, cut short or altered.
    """
    manifest = Manifest.read(directory)
    problems = [problem for shard in manifest.shards for problem in _check_sizes(directory, shard)]
    tokenizer = directory / "tokenizer" / TOKENIZER_FILE
    if not tokenizer.is_file():
        problems.append(f"tokenizer/{TOKENIZER_FILE} is missing")
    elif digest_file(tokenizer) != manifest.tokenizer_digest:
        problems.append(f"tokenizer/{TOKENIZER_FILE}: not the tokenizer that made these shards")
    if deep and not problems:
        problems = [problem for shard in manifest.shards for problem in _check_bytes(directory, shard)]
    if problems:
        mend = "Copy these files again, or run `codeparrot-ds shards build` into a new directory."
        raise DataError(list_problems(str(directory), problems, mend))
    return manifest


def _check_sizes(directory: Path, shard: ShardInfo) -> list[str]:
    problems = []
    for suffix, expected in shard.files.items():
        path = directory / f"{shard.name}{suffix}"
        if not path.is_file():
            problems.append(f"{path.name} is missing")
        elif (size := path.stat().st_size) != expected["bytes"]:
            problems.append(f"{path.name}: {size:,} bytes, the manifest says {expected['bytes']:,}")
    return problems


def _check_bytes(directory: Path, shard: ShardInfo) -> list[str]:
    for suffix, expected in shard.files.items():
        if digest_file(directory / f"{shard.name}{suffix}") != expected["xxh3_128"]:
            return [f"{shard.name}{suffix}: its bytes are not those that were written (digests differ)"]
    index = read_index(directory / f"{shard.name}.idx")
    if len(index.lengths) != shard.documents or int(index.lengths.sum()) != shard.tokens:
        return [f"{shard.name}.idx: its counts are not the manifest's"]
    return []
