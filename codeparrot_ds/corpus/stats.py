"""What a cleaned corpus was made from, and what each rule removed."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.documents.walk import REMOVED
from codeparrot_ds.errors import DataError
from codeparrot_ds.system.files import read_manifest

_LARGEST = 5


@dataclass(frozen=True)
class Stats:
    """Statistics of a cleaned corpus.

    Attributes:
        read: documents that came in.
        kept: documents in the corpus.
        text_bytes: their text.
        removed: number of removed documents by reason.
        examples: some removed documents by reason: repository and path, and the value that decided.
        largest_groups: documents for which the most near-duplicates were removed, with their number.
        read_by: what came in by licence and by suffix, and the secrets found.
    """

    read: int
    kept: int
    text_bytes: int
    removed: dict[str, int]
    examples: dict[str, list[str]]
    largest_groups: dict[str, int]
    read_by: dict[str, dict[str, int]]

    def as_json(self) -> dict[str, Any]:
        """All statistics as JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """All statistics as lines of a table."""
        rows = [("read", f"{self.read:,}")]
        for reason, count in self.removed.items():
            rows.append((f"removed: {reason}", f"{count:,}"))
            rows += [("", example) for example in self.examples.get(reason, [])]
        rows += [("documents", f"{self.kept:,}"), ("text", f"{self.text_bytes / 1e6:,.1f} MB")]
        rows += [("near-duplicates of", f"{name}: {count:,}") for name, count in self.largest_groups.items()]
        for what, counts in self.read_by.items():
            shown = sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:_LARGEST]
            rows += [(f"read, by {what}", f"{name or 'none'}: {count:,}") for name, count in shown]
        return rows


def summarize(directory: Path, examples: int) -> Stats:
    """Read the statistics of a cleaned corpus, with up to `examples` documents per reason. Raises DataError."""
    manifest = read_manifest(directory, "corpus", "codeparrot-ds corpus clean")
    if "removed" not in manifest or not (directory / REMOVED).is_file():
        raise DataError(f"{directory}: this corpus was not made by `codeparrot-ds corpus clean`.")
    shown: dict[str, list[str]] = {}
    groups: Counter[str] = Counter()
    for row in _rejected(directory / REMOVED):
        listed = shown.setdefault(row["reason"], [])
        if len(listed) < examples:
            listed.append(f"{row['repository']} {row['path']} ({row['value']})".strip())
        if row["reason"] == "near-duplicate":
            groups[row["value"].partition(" ")[2]] += 1
    return Stats(
        read=manifest["read"],
        kept=manifest["documents"],
        text_bytes=manifest["text_bytes"],
        removed=manifest["removed"],
        examples=shown,
        largest_groups=dict(sorted(groups.items(), key=lambda each: (-each[1], each[0]))[:_LARGEST]),
        read_by=manifest["read_by"],
    )


def _rejected(path: Path) -> Iterator[dict[str, str]]:
    """The removed documents. Raises DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ("repository", "path", "reason", "value")
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: damaged ({reason}). Copy it again, or run `codeparrot-ds corpus clean` again."
        ) from None
