"""Last step of `corpus clean`: the files of the cleaned corpus, and the list of what was removed."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

from codeparrot_ds.corpus.decisions import Decision, Decisions
from codeparrot_ds.corpus.measured import AllMeasured
from codeparrot_ds.corpus.options import Secrets
from codeparrot_ds.corpus.secrets import redact
from codeparrot_ds.corpus.tallies import Tallies
from codeparrot_ds.corpus.writers import open_writer
from codeparrot_ds.documents.document import BadDocument, Document
from codeparrot_ds.documents.fields import Fields
from codeparrot_ds.documents.piece import Piece
from codeparrot_ds.documents.read import read_documents
from codeparrot_ds.errors import DataError
from codeparrot_ds.system.files import digest_file, dump_json
from codeparrot_ds.system.storage import LocalDirectory

_UNREADABLE, _EXACT, _NEAR = "unreadable", "exact duplicate", "near-duplicate"
FORMATS = ("jsonl.zst", "parquet")


class FileTask(msgspec.Struct, frozen=True):
    """One file of the cleaned corpus: the kept documents from number `start` to `stop` - 1.

    Attributes:
        number: position among the files.
        start: number of a document over all tasks.
        stop: one past the last.
        pieces: of each task of the first step.
        measured: directory of each task of the first step.
        kept: file with the decision on each document, bool.
        redact: rules for secrets to replace, as JSON; "" for none.
        fields: fields of a row that hold the content and the provenance.
        output: file to create; its suffix selects the format.
        entry: file to create afterwards, with its entry in the manifest as JSON.
    """

    number: int
    start: int
    stop: int
    pieces: list[list[Piece]]
    measured: list[Path]
    kept: Path
    redact: str
    fields: Fields
    output: Path
    entry: Path


def plan_files(sizes: np.ndarray, kept: np.ndarray, file_bytes: int) -> list[tuple[int, int]]:
    """Ranges of documents for files of even size.

    Args:
        sizes: bytes of text of each document.
        kept: [documents] bool.
        file_bytes: maximum mean size of a file, of text.
    """
    ends = np.cumsum(np.where(kept, sizes, 0), dtype=np.int64)
    if not len(ends) or not ends[-1]:
        return []
    count = -(-int(ends[-1]) // file_bytes)
    bounds = np.searchsorted(ends, [int(ends[-1]) * i // count for i in range(1, count)], side="left") + 1
    edges = sorted({0, *bounds.tolist(), len(ends)})
    return [(start, stop) for start, stop in pairwise(edges) if kept[start:stop].any()]


def write_file(task: FileTask) -> int:
    """Write a file and its entry, and return its number.

    The entry is that of the manifest, with what was written by the attributes of `Tallies`.

    Raises DataError if the input has changed.
    """
    directory, name = LocalDirectory(task.output.parent), task.output.name
    written = Tallies()
    with directory.scratch() as scratch:
        path = scratch.path(name)
        with open_writer(path, name.partition(".")[2]) as writer:
            for document in _kept_documents(task):
                writer.append(document)
                written.count(document)
        facts = {"bytes": path.stat().st_size, "xxh3_128": digest_file(path)}
        directory.publish({name: path})
    counts = {"documents": writer.documents, "text_bytes": writer.text_bytes, "by": written.by}
    LocalDirectory(task.entry.parent).write(task.entry.name, dump_json({"name": name, **counts, **facts}))
    return task.number


def _kept_documents(task: FileTask) -> Iterator[Document]:
    kept = np.load(task.kept, mmap_mode="r")
    measured = AllMeasured(task.measured)
    first = int(np.searchsorted(measured.starts, task.start, side="right")) - 1
    for number in range(first, len(measured.parts)):
        offset = int(measured.starts[number])
        if offset >= task.stop:
            return
        part = measured.parts[number]
        digests = part.array("digest")
        piece_ends = part.info["piece_ends"]
        for piece, (start, stop) in zip(task.pieces[number], pairwise([0, *piece_ends]), strict=True):
            if offset + stop <= task.start or offset + start >= task.stop:
                continue
            rows = (read for read in read_documents(piece, task.fields) if not isinstance(read, BadDocument))
            for row, document in enumerate(rows, start=start):
                if row >= stop or offset + row >= task.stop:
                    break
                if offset + row >= task.start and kept[offset + row]:
                    expected = b"".join(int(half).to_bytes(8, "big") for half in digests[row])
                    if bytes.fromhex(document.digest()) != expected:
                        raise DataError(
                            f"{piece.name}: changed while it was being cleaned. Remove the output directory, and run "
                            "the command again."
                        )
                    yield _redacted(document, task.redact)


def _redacted(document: Document, rules: str) -> Document:
    if not rules:
        return document
    text, replaced = redact(document.text, Secrets.model_validate_json(rules))
    return msgspec.structs.replace(document, text=text) if replaced else document


def count_removed(measured: AllMeasured, decisions: Decisions) -> Counter[str]:
    """The number of removed documents by reason."""
    counts: Counter[str] = Counter()
    for part, start in zip(measured.parts, measured.starts.tolist(), strict=False):
        decided = decisions.decision[start : start + part.info["documents"]]
        counts[_EXACT] += int((decided == Decision.EXACT_DUPLICATE).sum())
        counts[_NEAR] += int((decided == Decision.NEAR_DUPLICATE).sum())
        reasons = part.names.column("reason").take(np.flatnonzero(decided == Decision.REMOVED_BY_RULE))
        counts.update(reasons.to_pylist())
        counts[_UNREADABLE] += sum(documents for _, _, documents in part.info["bad"])
    return +counts  # without zeros


def write_rejected(path: Path, measured: AllMeasured, decisions: Decisions) -> None:
    """Write the list of removed documents.

    Columns: `repository`, `path`, `reason`, `value` (what made the rule apply: a measure, or the document that is kept
    instead, after the Jaccard index), `step`, and `documents`: how many the row stands for, more than one only where
    part of a file is unreadable.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {**dict.fromkeys(("repository", "path", "reason", "value", "step"), pa.string()), "documents": pa.int64()}
    schema = pa.schema(columns.items())
    temporary = path.with_name(f".{path.name}.tmp")
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for part, start in zip(measured.parts, measured.starts.tolist(), strict=False):
            rows: list[dict[str, str | int]] = [
                _row("", where, _UNREADABLE, reason, documents) for where, reason, documents in part.info["bad"]
            ]
            removed = np.flatnonzero(decisions.decision[start : start + part.info["documents"]])
            for row, names in zip(removed.tolist(), part.names.take(removed).to_pylist(), strict=True):
                reason, value = _explain(measured, decisions, start + row, names)
                rows.append(_row(names["repository"], names["path"], reason, value))
            writer.write_table(pa.Table.from_pylist(rows, schema))
    temporary.replace(path)


def _row(repository: str, path: str, reason: str, value: str, documents: int = 1) -> dict[str, str | int]:
    place: dict[str, str | int] = {"repository": repository, "path": path}
    return place | {"reason": reason, "value": value, "step": step_of(reason), "documents": documents}


def _explain(measured: AllMeasured, decisions: Decisions, document: int, names: dict[str, str]) -> tuple[str, str]:
    """Reason and value of a removed document."""
    decision, instead = decisions.decision[document], int(decisions.instead[document])
    if decision == Decision.EXACT_DUPLICATE:
        reason, value = _EXACT, measured.name(instead)
    elif decision == Decision.NEAR_DUPLICATE:
        reason, value = _NEAR, f"{decisions.jaccard[document]:.4f} {measured.name(instead)}"
    else:
        reason, value = names["reason"], names["value"]
    return reason, value


def step_of(reason: str) -> str:
    """The step that removes documents for this reason."""
    return {_UNREADABLE: "read", _EXACT: "exact", _NEAR: "extremes"}.get(reason, "measure")
