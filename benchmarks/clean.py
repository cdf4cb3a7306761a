"""`corpus clean` beside CodeParrot's own steps and datatrove, on the same documents: documents per CPU-second.

The documents are Python files of this machine, as they are, in a corpus of JSON Lines and gzip. Each pipeline reads it
and writes what it keeps, compressed; each is a whole command with start-up, and all of its processes count. In each
round every pipeline runs once, ours directly before the one that it is compared with. Ours runs with the default rules,
but without secrets and decontamination, which the others do not have; a last row has them as well.

- CodeParrot's steps are re-created from their description in `peers/codeparrot_clean.py`.
- datatrove removes near-duplicates only (`peers/datatrove_clean.py`), and is installed in an environment of its own.
- Characters per token need a tokenizer, of 32,768 tokens, trained on the documents. Ours is proved before it is timed,
  as in the first run with a tokenizer on any machine.

Usage: python benchmarks/clean.py [--megabytes 200] [--rounds 2] [--only ROW ...] [--environments DIRECTORY]
Needs: pip install datasketch
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from environments import environment, plain_env
from measure import measure

from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.documents.inputs import Corpus
from codeparrot_ds.tokenizer.train import train

DRIVERS = Path(__file__).resolve().parent / "peers"
DATATROVE = ("datatrove[io,processing]", "tokenizers", "orjson", "spacy")
OURS = """
import json, sys
from pathlib import Path
from codeparrot_ds.corpus.clean import CleanOptions, clean
from codeparrot_ds.corpus.options import Cleaning
source, output, rules, *tokenizers = sys.argv[1:]
options = CleanOptions(
    cleaning=Cleaning.model_validate_json(rules), workers=1, tokenizer=Path(tokenizers[0]) if tokenizers else None
)
print(json.dumps({"kept": clean([source], Path(output), options)["documents"]}))
"""
PLAIN = {"secrets": None, "decontamination": {"enabled": False}}


@dataclass(frozen=True)
class Row:
    """A comparison.

    Attributes:
        rules: what our configuration changes.
        tokenizer: whether characters per token are measured.
        peer: arguments of the peer's driver after the directories; None for ours alone.
        driver: file name of the peer.
    """

    rules: dict[str, object]
    tokenizer: bool = False
    peer: tuple[str, ...] | None = None
    driver: str = "codeparrot_clean.py"


ROWS = {
    "all": Row(PLAIN, peer=("all",)),
    "all-with-tokens": Row(PLAIN, tokenizer=True, peer=("all",)),
    "near-duplicates": Row(PLAIN | {"heuristics": None}, peer=("near-duplicates",)),
    "near-duplicates-datatrove": Row(PLAIN | {"heuristics": None}, peer=(), driver="datatrove_clean.py"),
    "all-with-secrets-and-problems": Row({}),
}


class Runs:
    """Runs pipelines on one corpus."""

    def __init__(self, work: Path, megabytes: float, rows: Sequence[Row], environments: Path) -> None:
        """Collect the corpus, and make what the rows need."""
        self._work, self.source, self._tokenizer = work, work / "corpus", work / "tokenizer"
        collect(self.source, [], installed_python=True, sample_bytes=int(megabytes * 1e6))
        self._python = {"codeparrot_clean.py": Path(sys.executable)}
        if any(row.driver == "datatrove_clean.py" for row in rows):
            self._python["datatrove_clean.py"] = environment(environments / "datatrove", DATATROVE).python
        if any(row.tokenizer for row in rows):
            train(self.source, self._tokenizer, 32_768)
            small = work / "small"
            collect(small, [], installed_python=True, sample_bytes=1_000_000)
            self._run(Path(sys.executable), "-c", OURS, small, work / "proof", json.dumps(PLAIN), self._tokenizer)

    def ours(self, row: Row) -> tuple[float, int]:
        """CPU-seconds and documents kept of our command."""
        return self._in_new_directory(Path(sys.executable), row, "-c", OURS, [json.dumps(row.rules)])

    def theirs(self, row: Row) -> tuple[float, int]:
        """CPU-seconds and documents kept of the peer's."""
        return self._in_new_directory(self._python[row.driver], row, DRIVERS / row.driver, "", list(row.peer or ()))

    def _in_new_directory(
        self, python: Path, row: Row, program: str | Path, code: str, more: list[str]
    ) -> tuple[float, int]:
        with tempfile.TemporaryDirectory(dir=self._work) as directory:
            given = [program, *([code] if code else []), self.source, Path(directory) / "out", *more]
            tokenizer = [self._tokenizer] if row.tokenizer else []
            return self._run(python, *given, *tokenizer, home=Path(directory))

    def _run(self, python: Path, *arguments: str | Path, home: Path | None = None) -> tuple[float, int]:
        variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if home is not None:
            variables["HF_HOME"] = str(home / "cache")  # `datasets` would reuse what an earlier round left
        if python == Path(sys.executable):
            variables["PYTHONPATH"] = str(DRIVERS.parent.parent)
        log = self._work / "log"
        spent = measure([python, *arguments], log, env=plain_env(**variables), interval_seconds=None)
        found = [line for line in log.read_text().splitlines() if line.startswith('{"kept"')]
        return spent.cpu_seconds, json.loads(found[-1])["kept"]


def describe(source: Path) -> tuple[int, str]:
    """Number of documents, and a sentence on their sizes."""
    sizes = sorted(len(document.text.encode()) for document in Corpus.open(source))
    mean = sum(sizes) / len(sizes)
    low, middle, high = (sizes[len(sizes) * share // 100] for share in (10, 50, 90))
    return len(sizes), (
        f"{len(sizes):,} documents, {sum(sizes) / 1e6:.1f} MB: mean {mean:,.0f} bytes, median {middle:,}, 10 % below "
        f"{low:,}, 10 % above {high:,}"
    )


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200.0, help="text of the corpus")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--environments", type=Path, help="directory to keep the environment of datatrove in")
    options = parser.parse_args()
    rows = {name: ROWS[name] for name in options.only}
    with tempfile.TemporaryDirectory() as work:
        runs = Runs(Path(work), options.megabytes, list(rows.values()), options.environments or Path(work))
        documents, described = describe(runs.source)
        print(described, flush=True)
        seconds: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        kept: dict[str, list[int]] = {}
        for number in range(1, options.rounds + 1):
            for name, row in rows.items():
                ours, our_kept = runs.ours(row)
                theirs, their_kept = runs.theirs(row) if row.peer is not None else (float("nan"), 0)
                seconds[name].append((ours, theirs))
                kept[name] = [our_kept, their_kept]
                print(f"round {number}: {name}: {ours:.2f} and {theirs:.2f} CPU-seconds", file=sys.stderr, flush=True)
    print(f"{'documents per CPU-second':32} {'ours':>9} {'peer':>9} {'ratio, range':>22}  kept by ours, by the peer")
    results = {}
    for name, pairs in seconds.items():
        ours, theirs = (documents / statistics.median(each) for each in zip(*pairs, strict=True))
        ratios = sorted(theirs / ours for ours, theirs in pairs)
        results[name] = {"ours": ours, "peer": theirs, "ratios": ratios, "kept": kept[name], "cpu_seconds": pairs}
        span = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        print(f"{name:32} {ours:9,.0f} {theirs:9,.0f} {span:>22}  {kept[name][0]:,}, {kept[name][1]:,}")
    print(json.dumps({"documents": described, "results": results}))


if __name__ == "__main__":
    main()
