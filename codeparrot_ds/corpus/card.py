"""The dataset card of a corpus: it tells `datasets.load_dataset` and the Hub which files hold the documents."""

import re
from collections.abc import Mapping
from typing import Any

CARD = "README.md"
_SPLITS_SECTION = re.compile(r"\n## Splits\n.*?(?=\n## |\Z)", re.DOTALL)
DATA_FILES = "documents-*.jsonl.gz"
CONFIGS = [{"config_name": "default", "data_files": DATA_FILES}]
CORPUS_CARD = f"""---
configs:
- config_name: default
  data_files: {DATA_FILES}
---

# Source code corpus

One JSON object per document: `content`, and its origin in `repo_name`, `path`, `license`, `source`, `language` and
`commit`; `size` in bytes.
Exact duplicates are removed. `manifest.json` has the counts, and `rejected.jsonl` names each file that is not included.
Made by `codeparrot-ds corpus collect`.

```python
from datasets import load_dataset

documents = load_dataset("OWNER/NAME", split="train")  # or the path of this directory
```
"""


def complete_card(card: str) -> str:
    """`card` with `configs:` in its front matter: `CORPUS_CARD` if it is empty, the same text if it has them."""
    if not card.strip():
        return CORPUS_CARD
    from huggingface_hub import DatasetCard

    parsed = DatasetCard(card, ignore_metadata_errors=True)
    if parsed.data.get("configs"):
        return card
    parsed.data["configs"] = CONFIGS
    return str(parsed)


def split_card(card: str, manifest: Mapping[str, Any]) -> str:
    """`card` for a corpus that is split: `configs:` name the files of each split, and a section tells how it is split.

    Args:
        card: the card of the corpus; empty for the usual one. Everything else in it is kept.
        manifest: of the split corpus.
    """
    from huggingface_hub import DatasetCard

    parsed = DatasetCard(complete_card(card), ignore_metadata_errors=True)
    suffixes = manifest["files"][0]["name"].partition(".")[2]
    splits = [split for split, documents in manifest["splits"].items() if documents]
    files = [{"split": split, "path": f"{split}-*.{suffixes}"} for split in splits]
    parsed.data["configs"] = [{"config_name": "default", "data_files": files}]
    fraction = manifest["valid_fraction"]
    body = _SPLITS_SECTION.sub("", parsed.text).rstrip("\n")
    parsed.text = f"""{body}

## Splits

A document is in `validation` with a probability of {fraction:g}, by a digest of its content, so copies are in the same
split. `codeparrot-ds shards build --valid-fraction {fraction:g}` makes the same one.
"""
    return str(parsed)


def cleaned_card(file_format: str, manifest: Mapping[str, Any]) -> str:
    """The card of a cleaned corpus, with what each rule removed."""
    rows = "\n".join(f"| {reason} | {count:,} |" for reason, count in manifest["removed"].items())
    return f"""---
configs:
- config_name: default
  data_files: documents-*.{file_format}
---

# Source code corpus

One document per row: `content`, and its origin in `repo_name`, `path`, `license`, `source`, `language` and `commit`;
`size` in bytes.
{manifest["documents"]:,} of {manifest["read"]:,} documents were kept. Made by `codeparrot-ds corpus clean`.

| removed | documents |
|---|---|
{rows}

`rejected.parquet` names each removed document with the reason. `manifest.json` has the rules and the counts.

```python
from datasets import load_dataset

documents = load_dataset("OWNER/NAME", split="train")  # or the path of this directory
```
"""
