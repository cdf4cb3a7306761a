"""Throughput of the searches of `corpus clean` in the text of documents: secrets, licences, decontamination.

Each search runs alone in this process, on the Python files below the directories, best of three rounds of CPU time.
Prints a table, the number of secrets found by kind with a sample of each to read, each document that contains a problem
with the problem and the common gram, and JSON.

Usage: python benchmarks/corpus.py [--sample N] [DIRECTORY ...]   (default: this interpreter's library and packages)
"""

import argparse
import json
import random
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from codeparrot_ds.corpus.decontamination import Problems
from codeparrot_ds.corpus.licences import identify
from codeparrot_ds.corpus.options import Decontamination, Secrets
from codeparrot_ds.corpus.secrets import find_secrets

_ROUNDS = 3
_MAX_FILE_BYTES = 1_000_000
_LICENCE_FILES = ("LICEN", "COPYING")


def read_texts(directories: Sequence[Path], wanted: Callable[[Path], bool]) -> dict[Path, str]:
    """Texts of the wanted files that are UTF-8 and not too large; copies are read once."""
    texts: dict[str, Path] = {}
    for file in sorted({file for directory in directories for file in directory.rglob("*") if wanted(file)}):
        if file.is_file() and 0 < file.stat().st_size <= _MAX_FILE_BYTES:
            try:
                texts.setdefault(file.read_text(encoding="utf-8"), file)
            except UnicodeDecodeError:
                continue
    return {file: text for text, file in texts.items()}


def measure(name: str, function: Callable[[str], object], texts: Sequence[str]) -> dict[str, object]:
    """Documents and megabytes per CPU-second."""
    function("")  # compile patterns, load problems
    seconds = []
    for _ in range(_ROUNDS):
        started = time.process_time()
        for text in texts:
            function(text)
        seconds.append(time.process_time() - started)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {
        "search": name,
        "documents": len(texts),
        "megabytes": round(megabytes, 1),
        "documents_per_cpu_second": round(len(texts) / min(seconds), 1),
        "megabytes_per_cpu_second": round(megabytes / min(seconds), 1),
    }


def sample_of(documents: dict[Path, str], rules: Secrets) -> dict[str, list[str]]:
    """All findings by kind with what is around them, in random order."""
    found: dict[str, list[str]] = {}
    for file, text in documents.items():
        for secret in find_secrets(text, rules):
            start = text.rfind("\n", 0, secret.start) + 1
            before, after = text[start : secret.start][-60:], text[secret.end :].partition("\n")[0][:30]
            value = text[secret.start : secret.end].replace("\n", " ")[:60]
            line = f"{file.name}:{text.count(chr(10), 0, secret.start) + 1}: {before}[{value}]{after}"
            found.setdefault(secret.kind, []).append(line)
    for lines in found.values():
        random.Random(0).shuffle(lines)
    return found


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directories", nargs="*", type=Path)
    parser.add_argument("--sample", type=int, default=5, help="secrets of each kind to print")
    options = parser.parse_args()
    default = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    directories = options.directories or default
    documents = read_texts(directories, lambda file: file.suffix == ".py")
    licences = read_texts(directories, lambda file: file.name.upper().startswith(_LICENCE_FILES))
    problems, rules = Problems.load(Decontamination()), Secrets()
    texts = list(documents.values())
    results = [
        measure("secrets", lambda text: find_secrets(text, rules), texts),
        measure("decontamination", problems.find, texts),
    ]
    # Not cached between rounds: each round sees new texts.
    number = iter(range(sys.maxsize))
    if licences:
        results.append(measure("licences", lambda text: identify(f"{text}\n{next(number)}"), list(licences.values())))
    print(f"{'search':16} {'documents':>9} {'MB':>7} {'documents / CPU-s':>18} {'MB / CPU-s':>11}")
    for row in results:
        print(
            f"{row['search']:16} {row['documents']:9,} {row['megabytes']:7,} "
            f"{row['documents_per_cpu_second']:18,} {row['megabytes_per_cpu_second']:11,}"
        )
    lines = sample_of(documents, rules)
    found = Counter({kind: len(listed) for kind, listed in lines.items()})
    for kind, count in found.most_common():
        print(f"secrets found: {count:,} {kind}")
        print("".join(f"  {ascii(line)[1:-1]}\n" for line in lines[kind][: options.sample]), end="")
    flagged = {str(file): match for file, text in documents.items() if (match := problems.find(text))}
    print(f"documents with a problem: {len(flagged)} ({len(flagged) / len(texts):.3%})")
    for file, match in flagged.items():
        print(f"  {file}: {match.task_id}: {match.gram}")
    print(json.dumps({"throughput": results, "secrets": found, "flagged": flagged}))


if __name__ == "__main__":
    main()
