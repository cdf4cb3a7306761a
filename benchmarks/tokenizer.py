"""`codeparrot-ds tokenizer train` beside the train_from_iterator of `tokenizers`, on the same documents.

The reference reads the documents with our reader and hands them to `tokenizers`, with its threads on all cores. Both
are timed as whole commands, alternating. Vocabulary, merges, and the ids of every fiftieth document are compared. The
peak memory with a sample of fixed size shows whether it grows with the input.

Text is this machine's Python files; if there are too few, they are used again with other names in them.

Usage: python benchmarks/tokenizer.py [--megabytes 100 400] [--vocab-size 32768] [--rounds 3] [--workers 2]
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from measure import Measurement, measure
from tokenizers import Tokenizer

from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.documents.inputs import Corpus, find_inputs
from codeparrot_ds.documents.read import read_documents, require_document
from codeparrot_ds.tokenizer.trainers import reserved_tokens, train_on_texts

SAMPLE = 2000  # documents of the run that measures memory
_NAME = re.compile(r"\b[a-z_]{4,}\b")


def texts(path: Path) -> Iterator[str]:
    """The texts of a JSON Lines file."""
    for piece in find_inputs([str(path)]):
        for read in read_documents(piece):
            yield require_document(read).text


def reference(path: Path, output: Path, vocab_size: int) -> None:
    """Train with `tokenizers` alone."""
    train_on_texts(texts(path), vocab_size, reserved_tokens(0)).save(str(output))


def write_text(corpus: Path, path: Path, megabytes: int) -> tuple[int, int]:
    """Write documents of so much text into a JSON Lines file. Returns their number, and how many are variations."""
    size = documents = varied = 0
    with open(path, "w") as out:
        for turn in count():
            for document in Corpus.open(corpus):
                if size >= megabytes * 1e6:
                    return documents, varied
                text = document.text
                if turn:
                    text = _varied(text, turn)
                    varied += 1
                out.write(json.dumps({"content": text, "path": f"{turn}/{document.path}"}) + "\n")
                size += len(text.encode())
                documents += 1
    raise AssertionError


def _varied(text: str, turn: int) -> str:
    """The text with a number behind a tenth of the names, as if from another project."""
    return _NAME.sub(lambda name: name[0] + str(turn) if sum(map(ord, name[0])) % 10 == 0 else name[0], text)


def same(ours: Path, theirs: Path, path: Path) -> dict[str, Any]:
    """Whether two tokenizer files have the same vocabulary and merges, and give the same ids."""
    found, right = (json.loads(each.read_text())["model"] for each in (ours, theirs))
    first, second = Tokenizer.from_file(str(ours)), Tokenizer.from_file(str(theirs))
    tokens = differing = 0
    for text in islice(texts(path), 0, None, 50):
        ids = first.encode(text).ids
        tokens += len(ids)
        differing += ids != second.encode(text).ids
    return {
        "same vocabulary": found["vocab"] == right["vocab"],
        "same merges": found["merges"] == right["merges"],
        "tokens compared": tokens,
        "documents whose ids differ": differing,
    }


def medians(runs: list[Measurement]) -> dict[str, float]:
    """Median wall and CPU time, and the peak memory."""
    return {
        "wall_seconds": round(statistics.median(run.wall_seconds for run in runs), 2),
        "cpu_seconds": round(statistics.median(run.cpu_seconds for run in runs), 2),
        "peak_mb": round(max(run.peak_pss_bytes for run in runs) / 1e6),
    }


def main() -> None:
    """Run the benchmark and print its results."""
    if sys.argv[1] == "reference":
        reference(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        collect(work / "corpus", [], installed_python=True)
        for megabytes in options.megabytes:
            path = work / f"{megabytes}.jsonl"
            documents, varied = write_text(work / "corpus", path, megabytes)
            command = [sys.executable, "-m", "codeparrot_ds.cli", "tokenizer", "train", path]
            command += ["--vocab-size", options.vocab_size, "--workers", options.workers]
            runs: dict[str, list[Measurement]] = {"ours": [], "tokenizers": []}
            for turn in range(options.rounds):
                output = work / f"{megabytes}-{turn}"
                runs["ours"].append(measure([*command, "-o", output], work / "log"))
                other = [sys.executable, __file__, "reference", path, work / "reference.json", options.vocab_size]
                runs["tokenizers"].append(measure(other, work / "log"))
            rows: dict[str, Any] = {name: medians(each) for name, each in runs.items()}
            for unit in ("wall", "cpu"):
                ratios = [
                    theirs / ours
                    for theirs, ours in zip(
                        *([getattr(run, f"{unit}_seconds") for run in runs[name]] for name in ("tokenizers", "ours")),
                        strict=True,
                    )
                ]
                rows[f"{unit} ratio"] = [round(ratio, 2) for ratio in sorted(ratios)]
            sampled = measure([*command, "-o", work / f"{megabytes}-sample", "--documents", SAMPLE], work / "log")
            rows[f"sample of {SAMPLE:,} documents"] = medians([sampled])
            rows |= same(work / f"{megabytes}-0" / "tokenizer.json", work / "reference.json", path)
            results[f"{megabytes} MB, {documents:,} documents ({varied:,} varied)"] = rows
            path.unlink()
    for name, rows in results.items():
        print(name)
        for what, row in rows.items():
            print(f"  {what:28} {json.dumps(row)}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
