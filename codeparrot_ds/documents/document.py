"""What a document is, what a bad one is, and under which field names the world keeps them."""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import msgspec

from codeparrot_ds.system.files import digest_bytes

# Provenance of a Document -> names under which corpora keep it: our own and CodeParrot's first, then other
# code corpora's (The Stack: max_stars_*; StarCoder data: repository_name, detected_licenses).
PROVENANCE_FIELDS: dict[str, tuple[str, ...]] = {
    "repository": ("repo_name", "repository", "repo", "max_stars_repo_name", "repository_name"),
    "path": ("path", "file_path", "max_stars_repo_path"),
    "licence": ("license", "licence", "licenses", "max_stars_repo_licenses", "detected_licenses"),
    "source": ("source",),
}

PROVENANCE_NAMES = [name for names in PROVENANCE_FIELDS.values() for name in names]
_ENDS = list(accumulate(map(len, PROVENANCE_FIELDS.values())))
_PLACES = [range(start, end) for start, end in pairwise([0, *_ENDS])]  # of each field's names in PROVENANCE_NAMES


class Document(msgspec.Struct, frozen=True, order=True, gc=False):
    """One source file with its provenance.

    Attributes:
        text: the decoded content.
        repository: where it comes from, e.g. "numpy-2.4.6" or "owner/name".
        path: its path inside the repository, with forward slashes.
        licence: SPDX identifier or the repository's own words; empty when unknown.
        source: how it reached the corpus, e.g. "installed-python".
    """

    text: str
    repository: str
    path: str
    licence: str
    source: str

    def digest(self) -> str:
        """xxh3-128 of the content alone: equal for copies, wherever they lie."""
        return digest_bytes(self.text.encode())

    def to_json(self) -> str:
        """One JSON line with the field names of the CodeParrot dataset."""
        row = {
            "repo_name": self.repository,
            "path": self.path,
            "license": self.licence,
            "source": self.source,
            "size": len(self.text.encode()),
            "content": self.text,
        }
        return json.dumps(row, ensure_ascii=False) + "\n"


class BadDocument(msgspec.Struct, frozen=True):
    """What stands where a document should: `where` names file and line, byte or row; `reason` is a clause."""

    where: str
    reason: str


def document_from_row(row: Mapping[str, Any], text_field: str, where: str, number: str) -> Document | BadDocument:
    """A document from one row of a table, under any of the `PROVENANCE_FIELDS`.

    Args:
        row: field name to value.
        text_field: of the content.
        where: goes into a BadDocument, e.g. "corpus/a.jsonl:7".
        number: the document's path where the row names none, e.g. "a.jsonl#7": every token leads back to a place.
    """
    if text_field not in row:
        names = ", ".join(repr(name) for name in list(row)[:20]) or "none"
        return BadDocument(where, f"no field {text_field!r} (its fields: {names}; name one with --text-field)")
    text = row[text_field]
    if not isinstance(text, str):
        return BadDocument(where, f"field {text_field!r} is of type {type(text).__name__}, not text")
    provenance = [row.get(name) if name != text_field else None for name in PROVENANCE_NAMES]
    document = make_document(text, provenance, number)
    try:
        for string in (text, document.repository, document.path, document.licence, document.source):
            string.encode()
    except UnicodeEncodeError as error:
        return BadDocument(where, f"a lone surrogate, which is no character (at position {error.start} of a field)")
    return document


def make_document(text: str, provenance: Sequence[Any], place: str | None) -> Document:
    """A document of `text` and the values, None where there is none, of the `PROVENANCE_NAMES`.

    `place` is its path where none of the values says one. Raises ValueError when that is needed and not known.
    """
    repository, path, licence, source = (_first(provenance, places) for places in _PLACES)
    if not path and place is None:
        raise ValueError("its place is not known")
    return Document(text, repository, path or place or "", licence, source)


def _first(values: Sequence[Any], places: range) -> str:
    """The first of these values that says something, as text."""
    for place in places:
        if value := values[place]:
            if isinstance(value, str):
                return value
            return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return ""
