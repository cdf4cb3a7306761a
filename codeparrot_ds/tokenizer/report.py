"""Report how well one or several tokenizers fit documents; `tokenizer.measures` defines what is measured."""

import keyword
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tokenizers import Tokenizer

from codeparrot_ds.documents.document import BadDocument, Document
from codeparrot_ds.documents.inputs import search_inputs
from codeparrot_ds.documents.read import read_documents
from codeparrot_ds.documents.walk import count_reasons
from codeparrot_ds.errors import DataError
from codeparrot_ds.tokenizer.directory import TOKENIZER_FILE, has_tokenizer, load_tokenizer
from codeparrot_ds.tokenizer.kinds import KINDS, kinds_of
from codeparrot_ds.tokenizer.measures import Subject, Text

_BATCH_CHARACTERS = 1 << 20
_SHOWN = 12  # tokens of each list
_SHOWN_CHARACTERS = 40  # of a token
_NAMED = 3  # documents named in the table; the JSON names all
_PYTHON_SUFFIXES = (".py", ".pyi", ".pyw", "")
_PLACE = re.compile(r"#\d+$")  # of a row without a path


@dataclass(frozen=True)
class Report:
    """What tokenizers make of documents.

    Attributes:
        inputs: as given.
        documents: number of documents that were read, are divided into kinds of text, and are not.
        not_divided: name and reason of each Python file that Python cannot tokenize.
        unreadable: place and reason of each document that could not be read.
        skipped_files: number of input files that were not read, by reason.
        subjects: the tokenizers; the others are compared with the first.
    """

    inputs: list[str]
    documents: dict[str, int]
    not_divided: dict[str, str]
    unreadable: dict[str, str]
    skipped_files: dict[str, int]
    subjects: list[Subject]

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        first = self.subjects[0].counts()
        whole = first.as_json()
        return {
            "inputs": self.inputs,
            "documents": self.documents,
            "not_divided": self.not_divided,
            "unreadable": self.unreadable,
            "skipped_files": self.skipped_files,
            **{name: whole[name] for name in ("characters", "bytes", "words")},
            "tokenizers": [_measures(subject, first.tokens) for subject in self.subjects],
        }

    @property
    def labels(self) -> list[str]:
        """A short name of each tokenizer, by which they differ."""
        return [_label(subject.name, self.subjects) for subject in self.subjects]

    def rows(self) -> list[tuple[str, list[str]]]:
        """Name and values of each measure, one value a tokenizer."""
        return _rows(self.as_json())

    def rows_of_kinds(self) -> dict[str, list[tuple[str, list[str]]]]:
        """The same by kind of text."""
        found = self.as_json()
        return {kind: _rows_of_kind(found, kind) for kind in KINDS}

    def table(self) -> list[str]:
        """The lines of a table with a column for each tokenizer, and of lists below it."""
        found = self.as_json()
        rows = [("", self.labels), *_rows(found)]
        rows += [(f"{kind}: {name}", values) for kind in KINDS for name, values in _rows_of_kind(found, kind)]
        widths = [max(len(row[1][i]) for row in rows) for i in range(len(self.subjects))]
        width = max(len(name) for name, _ in rows)
        counts = ", ".join(f"{count:,} {what}" for what, count in self.documents.items() if count or what == "read")
        lines = [f"documents: {counts}; {found['characters']:,} characters, {found['words']:,} words"]
        for name, values in rows:
            cells = "  ".join(f"{value:>{size}}" for value, size in zip(values, widths, strict=True))
            lines.append(f"  {name:<{width}}  {cells}".rstrip())
        for subject, each in zip(self.subjects, found["tokenizers"], strict=True):
            lines += _lists(_label(subject.name, self.subjects), each)
        for what, named in (("not divided into kinds", self.not_divided), ("not read", self.unreadable)):
            lines += [f"{what}: {name} ({reason})" for name, reason in list(named.items())[:_NAMED]]
            if len(named) > _NAMED:
                lines.append(f"{what}: {len(named) - _NAMED:,} more, all in --json")
        lines += [f"files not read: {count:,} {reason}" for reason, count in self.skipped_files.items()]
        return lines


def report(
    tokenizer: str | Path,
    inputs: Sequence[str],
    against: Sequence[str | Path] = (),
    *,
    text_field: str = "content",
    suffix: str | None = None,
) -> Report:
    """Encode documents with one or several tokenizers and count.

    Args:
        tokenizer: a directory, or the name of a model on the Hub.
        inputs: what `documents.inputs.find_inputs` takes.
        against: other tokenizers.
        text_field: field of a row that holds the content.
        suffix: read files with this suffix in the input directories, one document per file.

    Raises:
        DataError: a tokenizer cannot be loaded, or there is no document.
    """
    names = list(dict.fromkeys(map(str, (tokenizer, *against))))
    subjects = [Subject(name, load_any(name)) for name in names]
    found = search_inputs(list(inputs), suffix)
    documents: Counter[str] = Counter({"read": 0})
    not_divided: dict[str, str] = {}
    unreadable: dict[str, str] = {}

    def texts() -> Iterator[Text]:
        for piece in found.pieces:
            for read in read_documents(piece, text_field):
                if isinstance(read, BadDocument):
                    documents["not readable"] += read.documents
                    unreadable[read.where] = read.reason
                    continue
                documents["read"] += 1
                yield _divided(read, documents, not_divided)

    for batch in _batches(texts()):
        for subject in subjects:
            subject.add(batch)
    if not documents["read"]:
        raise DataError(f"{', '.join(inputs)}: contains no document. Name other input, or another --text-field.")
    return Report(list(inputs), dict(documents), not_divided, unreadable, dict(count_reasons(found.skipped)), subjects)


