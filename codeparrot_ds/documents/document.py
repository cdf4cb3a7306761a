"""Documents, bad documents, and the field names that public code corpora use for provenance."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import msgspec

from codeparrot_ds.system.files import digest_bytes

# Provenance field of a Document -> its names in corpora: ours and CodeParrot's first, then those of other code
# corpora (The Stack: max_stars_*; StarCoder data: repository_name, detected_licenses).
PROVENANCE_FIELDS: dict[str, tuple[str, ...]] = {
    "repository": ("repo_name", "repository", "repo", "max_stars_repo_name", "repository_name"),
    "path": ("path", "file_path", "max_stars_repo_path"),
    "licence": ("license", "licence", "licenses", "max_stars_repo_licenses", "detected_licenses"),
    "source": ("source",),
}

MAX_DOCUMENT_BYTES = 32_000_000  # of a line or a file; anything longer is a data dump, not source code
PROVENANCE_NAMES = [name for names in PROVENANCE_FIELDS.values() for name in names]
_ENDS = list(accumulate(map(len, PROVENANCE_FIELDS.values())))
# Indices of each field's names in PROVENANCE_NAMES.
_PLACES = [range(start, end) for start, end in pairwise([0, *_ENDS])]


class Document(msgspec.Struct, frozen=True, order=True, gc=False):
    """One source file with its provenance.

    Attributes:
        text: decoded content.
        repository: repository or package of the file, e.g. "numpy-2.4.6" or "owner/name".
        path: path inside the repository, with forward slashes.
        licence: SPDX identifier or the repository's own wording; empty if unknown.
        source: how the file was collected, e.g. "installed-python".
    """

    text: str
    repository: str
    path: str
    licence: str
    source: str

    def digest(self) -> str:
        """xxh3-128 of the content only, so that copies have equal digests regardless of provenance."""
        return digest_bytes(self.text.encode())

    def to_json(self) -> str:
        """Serialize as one JSON line with the field names of the CodeParrot dataset."""
        row = {
            "repo_name": self.repository,
            "path": self.path,
            "license": self.licence,
            "source": self.source,
            "size": len(self.text.encode()),
            "content": self.text,
        }
        return msgspec.json.encode(row).decode() + "\n"


class BadDocument(msgspec.Struct, frozen=True, omit_defaults=True):
    """Placeholder for a document that cannot be read, or for several consecutive ones.

    Attributes:
        where: file and line, byte or row.
        reason: what is wrong, as a clause of an error message.
        documents: how many documents it stands for; 1 if unknown.
    """

    where: str
    reason: str
    documents: int = 1


Read = Document | BadDocument


def document_from_table(row: Mapping[str, Any], text_field: str, where: str, number: str) -> Read:
    """Like `document_from_row`, with a limit on the document's size."""
    text = row.get(text_field)
    if isinstance(text, str) and len(text) > MAX_DOCUMENT_BYTES:
        return BadDocument(
            where, f"{len(text):,} characters; the limit for one document is {MAX_DOCUMENT_BYTES:,} bytes"
        )
    return document_from_row(row, text_field, where, number)


def document_from_row(row: Mapping[str, Any], text_field: str, where: str, number: str) -> Read:
    """Create a document from one row of a table, with provenance under any of the `PROVENANCE_FIELDS` names.

    Args:
        row: field name -> value.
        text_field: name of the field with the content.
        where: location for a BadDocument, e.g. "corpus/a.jsonl:7".
        number: path of the document if the row has none, e.g. "a.jsonl#7", so that every token is traceable.
    """
    if text_field not in row:
        names = ", ".join(repr(name) for name in list(row)[:20]) or "none"
        return BadDocument(where, f"no field {text_field!r} (its fields: {names}; select one with --text-field)")
    text = row[text_field]
    if not isinstance(text, str):
        return BadDocument(where, f"field {text_field!r} has type {type(text).__name__}, not text")
    provenance = [row.get(name) if name != text_field else None for name in PROVENANCE_NAMES]
    document = make_document(text, provenance, number)
    try:
        for string in (text, document.repository, document.path, document.licence, document.source):
            string.encode()
    except UnicodeEncodeError as error:
        return BadDocument(where, f"a lone surrogate is not a valid character (position {error.start} of a field)")
    return document


def make_document(text: str, provenance: Sequence[Any], place: str | None) -> Document:
    """Create a document from its text and provenance.

    Args:
        text: content.
        provenance: value of each of the `PROVENANCE_NAMES`, or None.
        place: path of the document if the provenance has none; None if unknown.

    Raises:
        ValueError: `place` is needed but unknown.
    """
    repository, path, licence, source = (_first(provenance, places) for places in _PLACES)
    if not path and place is None:
        raise ValueError("the document's path is unknown")
    return Document(text, repository, path or place or "", licence, source)


def _first(values: Sequence[Any], places: range) -> str:
    """The first non-empty value at the indices `places`, as text."""
    for place in places:
        if value := values[place]:
            if isinstance(value, str):
                return value
            return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return ""
