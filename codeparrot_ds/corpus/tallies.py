"""Counts of documents by licence, language and suffix."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from codeparrot_ds.documents.document import Document

OTHERS = "(others)"
_LISTED = 1000  # the most frequent values, so that a manifest stays small if every document has its own
_VALUE_CHARACTERS = 80


class Tallies:
    """Counts documents.

    Attributes:
        by: "licences", "languages" and "suffixes" -> value -> number of documents.
    """

    def __init__(self) -> None:
        """Nothing is counted."""
        self.by: dict[str, Counter[str]] = {"licences": Counter(), "languages": Counter(), "suffixes": Counter()}

    def count(self, document: Document) -> None:
        """Count a document."""
        self.by["licences"][document.licence[:_VALUE_CHARACTERS]] += 1
        self.by["languages"][document.language[:_VALUE_CHARACTERS]] += 1
        self.by["suffixes"][PurePosixPath(document.path).suffix[:_VALUE_CHARACTERS]] += 1


def add_up(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of counts, sorted by value. Of very many values the most frequent ones, and the number of `OTHERS`."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    frequent = dict(sorted(total.items(), key=lambda item: (-item[1], item[0]))[:_LISTED])
    others = total.total() - sum(frequent.values())
    return dict(sorted(frequent.items())) | ({OTHERS: others} if others else {})
