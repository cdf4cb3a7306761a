"""Exact encoding of documents into token ids: `tokenizers` as the reference, and the much faster `fastokens`."""

import importlib.metadata
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from codeparrot_ds.errors import DataError
from codeparrot_ds.system.files import digest_bytes
from codeparrot_ds.system.jobs import threads
from codeparrot_ds.tokenizer.directory import (
    TOKENIZER_FILE,
    encoding_of,
    end_token,
    load_tokenizer,
    tokenizer_digest,
    tokenizer_json,
)
from codeparrot_ds.tokenizer.parts import BLANK, Parts

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class Encoder:
    """Reference encoder: the `tokenizers` library defines the exact ids.

    Attributes:
        label: library and version, e.g. "tokenizers 0.23.3".
        vocab_size: largest id + 1, including added tokens.
        digest: xxh3-128 of `tokenizer.json`.
    """

    def __init__(self, directory: Path, eos: str | None = None) -> None:
        """Load the tokenizer of `directory`; `eos` names the token that ends a document (see `directory.end_token`).

        Raises DataError when it is missing or damaged.
        """
        self.digest = tokenizer_digest(directory)
        self._directory, self._eos = directory, eos
        self._tokenizer = load_tokenizer(directory)
        # A literal "<|endoftext|>" inside a document is text: encode it as such, never as the end token.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()  # a tokenizer.json may enable truncation or padding, which alter documents
        self._tokenizer.no_padding()
        self.label = f"tokenizers {importlib.metadata.version('tokenizers')}"
        # Not the number of tokens: ids of added tokens may have gaps.
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def eos_token(self) -> str:
        """The token that ends a document. Raises DataError when the tokenizer does not have it."""
        return end_token(self._directory, self._tokenizer, self._eos)

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document. Raises DataError like `eos_token`."""
        return int(self._tokenizer.token_to_id(self.eos_token))

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Concatenated token ids of all texts, [tokens] uint32, and each text's end offset, [len(texts)] int64.

        Adds no end tokens.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:  # a Rust panic is not an Exception
            if type(error).__name__ != "PanicException":
                raise
            raise DataError(
                f"{self.label} failed on a text ({error}). Its added tokens may overlap: remove lstrip and rstrip."
            ) from None
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        ends = np.cumsum([len(one) for one in ids], dtype=np.int64)
        return np.concatenate(ids) if ids else np.empty(0, np.uint32), ends

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one text, [tokens] uint32, without an end token."""
        return self.encode_flat([text])[0]

    def decode(self, ids: np.ndarray) -> str:
        """The text of `ids`, [tokens] of any integer type; incomplete UTF-8 characters become U+FFFD."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def require_same_ids(self, directory: Path, fix: str) -> None:
        """Raise DataError, ending in `fix`, if the tokenizer in `directory` encodes text differently."""
        if encoding_of(load_tokenizer(directory)) != encoding_of(self._tokenizer):
            raise DataError(f"{directory / TOKENIZER_FILE}: gives other ids than the model's tokenizer. {fix}")

    @cached_property
    def parts(self) -> Parts:
        """The tokenizer's components as loaded."""
        return Parts.parse(self._tokenizer.to_str())

    def lost_by(self, text: str) -> str:
        """The component because of which `text` does not come back, and what it does: "model BPE drops"."""
        model, tokenizer = self.parts.model, self._tokenizer
        pieces = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        if tokenizer.pre_tokenizer:
            split = tokenizer.pre_tokenizer.pre_tokenize_str(pieces)
            if sum(end - start for _, (start, end) in split) < len(pieces):
                return f"pre-tokenizer {' + '.join(part['type'] for part in self.parts.pre_tokenizers)} removes"
            pieces = "".join(piece for piece, _ in split)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        unknown = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")
        if unknown is not None and tokenizer.token_to_id(unknown) in encoding.ids:
            return f"model {model['type']} has no tokens for, and encodes as {unknown},"
        if set(pieces) - set("".join(encoding.tokens)) and not model.get("byte_fallback"):
            return f"model {model['type']} without unk_token has no tokens for, and drops,"
        return "normalizer or decoder does not restore"

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary, or None."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def token_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 that each id stands for, [vocab_size] int64; 0 for special tokens, which are not text."""
        parts = self.parts
        byte_level = any(part["type"] == "ByteLevel" for part in (*parts.normalizers, *parts.pre_tokenizers))
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if byte_level:  # a character for each byte
                sizes[i] = len(token)
            elif parts.model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(token):
                sizes[i] = 1
            else:
                sizes[i] = len((token.replace(BLANK, " ") if parts.marks_blanks else token).encode())
        for added in parts.added_tokens:
            sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return sizes

    def tokens(self) -> list[str]:
        """The text of every token in the vocabulary, indexed by id."""
        return self._tokenizer.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=False)


class FastEncoder:
    """Encoder based on `fastokens`. Use it for a tokenizer only after `tokenizer.proof` has verified it.

    Its thread pool has one thread: parallelism comes from processes, which share nothing and scale better.
    """

    def __init__(self, directory: Path) -> None:
        """Load the tokenizer of `directory`. Raises ImportError or ValueError if fastokens does not support it."""
        import fastokens

        self.label = fast_label()
        if (directory / TOKENIZER_FILE).is_file():
            self._tokenizer = fastokens.Tokenizer.from_file(str(directory / TOKENIZER_FILE))
        else:
            self._tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json(directory).decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._started = False

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder.encode_flat`."""
        if not self._started:
            self._start_pool()
        ids, offsets = self._tokenizer.encode_batch_flat(texts, False, True)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64)[1:].astype(np.int64)

    def encode(self, text: str) -> np.ndarray:
        """See `Encoder.encode`."""
        return self.encode_flat([text])[0]

    def _start_pool(self) -> None:
        """Start the library's thread pool while this thread is restricted to one CPU, then restore the affinity.

        Called on first use, because a pool does not survive a fork. The pool starts one thread per visible CPU, and the
        library has no effective setting for it. Measured on two cores: 560 MB per CPU-second with one thread, 330 to
        480 MB with two.
        """
        self._started = True
        if not hasattr(os, "sched_setaffinity"):
            return
        allowed = os.sched_getaffinity(0)
        before = threads()
        os.sched_setaffinity(0, {min(allowed)})
        try:
            self.encode_flat(["start", "the", "pool"])
        finally:
            os.sched_setaffinity(0, allowed)
        for thread in threads() - before:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, allowed)


def fast_label() -> str:
    """Name and version of the fast encoder; "fastokens none" if it is not installed."""
    try:
        return f"fastokens {importlib.metadata.version('fastokens')}"
    except importlib.metadata.PackageNotFoundError:
        return "fastokens none"


def cpu_digest() -> str:
    """Digest of this CPU's feature flags: a library may take a different code path, with other bugs, on another CPU."""
    try:
        with open("/proc/cpuinfo", "rb") as file:
            flags = [line for line in file if line.startswith((b"flags", b"Features"))][:1]
    except OSError:
        flags = []
    return digest_bytes(b"".join(flags) + os.uname().machine.encode())[:12]
