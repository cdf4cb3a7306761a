"""The dataset card of a corpus: it tells `datasets.load_dataset` and the Hub which files hold the documents."""

from collections.abc import Mapping
from typing import Any

CARD = "README.md"
DATA_FILES = "documents-*.jsonl.gz"
CONFIGS = [{"config_name": "default", "data_files": DATA_FILES}]
CORPUS_CARD = f"""---
configs:
- config_name: default
  data_files: {DATA_FILES}
---

# Source code corpus

One JSON object per document: `content`, and its origin in `repo_name`, `path`, `license` and `source`; `size` in bytes.
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


def cleaned_card(file_format: str, manifest: Mapping[str, Any]) -> str:
    """The card of a cleaned corpus, with what each rule removed."""
    rows = "\n".join(f"| {reason} | {count:,} |" for reason, count in manifest["removed"].items())
    return f"""---
configs:
- config_name: default
  data_files: documents-*.{file_format}
---

# Source code corpus

One document per row: `content`, and its origin in `repo_name`, `path`, `license` and `source`; `size` in bytes.
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
