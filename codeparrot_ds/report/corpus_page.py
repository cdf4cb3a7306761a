"""The page of a corpus: what came in, what each step removed, what is left."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from codeparrot_ds.corpus.stats import Stats, summarize
from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.inputs import search_inputs
from codeparrot_ds.documents.read import read_documents
from codeparrot_ds.errors import DataError, UserError
from codeparrot_ds.report.blocks import Bars, Block, Code, Facts, Figure, Page, Section, Table, Text
from codeparrot_ds.report.units import plain, size
from codeparrot_ds.run.changes import flatten
from codeparrot_ds.system.files import read_manifest

_LISTED = 15  # of a long list
_EXAMPLES = 3  # removed documents per reason, and kept documents
_CHARACTERS = 1500  # of a document
# What each step of `corpus clean` does, in order.
_STEPS = {
    "read": "while reading: secrets, licences, problems of evaluations",
    "measure": "by a heuristic",
    "exact": "exact duplicates",
    "extremes": "near-duplicates",
}


def read_corpus(directory: Path) -> tuple[dict[str, Any], Stats | None, str]:
    """The manifest of a corpus, its statistics if it was cleaned, and why there are none. Raises DataError."""
    manifest = read_manifest(directory, "corpus")
    try:
        return manifest, summarize(directory, _EXAMPLES), ""
    except DataError as error:
        return manifest, None, str(error) if "removed" in manifest else ""


def rows(manifest: Mapping[str, Any], stats: Stats | None) -> list[tuple[str, str]]:
    """The figures as lines of a table."""
    if stats is not None:
        return stats.rows()
    found = [(name.replace("_", " "), plain(manifest[name])) for name in _COUNTS if name in manifest]
    return found + [(f"not included: {reason}", f"{count:,}") for reason, count in manifest.get("skipped", {}).items()]


_COUNTS = ("documents", "repositories", "text_bytes", "without_commit")


def corpus_page(directory: Path, manifest: Mapping[str, Any], stats: Stats | None, missing: str) -> Page:
    """The page of a corpus of `corpus collect` or `corpus clean`."""
    return Page(
        title=directory.absolute().name,
        subject="corpus",
        summary="cleaned source code" if "removed" in manifest else "collected source code",
        figures=_figures(manifest),
        sections=(
            Section("What was removed", _removed(manifest, stats)),
            Section("What was not included", _skipped(manifest)),
            Section("Sizes", [] if stats is None else _sizes(stats)),
            Section("Licences", _by(manifest, stats, "licences")),
            Section("Languages", _by(manifest, stats, "languages") + _by(manifest, stats, "suffixes")),
            Section("Secrets", _by(manifest, stats, "secrets")),
            Section("Duplicates", [] if stats is None else _duplicates(stats)),
            Section("Examples", _examples(directory)),
            Section("How it was made", _made(manifest)),
            Section("What is not on this page", [Text(missing)] if missing else []),
        ),
    )


def _figures(manifest: Mapping[str, Any]) -> list[Figure]:
    documents, read = manifest.get("documents"), manifest.get("read")
    figures = []
    if isinstance(documents, int):
        share = f"{100 * documents / read:.1f} % of {read:,}" if isinstance(read, int) and read else ""
        figures.append(Figure("documents", f"{documents:,}", share))
    if isinstance(text := manifest.get("text_bytes"), int):
        figures.append(Figure("text", size(text), f"{text / documents:,.0f} bytes per document" if documents else ""))
    if isinstance(manifest.get("repositories"), int):
        figures.append(Figure("repositories", f"{manifest['repositories']:,}"))
    if isinstance(removed := manifest.get("removed"), dict):
        figures.append(Figure("removed", f"{sum(removed.values()):,}", f"for {len(removed)} reasons"))
    if isinstance(kinds := manifest.get("kept_by", {}).get("licences"), dict):
        figures.append(Figure("licences", f"{len([name for name in kinds if name]):,}", "kinds, as stated"))
    return figures


def _removed(manifest: Mapping[str, Any], stats: Stats | None) -> list[Block]:
    if stats is None:
        counts = manifest.get("removed")
        return [_bars("Removed, by reason", "reason", counts, manifest.get("read", 0))] if counts else []
    blocks: list[Block] = []
    for step, counts in stats.steps.items():
        caption = f"Removed {_STEPS.get(step, step)}: {sum(counts.values()):,} of {stats.read:,} documents"
        blocks.append(_bars(caption, "reason", counts, stats.read))
    examples = [[reason, name] for reason, names in stats.examples.items() for name in names]
    if examples:
        caption = f"Examples of removed documents, up to {_EXAMPLES} per reason; rejected.parquet names all"
        blocks.append(Table(["reason", "document"], examples, caption=caption, folded=True))
    return blocks


def _skipped(manifest: Mapping[str, Any]) -> list[Block]:
    counts = manifest.get("skipped") or manifest.get("skipped_files")
    if not counts:
        return []
    bars = _bars("Files, by reason", "reason", counts, sum(counts.values()))
    return [bars, Text("rejected.jsonl in the directory names each file.")]


def _sizes(stats: Stats) -> list[Block]:
    names = list(dict.fromkeys(name for sizes in stats.sizes.values() for name in sizes))
    rows = [
        [what, *(f"{sizes[name]:,}" if name in sizes else "-" for name in names)] for what, sizes in stats.sizes.items()
    ]
    caption = "Documents, bytes in all, and bytes per document"
    return [Table(["", *names], rows, frozenset(range(1, len(names) + 1)), caption)] if names else []


def _by(manifest: Mapping[str, Any], stats: Stats | None, what: str) -> list[Block]:
    found: list[Block] = []
    for label, counted in (("kept", "kept_by"), ("read", "read_by")):
        counts = (manifest.get(counted) or {}).get(what)
        if counts and (label == "kept" or what == "secrets"):
            total = manifest.get("documents" if label == "kept" else "read", 0)
            found.append(_bars(f"Documents {label}, by {_SINGULAR[what]}", _SINGULAR[what], counts, total))
    return found


_SINGULAR = {"licences": "licence", "languages": "language", "suffixes": "suffix", "secrets": "kind of secret"}


def _bars(caption: str, what: str, counts: Mapping[str, int], total: int) -> Bars:
    ordered = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    rest = ordered[_LISTED:]
    left_out = f"{len(rest):,} others: {sum(n for _, n in rest):,} documents; manifest.json lists them." if rest else ""
    return Bars(caption, (what, "documents"), ordered[:_LISTED], total, left_out)


def _duplicates(stats: Stats) -> list[Block]:
    rows = [
        [
            what,
            f"{groups['groups']:,}",
            f"{groups['documents']:,}",
            ", ".join(f"{n:,} of {s}" for s, n in groups["by_size"].items()),
        ]
        for what, groups in stats.duplicate_groups.items()
    ]
    largest = [
        [what, f"{each['size']:,}", each["document"]]
        for what, g in stats.duplicate_groups.items()
        for each in g["largest"]
    ]
    blocks: list[Block] = [Table(["duplicates", "groups", "documents", "groups by size"], rows, frozenset({1, 2}))]
    if largest:
        blocks.append(Table(["duplicates", "size", "document"], largest, frozenset({1}), "Largest groups", folded=True))
    return blocks


def _examples(directory: Path) -> list[Block]:
    """The first documents of the corpus."""
    try:
        pieces = search_inputs([str(directory)], None).pieces
        read = (each for piece in pieces for each in read_documents(piece, "content"))
        documents = list(islice((each for each in read if isinstance(each, Document)), _EXAMPLES))
    except (UserError, OSError) as error:
        return [Text(f"The documents cannot be read: {error}", warning=True)]
    blocks: list[Block] = []
    for document in documents:
        name = f"{document.repository} {document.path}".strip()
        more = f"\n… {len(document.text) - _CHARACTERS:,} more characters" if len(document.text) > _CHARACTERS else ""
        licence = f" ({document.licence})" if document.licence else ""
        blocks.append(Code(f"{name}{licence}", document.text[:_CHARACTERS] + more))
    return blocks


def _made(manifest: Mapping[str, Any]) -> list[Block]:
    options = [(key, plain(value)) for key, value in flatten(manifest.get("options", {})).items()]
    blocks: list[Block] = [Table(["option", "value"], options, caption="Options")]
    if versions := manifest.get("versions"):
        blocks.append(Facts([(str(name), str(version)) for name, version in versions.items()]))
    for key, caption in (("sources", "Input files"), ("files", "Files")):
        if listed := manifest.get(key):
            rows = [
                [str(each.get("name")), f"{each.get('bytes', 0):,}", str(each.get("xxh3_128", ""))] for each in listed
            ]
            shown = Table(
                ["file", "bytes", "xxh3-128"], rows[:100], frozenset({1}), f"{caption}: {len(rows):,}", folded=True
            )
            blocks.append(shown)
            if len(rows) > 100:
                blocks.append(Text(f"100 of {len(rows):,} are listed; manifest.json has all."))
    return blocks
