"""Prove that the fast encoder gives the ids of `tokenizers` for the tokenizer at hand, before it is used.

What a fast encoder gets wrong is rare in ordinary text: Unicode classes of a newer or older standard, white space
other than a blank, contractions behind letters of other scripts, very long words, buffers that end in mid-character.
So the proof asks for just that: every code point where its class decides the result, all short combinations of
kinds of character, every token of the vocabulary, runs of many lengths, and real documents. It is done once for a
tokenizer, both libraries' versions and a kind of CPU, and its outcome is kept in the user's cache directory.
"""

import itertools
import os
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.errors import ConfigError, DataError, UserError
from codeparrot_ds.system.files import dump_json, read_json
from codeparrot_ds.system.jobs import say
from codeparrot_ds.system.storage import LocalDirectory
from codeparrot_ds.tokenizer.encode import Encoder, FastEncoder, cpu_digest, fast_label
from codeparrot_ds.tokenizer.train import EOS_TOKEN

PROOF_VERSION = 1  # raise it when the proof asks for more: kept outcomes are then void
_CHUNK_CHARACTERS = 1 << 15  # encoded at a time, so that memory stays small
_CODE_POINTS_A_TEXT = 64
# One of each kind of character that a pre-tokenizer may tell from the others.
_KINDS = ["a", "Z", "7", " ", "\n", "\t", "'", "s", ".", "_", "é", "中", "٣", "\u00a0", "\u0301", "🦜", "\r"]


class InexactError(Exception):
    """The fast encoder's ids differ from the referee's."""


def choose_encoder(directory: Path, referee: Encoder, wanted: str, sample: Iterable[str]) -> str:
    """The encoder to use, "fastokens" or "tokenizers"; says on standard error when the slow one has to do.

    Args:
        directory: of the tokenizer.
        referee: of the same tokenizer.
        wanted: "auto", or one of the two by name.
        sample: real documents for the proof, not looked at when its outcome is known.

    Raises:
        ConfigError: an unknown name, or "fastokens" was asked for and may not be used.
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
        f"note: encoding with tokenizers, which makes the whole build take some 25 times the CPU time "
        f"(docs/benchmarks.md), for {reason}."
    )
    return "tokenizers"


def _why_not_fast(directory: Path, referee: Encoder, sample: Iterable[str]) -> str | None:
    """Why fastokens may not be used for this tokenizer, or None. Proves it where that is not known yet."""
    try:
        import fastokens  # noqa: F401 (a proof may be another host's, on a home that they share)

        if (known := known_outcome(referee)) is not None:  # this version has loaded this tokenizer before
            return known["difference"]
        fast = FastEncoder(directory)
    except ImportError:
        return "fastokens is not installed (pip install fastokens)"
    except Exception as error:  # the library's words for a tokenizer that it does not know
        return f"fastokens cannot load it ({error})"
    start = time.monotonic()
    checked, difference = {}, None
    try:
        checked = prove(fast, referee, sample)
    except InexactError as found:
        difference = str(found)
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError | OSError | UserError):
            raise
        difference = f"fastokens failed in the proof ({type(error).__name__}: {error})"
    record_proof(referee, difference, checked)
    say(
        f"proved fastokens against tokenizers on this tokenizer in {time.monotonic() - start:.1f} s: "
        + ("equal" if difference is None else difference)
    )
    return difference


def known_outcome(referee: Encoder) -> dict[str, Any] | None:
    """The outcome of an earlier proof, {"difference": None or how the ids differ}; None when there is none."""
    path = proof_file(referee)
    try:
        outcome = read_json(path, "proof") if path.exists() else None
    except DataError:
        return None  # torn: prove again
    if isinstance(outcome, dict) and isinstance(outcome.get("difference", 0), str | None):
        return outcome
    return None


def proof_file(referee: Encoder) -> Path:
    """Where the outcome for this tokenizer, these versions and this kind of CPU is kept."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in containers
        cache = Path(tempfile.gettempdir())
    versions = f"{fast_label()} {referee.label}".replace(" ", "-")
    return cache / "codeparrot-ds" / "proofs" / f"{PROOF_VERSION}-{referee.digest}-{versions}-{cpu_digest()}.json"


