"""First step of `corpus clean`: read a task's documents, and measure each of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from codeparrot_ds.corpus import heuristics
from codeparrot_ds.corpus.decontamination import Problems
from codeparrot_ds.corpus.licences import is_allowed
from codeparrot_ds.corpus.measured import EMPTY, Found, write_measured
from codeparrot_ds.corpus.near_duplicates import Signatures, concatenate, sign
from codeparrot_ds.corpus.options import Cleaning, Decontamination
from codeparrot_ds.corpus.secrets import find_secrets
from codeparrot_ds.corpus.tallies import Tallies
from codeparrot_ds.documents.document import BadDocument, Document
from codeparrot_ds.documents.fields import Fields
from codeparrot_ds.documents.piece import Piece
from codeparrot_ds.documents.read import read_documents, require_document
from codeparrot_ds.documents.source import is_python
from codeparrot_ds.tokenizer.encode import Encoder, FastEncoder

_BATCH_CHARACTERS = 1 << 22


class Task(msgspec.Struct, frozen=True):
    """A part of the input.

    Attributes:
        number: position among the tasks.
        pieces: what to read.
        fields: fields of a row that hold the content and the provenance.
        skip_bad: whether unreadable documents are counted and listed, instead of ending the task.
        cleaning: the rules, as JSON.
        tokenizer: directory of a tokenizer, or None.
        encoder: "fastokens" or "tokenizers".
        output: directory to create.
    """

    number: int
    pieces: list[Piece]
    fields: Fields
    skip_bad: bool
    cleaning: str
    tokenizer: Path | None
    encoder: str
    output: Path


def measure_task(task: Task) -> int:
    """Write the directory of a task, and return the task's number. Raises DataError."""
    rules = _rules(task.cleaning)
    found: list[Found] = []
    signatures: list[Signatures] = []
    if rules.near_duplicates is not None:
        signatures.append(sign([], rules.near_duplicates))  # the number of bands, also of a task without documents
    piece_ends: list[int] = []  # number of documents up to the end of each piece
    bad: list[BadDocument] = []
    secrets: Counter[str] = Counter()
    tallies = Tallies()
    for piece in task.pieces:
        for batch in _batches(read_documents(piece, task.fields), task.skip_bad, bad):
            measured = _measure(batch, rules, task, secrets)
            found += measured
            kept = [document.text for document, each in zip(batch, measured, strict=True) if not each.reason]
            if rules.near_duplicates is not None:
                signatures.append(sign(kept, rules.near_duplicates))
            for document in batch:
                tallies.count(document)
        piece_ends.append(len(found))
    info: dict[str, Any] = {
        "documents": len(found),
        "piece_ends": piece_ends,
        "bad": [[each.where, each.reason, each.documents] for each in bad],
        "secrets": dict(sorted(secrets.items())),
        **{what: dict(sorted(counts.items())) for what, counts in tallies.by.items()},
    }
    write_measured(task.output, found, concatenate(signatures), info)
    return task.number


def _batches(reads: Iterator[Any], skip_bad: bool, bad: list[BadDocument]) -> Iterator[list[Document]]:
    """Group documents, and move unreadable ones to `bad`."""
    batch: list[Document] = []
    characters = 0
    for read in reads:
        if isinstance(read, BadDocument) and skip_bad:
            bad.append(read)
            continue
        batch.append(require_document(read))
        characters += len(batch[-1].text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _measure(batch: Sequence[Document], rules: Cleaning, task: Task, secrets: Counter[str]) -> list[Found]:
    tokens: Sequence[int | None] = [None] * len(batch)
    if task.tokenizer is not None:
        _, ends = _encoder(task.tokenizer, task.encoder).encode_flat([document.text for document in batch])
        tokens = [int(end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    found = []
    for document, count in zip(batch, tokens, strict=True):
        encoded = document.text.encode()
        digest = xxhash.xxh3_128_digest(encoded)
        kinds = _secrets_in(document.text, rules)
        secrets.update(kinds)
        reason, value = _rule(document, digest, count, rules)
        if not reason and kinds and rules.secrets is not None and rules.secrets.mode == "drop":
            reason, value = "secrets", ", ".join(sorted(set(kinds)))
        bare_digest = heuristics.digest_without_space(document.text)
        place = (document.path, document.repository)
        found.append(Found(digest, bare_digest, len(encoded), *place, reason, value))
    return found


def _secrets_in(text: str, rules: Cleaning) -> list[str]:
    """The kinds of all secrets in a text."""
    return [] if rules.secrets is None else [each.kind for each in find_secrets(text, rules.secrets)]


def _rule(document: Document, digest: bytes, tokens: int | None, rules: Cleaning) -> tuple[str, str]:
    """The first rule that removes a document, and its value; empty to keep it."""
    if not document.text.strip():
        return EMPTY, ""
    if not is_allowed(document.licence, rules.licences):
        return "licence", document.licence[:80]
    if rules.heuristics is not None:
        found = heuristics.find_reason(
            heuristics.measure(document.text, rules.heuristics),
            rules.heuristics,
            digest,
            python=is_python(document.path, document.language),
            characters_per_token=None if tokens is None else len(document.text) / max(1, tokens),
        )
        if found is not None:
            return found[0], f"{found[1]:.6g}"
    if rules.decontamination.enabled and (match := _problems(rules.decontamination).find(document.text)):
        return "contains a problem", f"{match.task_id}: {match.gram}"
    return "", ""


@lru_cache(maxsize=1)
def _problems(rules: Decontamination) -> Problems:
    return Problems.load(rules)


@lru_cache(maxsize=1)
def _rules(cleaning: str) -> Cleaning:
    return Cleaning.model_validate_json(cleaning)


@lru_cache(maxsize=1)
def _encoder(tokenizer: Path, name: str) -> Encoder | FastEncoder:
    return FastEncoder(tokenizer) if name == "fastokens" else Encoder(tokenizer)
