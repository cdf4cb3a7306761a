"""Tasks of `tokenizer train`: the content digests of the documents, from which a sample is chosen, and their words."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from codeparrot_ds.documents.document import BadDocument
from codeparrot_ds.documents.piece import Piece
from codeparrot_ds.documents.read import read_documents, require_document
from codeparrot_ds.errors import ConfigError
from codeparrot_ds.system.files import write_atomically
from codeparrot_ds.tokenizer.trainers import new_counter, trainer_label, use_one_thread

_BATCH_BYTES = 8 << 20  # of text that are counted at a time


class Bounds(msgspec.Struct, frozen=True):
    """A sample of a task's documents: those with a digest below `digest`, and `copies` of those with this digest.

    The digest is the first 64 bits of the content's xxh3-128. Equal digests are of equal content, so that the words of
    a sample are independent of the order of the documents.
    """

    digest: int = 1 << 64
    copies: int = 0


class Task(msgspec.Struct, frozen=True):
    """Pieces of input, and where the result goes.

    Attributes:
        output: its path without suffix.
        most: of the digests, keep this many, the smallest; None keeps all.
        bounds: the documents to count.
        trainer: label of the trainer whose counters are merged.
    """

    pieces: list[Piece]
    text_field: str
    skip_bad: bool
    output: Path
    most: int | None = None
    bounds: Bounds = Bounds()
    trainer: str = ""

    @property
    def digests(self) -> Path:
        """File of the digests, [documents] uint64, and text sizes (bytes), [documents] int64, as one array."""
        return self.output.with_suffix(".digests.npy")

    @property
    def words(self) -> Path:
        """File of the words' counts."""
        return self.output.with_suffix(".words")

    @property
    def receipt(self) -> Path:
        """File of the counts of documents; it is written last."""
        return self.output.with_suffix(".json")


class Receipt(msgspec.Struct):
    """What came of a task's documents.

    Attributes:
        read: documents, empty and unreadable ones included.
        empty: without text.
        taken: in the sample.
        bytes: their text (UTF-8).
        quarantined: unreadable ones.
    """

    read: int = 0
    empty: int = 0
    taken: int = 0
    bytes: int = 0
    quarantined: list[BadDocument] = []


def write_digests(task: Task) -> None:
    """Write the digests and sizes of the documents with text, by digest; of more than `task.most`, the smallest."""
    kept = np.empty((2, 0), np.uint64)
    rows: list[tuple[int, int]] = []
    for _, encoded in _texts(task, Receipt()):
        rows.append((xxhash.xxh3_128_intdigest(encoded) >> 64, len(encoded)))
        if task.most is not None and len(rows) >= max(task.most, 1024):
            kept, rows = smallest([kept, _columns(rows)], task.most), []
    temporary = task.digests.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.save(file, smallest([kept, _columns(rows)], task.most))
    temporary.replace(task.digests)


def _columns(rows: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.array(rows, np.uint64).reshape(-1, 2).T


def smallest(parts: Sequence[np.ndarray], most: int | None) -> np.ndarray:
    """The columns of `parts`, each [2, n] uint64, with the `most` smallest digests (row 0), sorted."""
    joined = np.concatenate(parts, axis=1)
    return joined[:, np.argsort(joined[0], kind="stable")[:most]]


def write_words(task: Task) -> None:
    """Count the words of the task's sample, and write the counts, then the receipt."""
    use_one_thread()
    if trainer_label("ffbpe") != task.trainer:
        raise ConfigError(
            f"{os.uname().nodename}: has {trainer_label('ffbpe')}, but the words are counted with {task.trainer}. "
            f"Install the same version: pip install {task.trainer.replace(' ', '==')}"
        )
    counter, receipt = new_counter(), Receipt()
    counter.add_source(sampled_texts(task, receipt), prefetch=0, max_bytes=_BATCH_BYTES)
    temporary = task.words.with_suffix(".tmp")
    counter.save(str(temporary))
    temporary.replace(task.words)
    write_atomically(task.receipt, msgspec.json.encode(receipt))


def sampled_texts(task: Task, receipt: Receipt) -> Iterator[str]:
    """The texts of the task's sample; `receipt` counts them. Raises DataError for an unreadable one, unless skipped."""
    below, left = task.bounds.digest, task.bounds.copies
    everything = below >= 1 << 64
    for text, encoded in _texts(task, receipt):
        if not everything:
            digest = xxhash.xxh3_128_intdigest(encoded) >> 64
            if digest > below or (digest == below and left == 0):
                continue
            left -= digest == below
        receipt.taken += 1
        receipt.bytes += len(encoded)
        yield text


def _texts(task: Task, receipt: Receipt) -> Iterator[tuple[str, bytes]]:
    """Every text that is not empty, and its UTF-8."""
    for piece in task.pieces:
        for read in read_documents(piece, task.text_field):
            if isinstance(read, BadDocument):
                if not task.skip_bad:
                    require_document(read)
                receipt.read += read.documents
                receipt.quarantined.append(read)
                continue
            receipt.read += 1
            if read.text:
                yield read.text, read.text.encode()
            else:
                receipt.empty += 1
