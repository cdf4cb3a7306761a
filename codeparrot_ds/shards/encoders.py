"""The encoder of a build and the reference encoder (referee) that checks it: chosen once, loaded once per process."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from codeparrot_ds.documents.excerpts import read_excerpts, some_pieces
from codeparrot_ds.documents.fields import Fields
from codeparrot_ds.documents.piece import Piece
from codeparrot_ds.errors import DataError
from codeparrot_ds.system.jobs import run_apart
from codeparrot_ds.tokenizer.cases import uncovered
from codeparrot_ds.tokenizer.encode import Encoder, FastEncoder, fast_label
from codeparrot_ds.tokenizer.proof import choose_encoder, known_outcome


def choose_with_sample(tokenizer: Path, referee: Encoder, wanted: str, pieces: Sequence[Piece], fields: Fields) -> str:
    """Like `proof.choose_encoder`, with a sample of the input documents.

    The proof, if needed, runs in a separate process, because it takes a few hundred megabytes for some seconds.
    """
    if known_outcome(referee) is not None or uncovered(referee.parts) is not None or wanted == "tokenizers":
        return choose_encoder(tokenizer, referee, wanted, [])
    sample = some_pieces([piece for piece in pieces if piece.kind != "hub"])
    return run_apart(_choose_apart, (tokenizer, wanted, sample, fields))


def _choose_apart(task: tuple[Path, str, list[Piece], Fields]) -> str:
    tokenizer, wanted, pieces, fields = task
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # a process of its own: the reference encoder may use all cores
    return choose_encoder(tokenizer, Encoder(tokenizer), wanted, read_excerpts(pieces, fields))


def trusted_labels(chosen: str, referee: Encoder) -> set[str]:
    """Encoder labels whose finished shards may be kept: the reference encoder's, and fastokens' unless ruled out."""
    if chosen == "tokenizers":
        return {referee.label}
    return {referee.label, fast_label()}


@lru_cache(maxsize=1)
def load_referee(tokenizer: Path, digest: str, eos: str | None = None) -> Encoder:
    """The reference encoder with the end token `eos`, loaded once per process. Raises DataError if it has changed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # parallelism comes from processes
    referee = Encoder(tokenizer, eos)
    if referee.digest != digest:
        raise DataError(f"{tokenizer}: the tokenizer differs on this host, or has changed. Copy it again.")
    return referee


@lru_cache(maxsize=1)
def _fast_encoder(tokenizer: Path, digest: str) -> FastEncoder:
    return FastEncoder(tokenizer)


def load_encoders(tokenizer: Path, digest: str, name: str, eos: str | None) -> tuple[Encoder, Encoder | FastEncoder]:
    """The reference encoder and the encoder `name`, loaded once per process. Raises DataError for another tokenizer."""
    referee = load_referee(tokenizer, digest, eos)
    return referee, _fast_encoder(tokenizer, digest) if name == "fastokens" else referee
