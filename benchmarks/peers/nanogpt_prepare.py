"""Tokenization as in nanoGPT: `datasets.map` over tiktoken, then one flat uint16 file per split.

Usage: python nanogpt_prepare.py TOKENIZER_DIRECTORY WORKERS OUTPUT FILE.jsonl.gz...
"""

import json
import sys
from pathlib import Path

import numpy as np
import tiktoken
from datasets import load_dataset
from tqdm import tqdm

_EOS = "<|endoftext|>"
_VALID_FRACTION, _SEED, _WRITES = 0.0005, 2357, 1024  # nanoGPT's values
# GPT-2's pattern with possessive quantifiers, as in tiktoken: the same matches, less backtracking.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def byte_of_character() -> dict[str, int]:
    """GPT-2's byte alphabet, character to byte: printable bytes map to themselves, the others to 256, 257, …"""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def tiktoken_encoding(tokenizer_json: Path) -> tiktoken.Encoding:
    """Load a byte-level BPE `tokenizer.json` into tiktoken: ids are ranks, because merges are numbered in order."""
    vocabulary = json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]["vocab"]
    alphabet = byte_of_character()
    return tiktoken.Encoding(
        name=tokenizer_json.parent.name,
        pat_str=_GPT2_PATTERN,
        mergeable_ranks={
            bytes(alphabet[character] for character in token): rank
            for token, rank in vocabulary.items()
            if token != _EOS
        },
        special_tokens={_EOS: vocabulary[_EOS]},
        explicit_n_vocab=len(vocabulary),
    )


def main() -> None:
    """Load, split, map and write."""
    tokenizer_directory, workers, output, *files = sys.argv[1:]
    encoding = tiktoken_encoding(Path(tokenizer_directory) / "tokenizer.json")

    def encode(document: dict) -> dict:
        ids = encoding.encode_ordinary(document["content"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    documents = load_dataset("json", data_files=files, split="train", num_proc=int(workers))
    splits = documents.train_test_split(test_size=_VALID_FRACTION, seed=_SEED, shuffle=True)
    splits = splits.map(encode, remove_columns=documents.column_names, num_proc=int(workers), desc="tokenizing")
    Path(output).mkdir(parents=True)
    for name, split in splits.items():
        tokens = int(np.sum(split["len"], dtype=np.uint64))
        written = np.memmap(Path(output) / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(tokens,))
        position = 0
        writes = min(
            _WRITES, len(split)
        )  # a small benchmark has fewer documents than nanoGPT's number of write batches
        for i in tqdm(range(writes), desc=f"writing {name}"):
            piece = split.shard(num_shards=writes, index=i, contiguous=True).with_format("numpy")
            ids = np.concatenate(piece["ids"])
            written[position : position + len(ids)] = ids
            position += len(ids)
        written.flush()


if __name__ == "__main__":
    main()
