"""Tokenization as in CodeParrot: a batched `datasets.map` with the fast tokenizer, saved as Arrow.

Usage: python datasets_map.py TOKENIZER_DIRECTORY WORKERS OUTPUT FILE.jsonl.gz...
"""

import sys

from datasets import load_dataset
from transformers import AutoTokenizer


def main() -> None:
    """Load, map and save."""
    tokenizer_directory, workers, output, *files = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)

    def tokenize(batch: dict) -> dict:
        encoded = tokenizer(batch["content"], truncation=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded]}

    documents = load_dataset("json", data_files=files, split="train", num_proc=int(workers))
    tokenized = documents.map(
        tokenize, batched=True, num_proc=int(workers), remove_columns=documents.column_names, desc="tokenizing"
    )
    tokenized.save_to_disk(output)


if __name__ == "__main__":
    main()
