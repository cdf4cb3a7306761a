"""What a cleaned corpus was made from, and what each step removed."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.corpus.files import step_of
from codeparrot_ds.documents.walk import REMOVED
from codeparrot_ds.errors import DataError
from codeparrot_ds.system.files import read_manifest

_LISTED = 5
_STEPS = ("read", "measure", "exact", "extremes")


@dataclass(frozen=True)
class Stats:
    """Statistics of a cleaned corpus.

    Attributes:
        read: documents that came in.
        kept: documents in the corpus.
        text_bytes: their text.
        removed: number of removed documents by reason.
        steps: the same by step: step -> reason -> number.
        examples: some removed documents by reason: repository and path, and the value that decided.
        duplicate_groups: of exact duplicates and of near-duplicates, see `groups.describe_groups`.
        sizes: of the documents that came in and of those kept, see `groups.describe_sizes`.
        read_by: what came in by licence, by language and by suffix, and the secrets found.
        kept_by: what was kept by licence, by language and by suffix.
    """

    read: int
    kept: int
    text_bytes: int
    removed: dict[str, int]
    steps: dict[str, dict[str, int]]
    examples: dict[str, list[str]]
    duplicate_groups: dict[str, Any]
    sizes: dict[str, dict[str, int]]
    read_by: dict[str, dict[str, int]]
    kept_by: dict[str, dict[str, int]]

    def as_json(self) -> dict[str, Any]:
        """All statistics as JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """The statistics as lines of a table; of long lists the largest numbers."""
        rows = [("read", f"{self.read:,}")]
        for step, reasons in self.steps.items():
            rows.append((f"removed in step {step}", f"{sum(reasons.values()):,}"))
            for reason, count in reasons.items():
                rows.append((f"  {reason}", f"{count:,}"))
                rows += [("", example) for example in self.examples.get(reason, [])]
        rows += [("kept", f"{self.kept:,}"), ("text", f"{self.text_bytes / 1e6:,.1f} MB")]
        for what, sizes in self.sizes.items():
            shown = ", ".join(f"{name} {size:,}" for name, size in sizes.items() if name not in ("documents", "bytes"))
            rows.append((f"bytes per document, {what}", shown or "none"))
        for what, groups in self.duplicate_groups.items():
            rows.append(
                (f"groups of {what} duplicates", f"{groups['groups']:,} with {groups['documents']:,} documents")
            )
            by_size = ", ".join(f"{count:,} of {size}" for size, count in groups["by_size"].items())
            rows += [("  by size", by_size)] if by_size else []
            rows += [("  largest", f"{each['size']:,}: {each['document']}") for each in groups["largest"]]
        for came, counted in (("read", self.read_by), ("kept", self.kept_by)):
            for what, counts in counted.items():
                shown_counts = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
                rows += [(f"{came}, by {what}", f"{name or 'none'}: {n:,}") for name, n in shown_counts[:_LISTED]]
                if others := sum(number for _, number in shown_counts[_LISTED:]):
                    rows.append(("", f"{len(shown_counts) - _LISTED:,} others: {others:,}"))
        return rows


def summarize(directory: Path, examples: int) -> Stats:
    """Read the statistics of a cleaned corpus, with up to `examples` documents per reason. Raises DataError."""
    manifest = read_manifest(directory, "corpus", "codeparrot-ds corpus clean")
    if "removed" not in manifest or not (directory / REMOVED).is_file():
        raise DataError(f"{directory}: this corpus was not made by `codeparrot-ds corpus clean`.")
    if "duplicate_groups" not in manifest:
        raise DataError(f"{directory}: an older version made this corpus, without statistics. Clean it again.")
    removed = manifest["removed"]
    steps: dict[str, dict[str, int]] = {step: {} for step in _STEPS}
    for reason, count in removed.items():
        steps[step_of(reason)][reason] = count
    return Stats(
        read=manifest["read"],
        kept=manifest["documents"],
        text_bytes=manifest["text_bytes"],
        removed=removed,
        steps={step: reasons for step, reasons in steps.items() if reasons},
        examples=_examples(directory / REMOVED, set(removed), examples),
        duplicate_groups=manifest["duplicate_groups"],
        sizes=manifest["sizes"],
        read_by=manifest["read_by"],
        kept_by=manifest["kept_by"],
    )


def _examples(path: Path, reasons: set[str], wanted: int) -> dict[str, list[str]]:
    """The first documents that were removed for each reason. Raises DataError for a damaged file."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    shown: dict[str, list[str]] = {reason: [] for reason in sorted(reasons)}
    open_reasons = reasons if wanted else set()
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches():
                if not open_reasons:
                    break
                for reason in sorted(open_reasons):
                    found = batch.filter(pc.equal(batch.column("reason"), reason))
                    rows = found.slice(0, wanted - len(shown[reason])).to_pylist()
                    shown[reason] += [_describe(row) for row in rows]
                open_reasons = {reason for reason in open_reasons if len(shown[reason]) < wanted}
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: damaged ({reason}). Copy it again, or run `codeparrot-ds corpus clean` again."
        ) from None
    return shown


def _describe(row: dict[str, str]) -> str:
    value = f" ({row['value']})" if row["value"] else ""
    return f"{row['repository']} {row['path']}{value}".strip()
