"""The tasks of a build: what each reads, where its documents go, and the receipt that it leaves.

They follow from the list of input files and the options alone, so that slices and interrupted builds agree on them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import msgspec

from codeparrot_ds.documents.document import BadDocument
from codeparrot_ds.documents.fields import Fields
from codeparrot_ds.documents.inputs import Inputs, deal
from codeparrot_ds.documents.piece import Piece
from codeparrot_ds.documents.splits import split_of_digest
from codeparrot_ds.errors import DataError
from codeparrot_ds.shards.format import ShardInfo
from codeparrot_ds.system.files import digest_json
from codeparrot_ds.system.storage import Directory

BYTES_PER_TOKEN = 3  # of Python source; 3.5 with 8,192 tokens, more with larger vocabularies


class Share(msgspec.Struct, frozen=True):
    """What a task reads.

    Attributes:
        number: of the task, and of its shards.
        pieces: its input.
        only_valid: whether all its documents go to the validation split, instead of some by their content.
    """

    number: int
    pieces: list[Piece]
    only_valid: bool

    def split_of(self, digest: int, valid_fraction: float) -> str:
        """The split of a document, by the digest of its content."""
        return "valid" if self.only_valid else split_of_digest(digest, valid_fraction)


def plan(train: Sequence[Piece], valid: Sequence[Piece], shard_tokens: int) -> list[Share]:
    """Deal out the input: first what is split by content, then what is for validation alone."""
    size = shard_tokens * BYTES_PER_TOKEN
    dealt = [*((pieces, False) for pieces in deal(train, size)), *((pieces, True) for pieces in deal(valid, size))]
    return [Share(number, *share) for number, share in enumerate(dealt)]


def divide(found: Inputs, train_arguments: int) -> tuple[list[Piece], list[Piece]]:
    """The pieces of the first `train_arguments` arguments, and those of the others."""
    first = sum(found.counts[:train_arguments])
    return found.pieces[:first], found.pieces[first:]


class Job(msgspec.Struct, frozen=True):
    """Settings shared by all tasks of a build. `eos` is the end token as the user gave it, `eos_token` its name."""

    output: Directory
    tokenizer: Path
    tokenizer_digest: str
    eos: str | None
    eos_token: str
    fields: Fields
    valid_fraction: float
    skip_bad: bool
    encoder: str  # "fastokens" or "tokenizers"


class Task(msgspec.Struct, frozen=True):
    """A share of the input, and how to build shards of it."""

    share: Share
    job: Job

    @property
    def fingerprint(self) -> str:
        """Digest of what determines the output bytes, and of the input files' modification times.

        Not of `skip_bad`, which matters only if there is a bad document.
        """
        job = self.job
        pieces = [
            (p.name, p.repository, p.kind, p.size, p.start, p.stop, p.digest or p.stamp) for p in self.share.pieces
        ]
        valid = "all" if self.share.only_valid else job.valid_fraction
        fields = dataclasses.astuple(job.fields)
        return digest_json([pieces, job.tokenizer_digest, job.eos_token, fields, valid])

    @property
    def receipt(self) -> str:
        """Name of the file that records the task's output; removed once the manifest is written."""
        return f".task-{self.share.number:05d}.json"


class Receipt(msgspec.Struct):
    """What a finished task has written and counted."""

    fingerprint: str
    encoder: str  # label, including the version
    shards: list[ShardInfo]
    read: int
    empty: int
    quarantined: list[BadDocument]


def read_receipt(task: Task, labels: set[str]) -> Receipt | None:
    """The task's receipt; None if it is missing, for other inputs, or from an untrusted encoder.

    Also None if documents were skipped of which the first now ends the build.
    """
    output = task.job.output
    if not output.exists(task.receipt):
        return None
    try:
        receipt = msgspec.json.decode(output.read(task.receipt), type=Receipt)
    except (DataError, msgspec.DecodeError):
        return None
    if receipt.quarantined and not task.job.skip_bad:
        return None
    return receipt if receipt.fingerprint == task.fingerprint and receipt.encoder in labels else None
