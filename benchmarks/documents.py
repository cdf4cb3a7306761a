"""Input of the preprocessing benchmark: part of a corpus, linked in the format that each pipeline expects."""

import gzip
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash


@dataclass(frozen=True)
class CorpusFile:
    """One `documents-*.jsonl.gz`.

    Attributes:
        text_bytes: UTF-8 bytes of all its `content` fields.
    """

    path: Path
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class Documents:
    """A corpus directory that our package can read: links to files, and a manifest."""

    directory: Path
    files: tuple[Path, ...]
    documents: int
    text_bytes: int


def choose_files(corpus: Path, text_mb: float) -> list[CorpusFile]:
    """Choose the first files of `corpus` that contain about `text_mb` MB of text, at least two."""
    chosen: list[CorpusFile] = []
    for path in sorted(corpus.glob("documents-*.jsonl.gz")):
        if len(chosen) >= 2 and sum(file.text_bytes for file in chosen) >= text_mb * 1e6:
            break
        with gzip.open(path) as lines:
            sizes = [len(json.loads(line)["content"].encode()) for line in lines]
        chosen.append(CorpusFile(path.resolve(), len(sizes), sum(sizes)))
    if len(chosen) < 2:
        sys.exit(f"{corpus}: {len(chosen)} files match documents-*.jsonl.gz; at least two are needed.")
    return chosen


def _link(source: Path, target: Path) -> None:
    """Create a hard link, or a copy across file systems; symbolic links to one file would count as one input."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def link_corpus(chosen: Sequence[CorpusFile], directory: Path, copies: int = 1) -> Documents:
    """Create `directory` with links to the files, each `copies` times under different names, and our manifest."""
    directory.mkdir(parents=True)
    links, entries = [], []
    for number, file in enumerate([*chosen] * copies):
        link = directory / f"documents-{number:05d}.jsonl.gz"
        _link(file.path, link)
        links.append(link)
        data = file.path.read_bytes()
        digest = xxhash.xxh3_128_hexdigest(data)
        entries.append({"name": link.name, "documents": file.documents, "bytes": len(data), "xxh3_128": digest})
    documents = Documents(
        directory,
        tuple(links),
        copies * sum(file.documents for file in chosen),
        copies * sum(file.text_bytes for file in chosen),
    )
    digests = json.dumps([entry["xxh3_128"] for entry in entries], separators=(",", ":"))
    original = chosen[0].path.with_name("manifest.json")
    manifest = {
        "format_version": json.loads(original.read_text())["format_version"] if original.exists() else 1,
        "kind": "corpus",
        "documents": documents.documents,
        "text_bytes": documents.text_bytes,
        "files": entries,
        "digest": xxhash.xxh3_128_hexdigest(digests.encode()),
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return documents


def unpack(documents: Documents, path: Path) -> Path:
    """Write all documents into one uncompressed file, for tools that read only that."""
    with open(path, "wb") as out:
        for file in documents.files:
            with gzip.open(file, "rb") as lines:
                shutil.copyfileobj(lines, out, 1 << 20)
    return path