def record_proof(referee: Encoder, difference: str | None, checked: dict[str, Any]) -> None:
    """Keep an outcome: `difference` says how the ids differ, None that they do not."""
    path = proof_file(referee)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        LocalDirectory(path.parent).write(path.name, dump_json({"difference": difference, "checked": checked}))
    except OSError as error:
        say(f"note: {path} cannot be written ({error.strerror}): the proof will be made again next time.")


def prove(fast: FastEncoder, referee: Encoder, sample: Iterable[str]) -> dict[str, int]:
    """Compare the encoders on all code points, the hard cases and `sample`; return how many characters of each.

    Raises InexactError, naming the text that they disagree on.
    """
    checked: dict[str, int] = {}
    for what, texts in (("code points", code_points()), ("hard cases", hard_cases(referee)), ("documents", sample)):
        checked[what] = 0
        for chunk in _chunks(texts):
            compare(fast, referee, chunk, what)
            checked[what] += sum(map(len, chunk))
    return checked


def compare(fast: FastEncoder, referee: Encoder, texts: Sequence[str], what: str) -> None:
    """Raise InexactError, with the text, unless both encoders give the same ids for all `texts`."""
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
    raise InexactError(f"fastokens differs from tokenizers on a batch of texts ({what}), but on none of them alone")


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


def code_points() -> Iterator[str]:
    """Every code point but the surrogates where its class shows in the ids.

    Two blanks before it tell white space from the rest; "'s" behind it tells letters and digits, and before it
    stands the apostrophe that a contraction or a run of punctuation would take along. The 145,000 that Unicode has
    assigned also stand beside letters, digits and line ends.
    """
    yield from _grouped(range(0x110000), "  {0}'s'{0}")
    assigned = [c for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]
    yield from _grouped(assigned, " {0}a{0}1{0}\n{0} {0}={0}'S{0}{0}")


def _grouped(code_points: Iterable[int], pattern: str) -> Iterator[str]:
    texts = (pattern.format(chr(c)) for c in code_points if not 0xD800 <= c < 0xE000)
    while group := "".join(itertools.islice(texts, _CODE_POINTS_A_TEXT)):
        yield group


def hard_cases(referee: Encoder) -> Iterator[str]:
    """Texts on which encoders have been found to differ, crash or hang, and the neighbours of such texts."""
    for literal in (EOS_TOKEN, "<|endoftext|", "|endoftext|>", EOS_TOKEN.upper(), EOS_TOKEN * 3):
        yield from (literal, f" {literal} ", f"x = '{literal}'\n", f"a{literal}b", f"\n{literal}\n")
    for unit in (" ", "\n", "\t", "a", "A", "0", "'", "=", "_", "é", "中", "🦜", "\r\n", " \n", "ab", "'s"):
        yield unit * 10_000
        yield from (f"x{unit * n}y" for n in range(1, 140))  # beyond the widest vector register, 64 bytes, twice
    yield " " * 250_000
    yield from ("".join(kinds) for kinds in itertools.product(_KINDS, repeat=3))
    for a in map(chr, range(128)):
        yield "".join(f"{a}{chr(b)} " for b in range(128))
    for word in ("s", "t", "re", "ve", "m", "ll", "d", "\u017f", "\u212a"):
        for form in {word, word.upper(), word.title()}:
            yield from (
                f"{before}'{form}{after}" for before in ("a", "é", " ", "1", "'", "ǅ") for after in ("", "a", " ")
            )
    yield from ("e\u0301\u0327", "👩\u200d👩\u200d👧\u200d👦", "\u202eabc\u202c", "각", "각", "\ufeff", "\x00\x01", "ﷺ")
    tokens = referee.tokens()
    yield from ("".join(tokens[i : i + 64]) for i in range(0, len(tokens), 64))
    random = np.random.default_rng(0)  # tokens in any order: merges that ordinary text never calls for
    for row in random.integers(0, len(tokens), (256, 256)):
        yield "".join(tokens[i] for i in row)
    encoded = " ".join(_KINDS * 64)
    yield from (encoded[i:] for i in range(64))  # the same text at every offset
