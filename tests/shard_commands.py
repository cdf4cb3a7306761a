"""Runs `codeparrot-ds shards` as a user would, on a small corpus with a known number of tasks."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from codeparrot_ds.shards.tasks import BYTES_PER_TOKEN
from tests.conftest import ROOT

TIMEOUT = 120  # seconds
COMMAND = (sys.executable, "-m", "codeparrot_ds.cli", "shards")
Done = subprocess.CompletedProcess[str]
# Variables of schedulers, launchers and clouds, removed so that a test runs outside all of them.
_FOREIGN = re.compile(r"SLURM_|OMPI_|PMI_|RANK$|WORLD_SIZE$|TORCHELASTIC_|RAY_|AWS_|FSSPEC_")


def environment(**more: str) -> dict[str, str]:
    """This process's environment without variables of schedulers, clusters and clouds, plus `more`."""
    return {**{name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}, **more}


def shards(*arguments: str | Path, timeout: float = TIMEOUT, **more: str) -> Done:
    """Run a `codeparrot-ds shards` command to completion."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def error_of(done: Done) -> str:
    """Return the single error message of a failed command; fail if there is a traceback."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    return done.stderr.partition("error: ")[2].strip()


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, including hidden ones."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@dataclass(frozen=True)
class Corpus:
    """JSON Lines that are split into `tasks` tasks with these options."""

    inputs: list[Path]
    tokenizer: Path
    shard_tokens: int
    tasks: int = 8

    def command(self, output: Path | str, *options: str | Path, on_bad: str = "skip") -> list[str | Path]:
        """Arguments of `codeparrot-ds shards` to build it; `on_bad` is what to do with bad documents."""
        return [
            "build",
            *self.inputs,
            *("-o", output),
            *("--tokenizer", self.tokenizer),
            *("--shard-tokens", str(self.shard_tokens)),
            *("--valid-fraction", "0.2"),
            *("--on-bad-document", on_bad),
            *options,
        ]


def write_corpus(directory: Path, tokenizer: Path, documents: int, lines: int) -> Corpus:
    """Write a plain file that is split into seven tasks, with two bad lines, and a gzip file for the eighth.

    Args:
        directory: created by this function.
        tokenizer: tokenizer directory.
        documents: number in the plain file, from a seeded generator.
        lines: lines of Python per document.
    """
    directory.mkdir()
    source = Path(sysconfig.get_path("stdlib")) / "asyncio"
    known = [line for path in sorted(source.glob("*.py")) for line in path.read_text().splitlines(keepends=True)]
    generator = random.Random(0)

    def rows(name: str, count: int) -> list[str]:
        texts = ("".join(generator.choices(known, k=lines)) for _ in range(count))
        return [json.dumps({"content": text, "path": f"{name}/{n}.py"}) + "\n" for n, text in enumerate(texts)]

    plain, packed = directory / "plain.jsonl", directory / "packed.jsonl.gz"
    bad = ["no JSON\n", '{"path": "without content"}\n']
    plain.write_text("".join([*rows("a", documents // 2), *bad, *rows("b", documents - documents // 2)]))
    packed.write_bytes(gzip.compress("".join(rows("c", documents // 20)).encode(), mtime=0))
    return Corpus([plain, packed], tokenizer, plain.stat().st_size // (7 * BYTES_PER_TOKEN) + 1)
