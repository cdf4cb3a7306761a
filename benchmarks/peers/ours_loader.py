"""Measurements of our loader; the only driver of the loader benchmark that imports our package. Prints JSON.

Usage: python ours_loader.py write DIRECTORY SHARDS TOKENS     write shards of random ids, TOKENS in total
       python ours_loader.py batches SHARDS SEQ_LEN SEQUENCES SECONDS
       python ours_loader.py open SHARDS SEQ_LEN
       python ours_loader.py seek SEQUENCES POSITION COUNT
"""

import json
import statistics
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
from rounds import sequences_per_second

VOCAB_SIZE = 32_768


def write(directory: str, shards: str, tokens: str) -> dict:
    """Write `shards` shards of random ids and equal length, in one training split."""
    from codeparrot_ds.documents.document import Document
    from codeparrot_ds.shards.format import Manifest, ShardWriter, dtype_for
    from codeparrot_ds.system.files import digest_file
    from codeparrot_ds.system.storage import LocalDirectory

    target = Path(directory)
    target.mkdir(parents=True)
    (target / "tokenizer").mkdir()
    (target / "tokenizer" / "tokenizer.json").write_text("{}")  # only its digest is read
    rng = np.random.default_rng(0)
    document = Document("", "random", "random", "", "benchmark")
    dtype = dtype_for(VOCAB_SIZE)
    written = []
    length = int(tokens) // int(shards)
    for number in range(int(shards)):
        with LocalDirectory(target).scratch() as scratch:
            writer = ShardWriter(scratch, f"train-{number:05d}", "train", dtype)
            writer.append(rng.integers(0, VOCAB_SIZE, length, dtype=np.uint16), np.array([length]), [document])
            written.append(writer.finish())
            LocalDirectory(target).publish(writer.files)
    Manifest(
        directory=target,
        vocab_size=VOCAB_SIZE,
        eos_id=0,
        tokenizer_digest=digest_file(target / "tokenizer" / "tokenizer.json"),
        shards=tuple(written),
        dtype=dtype.name,
    ).write()
    return {"shards": len(written)}


def batches(shards: str, seq_len: str, sequences: str, seconds: str) -> dict:
    """Read batches of random sequences, [sequences, seq_len + 1] int64."""
    from codeparrot_ds.shards.sequences import PackedSequences

    packed = PackedSequences.open(Path(shards), "train", int(seq_len))
    rng = np.random.default_rng(0)

    def take() -> np.ndarray:
        return packed.batch(rng.integers(0, len(packed), int(sequences)))

    return {"sequences_per_second": sequences_per_second(take, int(sequences), float(seconds))}


def open_shards(shards: str, seq_len: str) -> dict:
    """Time to open shards from the page cache: the median of 9, and the first, which also looks up files."""
    from codeparrot_ds.shards.sequences import PackedSequences

    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        PackedSequences.open(Path(shards), "train", int(seq_len))
        seconds.append(time.perf_counter() - started)
    return {"first_seconds": seconds[0], "median_seconds": statistics.median(seconds[1:])}


def seek(sequences: str, position: str, count: str) -> dict:
    """Time and memory to compute `count` entries of a permutation of `sequences`, starting at `position`."""
    from codeparrot_ds.shards.order import Order

    def take() -> np.ndarray:
        return Order(int(sequences), seed=1).take(int(position), int(count))

    take()  # imports
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        take()
        seconds.append(time.perf_counter() - started)
    tracemalloc.start()  # includes numpy's memory; not active during timing
    take()
    return {"median_seconds": statistics.median(seconds), "peak_growth_bytes": tracemalloc.get_traced_memory()[1]}


def main() -> None:
    """Run the command named on the command line."""
    action, *arguments = sys.argv[1:]
    result = {"write": write, "batches": batches, "open": open_shards, "seek": seek}[action](*arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
