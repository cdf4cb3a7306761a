"""Minimum cost of JSON Lines to token ids with the libraries that we use, sequentially on one core.

Usage: python floor.py TOKENIZER.json CORE FILE.jsonl.gz...
Prints JSON: wall seconds, CPU seconds and tokens of each file, in order. Loading the tokenizer is not counted.
"""

import json
import os
import sys
import time

import fastokens
import msgspec
from isal import igzip


class Row(msgspec.Struct):
    """The fields of a document that our shards keep."""

    content: str
    repo_name: str = ""
    path: str = ""
    license: str = ""
    source: str = ""


def encode_file(path: str, decoder: msgspec.json.Decoder, tokenizer: fastokens.Tokenizer) -> int:
    """Gunzip, parse and encode one file; returns its number of tokens, without end tokens."""
    tokens = 0
    with igzip.open(path, "rb") as lines:
        for line in lines:
            ids, _ = tokenizer.encode_batch_flat([decoder.decode(line).content], False, True)
            tokens += len(ids) // 4  # ids are bytes of 32-bit integers
    return tokens


def main() -> None:
    """Process the files once and print the time of each."""
    tokenizer_file, core, *files = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})  # before the first thread starts, so that threads inherit it
    decoder = msgspec.json.Decoder(Row)
    tokenizer = fastokens.Tokenizer.from_file(tokenizer_file)
    each = []
    for path in files:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = encode_file(path, decoder, tokenizer)
        each.append(
            {
                "wall_seconds": time.perf_counter() - wall,
                "cpu_seconds": time.process_time() - cpu,
                "tokens": tokens,
            }
        )
    print(json.dumps(each))


if __name__ == "__main__":
    main()