def load_any(name: str) -> Tokenizer:
    """The tokenizer of a directory, or of a model on the Hub as transformers loads it. Raises DataError."""
    if has_tokenizer(Path(name)):
        return load_tokenizer(Path(name))
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # many types, by what is missing or damaged
        raise DataError(
            f"{name}: transformers finds no tokenizer here or on the Hub ({str(error).splitlines()[0]}). Name a "
            f"directory with {TOKENIZER_FILE}, or a model on the Hub."
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"{name}: a tokenizer in Python ({type(loaded).__name__}), which has no {TOKENIZER_FILE}.")
    return backend


def _divided(document: Document, documents: Counter[str], not_divided: dict[str, str]) -> Text:
    """The text of a document, divided into kinds if it is Python."""
    name = f"{document.repository} {document.path}".strip()
    if PurePosixPath(_PLACE.sub("", document.path)).suffix.lower() not in _PYTHON_SUFFIXES and not _PLACE.search(
        document.path
    ):
        documents["of other languages"] += 1
        return Text.of(name, document.text)
    try:
        divided = Text.of(name, document.text, kinds_of(document.text))
    except ValueError as error:
        documents["not divided into kinds"] += 1
        not_divided[name] = str(error)
        return Text.of(name, document.text)
    documents["divided into kinds"] += 1
    return divided


def _batches(texts: Iterator[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _measures(subject: Subject, tokens_of_first: int) -> dict[str, Any]:
    """Everything measured of one tokenizer."""
    counts, learned, unused = subject.counts(), subject.learned(), subject.unused()
    keywords = {
        word: {"bare": subject.tokens_of(word), "after_blank": subject.tokens_of(f" {word}")} for word in keyword.kwlist
    }
    return {
        "name": subject.name,
        "vocab_size": len(subject.vocabulary),
        **counts.as_json(),
        "relative_tokens": counts.tokens / tokens_of_first if tokens_of_first else None,
        "by_kind": {kind: subject.counts(kind).as_json() for kind in KINDS},
        "keywords": keywords,
        "single_keywords": {
            place: sum(each[place] == 1 for each in keywords.values()) for place in ("bare", "after_blank")
        },
        "round_trip": {"equal": subject.texts - len(subject.different), "different": subject.different},
        "first_tokens": [subject.vocabulary[number] for number in learned[:_SHOWN]],
        "last_tokens": [subject.vocabulary[number] for number in learned[-_SHOWN:]],
        "longest_tokens": [subject.vocabulary[number] for number in subject.longest()[:_SHOWN]],
        "unused_tokens": {"count": len(unused), "tokens": {str(n): subject.vocabulary[n] for n in unused}},
    }


_ROWS = {
    "tokens in the vocabulary": lambda each: each["vocab_size"],
    "  never used": lambda each: each["unused_tokens"]["count"],
    "tokens": lambda each: each["tokens"],
    "  relative to the first": lambda each: each["relative_tokens"],
    "characters per token": lambda each: each["characters_per_token"],
    "bytes per token": lambda each: each["bytes_per_token"],
    "fertility (tokens per word)": lambda each: each["fertility"],
    "continued words (share)": lambda each: each["continued_words"],
    "coverage (share of characters)": lambda each: each["coverage"],
    f"of {len(keyword.kwlist)} keywords, single tokens": lambda each: each["single_keywords"]["bare"],
    "  after a blank": lambda each: each["single_keywords"]["after_blank"],
    "documents that round-trip": lambda each: each["round_trip"]["equal"],
}


def _rows(found: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [(name, [_shown(pick(each)) for each in found["tokenizers"]]) for name, pick in _ROWS.items()]


def _rows_of_kind(found: dict[str, Any], kind: str) -> list[tuple[str, list[str]]]:
    rows = [("share of the tokens", [_shown(_kind_share(each, kind)) for each in found["tokenizers"]])]
    for name in ("characters_per_token", "fertility"):
        values = [_shown(each["by_kind"][kind][name]) for each in found["tokenizers"]]
        rows.append((name.replace("_", " "), values))
    return rows


def _kind_share(measured: dict[str, Any], kind: str) -> float | None:
    return measured["by_kind"][kind]["tokens"] / measured["tokens"] if measured["tokens"] else None


def _shown(value: int | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _label(name: str, subjects: Sequence[Subject]) -> str:
    """The last part of a tokenizer's name, or all of it if the parts are equal."""
    last = [PurePosixPath(subject.name).name for subject in subjects]
    own = PurePosixPath(name).name
    return own if own and last.count(own) == 1 else name


def _lists(label: str, measured: dict[str, Any]) -> list[str]:
    lines = [f"{label}:"]
    lines += [
        f"  {name.replace('_', ' ')}: {_quoted(measured[name])}"
        for name in ("first_tokens", "last_tokens", "longest_tokens")
    ]
    for place, where in (("bare", ""), ("after_blank", " after a blank")):
        several = [word for word, counts in measured["keywords"].items() if counts[place] != 1]
        lines.append(f"  keywords that are no single tokens{where}: {', '.join(several) or 'none'}")
    unused = list(measured["unused_tokens"]["tokens"].values())
    lines.append(f"  never used: {_quoted(unused[:_SHOWN])}{', ...' if len(unused) > _SHOWN else ''}")
    if different := measured["round_trip"]["different"]:
        more = f" and {len(different) - _NAMED:,} more" if len(different) > _NAMED else ""
        lines.append(f"  documents that do not round-trip: {', '.join(different[:_NAMED])}{more}")
    return lines


def _quoted(tokens: Sequence[str]) -> str:
    short = (token if len(token) <= _SHOWN_CHARACTERS else f"{token[:_SHOWN_CHARACTERS]}..." for token in tokens)
    return ", ".join(map(ascii, short)) or "none"
