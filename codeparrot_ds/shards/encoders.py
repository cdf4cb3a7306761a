"""The encoder of a build, and the referee that it is checked by: chosen once, loaded once in a process."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path

from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.read import Piece, read_documents
from codeparrot_ds.errors import DataError, UserError
from codeparrot_ds.system.jobs import run_apart
from codeparrot_ds.tokenizer.encode import Encoder, FastEncoder, fast_label
from codeparrot_ds.tokenizer.proof import choose_encoder, known_outcome

_SAMPLE_FILES, _SAMPLE_CHARACTERS = 8, 64_000  # of real documents in the proof, a file each


def choose_with_sample(tokenizer: Path, referee: Encoder, wanted: str, pieces: Sequence[Piece], text_field: str) -> str:
    """As `proof.choose_encoder`, with a sample of the documents at hand. The proof, if needed, is made in a process
    of its own: it takes a few hundred megabytes for some seconds."""
    if known_outcome(referee) is not None or wanted == "tokenizers":
        return choose_encoder(tokenizer, referee, wanted, [])
    files = [piece for piece in pieces if piece.kind != "hub"]
    sample = files[:: -(-len(files) // _SAMPLE_FILES) or 1]
    return run_apart(_choose_apart, (tokenizer, wanted, sample, text_field))


def _choose_apart(task: tuple[Path, str, list[Piece], str]) -> str:
    tokenizer, wanted, pieces, text_field = task
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # alone in its process: the referee may use all cores
    return choose_encoder(tokenizer, Encoder(tokenizer), wanted, _sample(pieces, text_field))


def _sample(pieces: Sequence[Piece], text_field: str) -> Iterator[str]:
    """Documents from the start of some files; what cannot be read is for the build to report."""
    for piece in pieces[:_SAMPLE_FILES]:
        characters = 0
        with suppress(UserError, OSError):
            for read in islice(read_documents(piece, text_field), 1000):
                if isinstance(read, Document):
                    yield read.text[:_SAMPLE_CHARACTERS]
                    characters += len(read.text)
                if characters > _SAMPLE_CHARACTERS:
                    break


def trusted_labels(chosen: str, referee: Encoder) -> set[str]:
    """Encoders whose finished shards may be kept: the referee's always, fastokens' while it has not been refuted."""
    if chosen == "tokenizers":
        return {referee.label}
    return {referee.label, fast_label()}


@lru_cache(maxsize=1)
def load_referee(tokenizer: Path, digest: str) -> Encoder:
    """The exact encoder, loaded once a process. Raises DataError for another tokenizer."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # parallel by processes
    referee = Encoder(tokenizer)
    if referee.digest != digest:
        raise DataError(f"{tokenizer}: the tokenizer is another one on this host, or has changed. Copy it again.")
    return referee


@lru_cache(maxsize=1)
def _encoder(tokenizer: Path, digest: str, name: str) -> Encoder | FastEncoder:
    return FastEncoder(tokenizer) if name == "fastokens" else load_referee(tokenizer, digest)


def load_encoders(tokenizer: Path, digest: str, name: str) -> tuple[Encoder, Encoder | FastEncoder]:
    """The referee and the encoder of this name, loaded once a process. Raises DataError for another tokenizer."""
    return load_referee(tokenizer, digest), _encoder(tokenizer, digest, name)
