"""Verify, before the fast encoder is used, that it produces the same ids as `tokenizers` for the given tokenizer.

Fast encoders fail on inputs that are rare in ordinary text: Unicode classes of a newer or older standard, white space
other than a blank, contractions after letters of other scripts, very long words, buffers that end inside a character.
The proof covers exactly these: every code point where its class affects the result, all short combinations of character
kinds, every token of the vocabulary, runs of many lengths, what each component of the tokenizer treats in a special
way, and real documents. It runs once per tokenizer, library versions and CPU type, and its outcome is stored in the
user's cache directory.
"""

import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.errors import ConfigError, DataError, UserError
from codeparrot_ds.system.files import dump_json, read_json
from codeparrot_ds.system.jobs import say
from codeparrot_ds.system.storage import LocalDirectory
from codeparrot_ds.tokenizer.cases import code_points, component_cases, hard_cases, uncovered
from codeparrot_ds.tokenizer.encode import Encoder, FastEncoder, cpu_digest, fast_label

PROOF_VERSION = 2  # increment when the proof covers more, to invalidate stored outcomes
_CHUNK_CHARACTERS = 1 << 15  # encoded at a time, to limit memory


class InexactError(Exception):
    """The fast encoder's ids differ from the reference encoder's."""


def choose_encoder(directory: Path, referee: Encoder, wanted: str, sample: Iterable[str]) -> str:
    """Choose the encoder, "fastokens" or "tokenizers"; prints a note on stderr if "auto" selects the slow one.

    Args:
        directory: tokenizer directory.
        referee: reference encoder of the same tokenizer.
        wanted: "auto", "fastokens" or "tokenizers".
        sample: real documents for the proof; not read if its outcome is already known.

    Raises:
        ConfigError: unknown name, or "fastokens" was requested but cannot be used.
    """
    if wanted not in ("auto", "fastokens", "tokenizers"):
        raise ConfigError(f"encoder {wanted!r}: must be auto, fastokens or tokenizers.")
    if wanted == "tokenizers":
        return wanted
    reason = _why_not_fast(directory, referee, sample)
    if reason is None:
        return "fastokens"
    if wanted == "fastokens":
        raise ConfigError(f"{directory}: fastokens cannot be used for this tokenizer: {reason}. Use --encoder auto.")
    say(
        f"note: encoding with tokenizers, because {reason}. The whole build takes about 25 times the CPU time "
        "(docs/benchmarks.md)."
    )
    return "tokenizers"


def _why_not_fast(directory: Path, referee: Encoder, sample: Iterable[str]) -> str | None:
    """Why fastokens cannot be used for this tokenizer, or None. Runs the proof if its outcome is not known yet."""
    if (reason := uncovered(referee.parts)) is not None:
        return reason
    try:
        import fastokens  # noqa: F401 (the stored proof may come from another host with the same home directory)

        if (known := known_outcome(referee)) is not None:  # this version has loaded this tokenizer before
            return known["difference"]
        fast = FastEncoder(directory)
    except ImportError:
        return "fastokens is not installed (pip install fastokens)"
    except Exception as error:  # the library raises various exceptions for an unsupported tokenizer
        return f"fastokens cannot load it ({error})"
    start = time.monotonic()
    checked, difference = {}, None
    try:
        checked = prove(fast, referee, sample)
    except InexactError as found:
        difference = str(found)
    except BaseException as error:  # a Rust panic is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError | OSError | UserError):
            raise
        difference = f"fastokens failed during the proof ({type(error).__name__}: {error})"
    record_proof(referee, difference, checked)
    say(
        f"verified fastokens against tokenizers on this tokenizer in {time.monotonic() - start:.1f} s: "
        + ("equal" if difference is None else difference)
    )
    return difference


def known_outcome(referee: Encoder) -> dict[str, Any] | None:
    """The stored outcome of an earlier proof, {"difference": None or how the ids differ}; None if there is none."""
    path = proof_file(referee)
    try:
        outcome = read_json(path, "proof") if path.exists() else None
    except DataError:
        return None  # damaged file: run the proof again
    if isinstance(outcome, dict) and isinstance(outcome.get("difference", 0), str | None):
        return outcome
    return None


def proof_file(referee: Encoder) -> Path:
    """Path of the stored outcome for this tokenizer, these library versions and this CPU type."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home directory, as in some containers
        cache = Path(tempfile.gettempdir())
    versions = f"{fast_label()} {referee.label}".replace(" ", "-")
    return cache / "codeparrot-ds" / "proofs" / f"{PROOF_VERSION}-{referee.digest}-{versions}-{cpu_digest()}.json"


def record_proof(referee: Encoder, difference: str | None, checked: dict[str, Any]) -> None:
    """Store a proof's outcome.

    Args:
        referee: reference encoder of the tokenizer.
        difference: how the ids differ; None if they are equal.
        checked: number of characters compared, per category.
    """
    path = proof_file(referee)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        LocalDirectory(path.parent).write(path.name, dump_json({"difference": difference, "checked": checked}))
    except OSError as error:
        say(f"note: {path} cannot be written ({error.strerror}): the proof will run again next time.")


def prove(fast: FastEncoder, referee: Encoder, sample: Iterable[str]) -> dict[str, int]:
    """Compare the encoders on all code points, the hard cases, cases made from the tokenizer's parts, and `sample`.

    Returns:
        Number of characters compared, per category.

    Raises:
        InexactError: the encoders differ; the message quotes the text.
    """
    checked: dict[str, int] = {}
    cases = {"code points": code_points(), "hard cases": hard_cases(referee), "components": component_cases(referee)}
    for what, texts in (*cases.items(), ("documents", sample)):
        checked[what] = 0
        for chunk in _chunks(texts):
            require_equal_ids(fast, referee, chunk, what)
            checked[what] += sum(map(len, chunk))
    return checked


def require_equal_ids(fast: FastEncoder, referee: Encoder, texts: Sequence[str], what: str) -> None:
    """Raise InexactError, quoting the text, unless both encoders produce the same ids for all `texts`."""
    ids, ends = fast.encode_flat(texts)
    expected, expected_ends = referee.encode_flat(texts)
    if np.array_equal(ids, expected) and np.array_equal(ends, expected_ends):
        return
    for text in texts:
        found, right = fast.encode(text), referee.encode(text)
        if not np.array_equal(found, right):
            short = np.minimum(len(found), len(right))
            at = int(np.argmax(np.append(found[:short] != right[:short], True)))
            context = referee.decode(right[max(0, at - 4) : at + 4])
            raise InexactError(
                f"fastokens differs from tokenizers ({what}) at token {at} of a text of {len(text):,} characters, "
                f"near {ascii(context)[:120]}"
            )
    raise InexactError(f"fastokens differs from tokenizers on a batch of texts ({what}), but not on any single text")


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
