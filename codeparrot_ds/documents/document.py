"""Documents, bad documents, and documents made from the rows of tables."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import msgspec

from codeparrot_ds.documents.fields import (
    PROVENANCE_FIELDS,
    PROVENANCE_NAMES,
    Fields,
    as_text,
    look_up,
)
from codeparrot_ds.system.files import digest_bytes

MAX_DOCUMENT_BYTES = 32_000_000  # of a line or a file; anything longer is a data dump, not source code
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
        language: programming language; empty if unknown.
        commit: revision of the repository, in hex; empty if unknown.
    """

    text: str
    repository: str
    path: str
    licence: str
    source: str
    language: str = ""
    commit: str = ""

    def digest(self) -> str:
        """xxh3-128 of the content only, so that copies have equal digests regardless of provenance."""
        return digest_bytes(self.text.encode())

    def to_row(self) -> dict[str, Any]:
        """A row of a corpus: the field names of the CodeParrot dataset, and further provenance."""
        return {
            "repo_name": self.repository,
            "path": self.path,
            "license": self.licence,
            "source": self.source,
            "language": self.language,
            "commit": self.commit,
            "size": len(self.text.encode()),
            "content": self.text,
        }

    def to_json(self) -> str:
        """Serialize as one line of JSON."""
        return msgspec.json.encode(self.to_row()).decode() + "\n"


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


def document_from_table(row: Mapping[str, Any], fields: Fields, where: str, number: str) -> Read:
    """Like `document_from_row`, with a limit on the document's size."""
    try:
        text = look_up(row, fields.text, "text")
    except ValueError:
        text = None
    if isinstance(text, str) and len(text) > MAX_DOCUMENT_BYTES:
        return BadDocument(
            where, f"{len(text):,} characters; the limit for one document is {MAX_DOCUMENT_BYTES:,} bytes"
        )
    return document_from_row(row, fields, where, number)


def document_from_row(row: Mapping[str, Any], fields: Fields, where: str, number: str) -> Read:
    """Create a document from one row of a table.

    Args:
        row: field name -> value.
        fields: which of them hold the content and the provenance.
        where: location for a BadDocument, e.g. "corpus/a.jsonl:7".
        number: path of the document if the row has none, e.g. "a.jsonl#7", so that every token is traceable.
    """
    try:
        text = look_up(row, fields.text, "text")
        if not isinstance(text, str):
            return BadDocument(where, f"field {fields.text!r} has type {type(text).__name__}, not text")
        provenance = [row.get(name) if name != fields.text else None for name in PROVENANCE_NAMES]
        document = make_document(text, provenance, number)
        named = {attribute: as_text(look_up(row, field, attribute), field) for attribute, field in fields.named.items()}
    except ValueError as error:
        return BadDocument(where, str(error))
    if "path" in named:
        named["path"] = named["path"] or number
    document = msgspec.structs.replace(document, **named) if named else document
    try:
        for string in msgspec.structs.astuple(document):
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
    repository, path, licence, source, language, commit = (_first(provenance, places) for places in _PLACES)
    if not path and place is None:
        raise ValueError("the document's path is unknown")
    return Document(text, repository, path or place or "", licence, source, language, commit)


def _first(values: Sequence[Any], places: range) -> str:
    """The first value at the indices `places` that is neither empty nor an object, as text."""
    for place in places:
        if value := values[place]:
            if isinstance(value, str):
                return value
            if not isinstance(value, dict):
                return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return ""
