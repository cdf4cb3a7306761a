"""How well a tokenizer fits texts: its tokens counted against characters, bytes and words, in all and by kind of text.

Definitions:

    word                a longest run of letters, digits and underscores (the regular expression `\\w+`)
    tokens of a word    the tokens that contain one of its characters, or a part of one
    fertility           tokens of a word, on average over all words
    continued words     share of the words that have at least two tokens
    coverage            share of the characters that a token other than the unknown token contains
    kind of a token     that of its last character: " return" after a line end is code, "\\n   " before it indentation
    kind of a word      that of its last character

Texts are encoded as for training: a special token in a text is text, and no end token is added.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from codeparrot_ds.tokenizer.kinds import KINDS
from codeparrot_ds.tokenizer.parts import Parts

_WORD = re.compile(r"\w+")
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # of a vocabulary that falls back to bytes
_NO_KIND = len(KINDS)  # of a text that is not divided


@dataclass(frozen=True)
class Text:
    """A text and what does not depend on the tokenizer.

    Attributes:
        name: its path, for lists.
        text: the content.
        sizes: bytes of each character in UTF-8, [characters] int64.
        words: start and end of each word, [words, 2] int64.
        kinds: index into `KINDS` of each character, [characters] uint8; one past the last if the text is not divided.
    """

    name: str
    text: str
    sizes: np.ndarray
    words: np.ndarray
    kinds: np.ndarray

    @classmethod
    def of(cls, name: str, text: str, kinds: np.ndarray | None = None) -> "Text":
        """Find the words of a text. `kinds`: as `kinds.kinds_of` returns them; None if it is not divided."""
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        words = [match.span() for match in _WORD.finditer(text)]
        return cls(
            name,
            text,
            1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000),
            np.array(words, np.int64).reshape(-1, 2),
            np.full(len(text), _NO_KIND, np.uint8) if kinds is None else kinds,
        )


@dataclass(frozen=True)
class Counts:
    """Sums over texts, or over their parts of one kind; for one tokenizer, except `characters`, `bytes` and `words`.

    Attributes:
        tokens_of_words: sum over the words of their tokens.
        continued: words with at least two tokens.
        covered: characters in a token other than the unknown token.
    """

    characters: int
    bytes: int
    words: int
    tokens: int
    tokens_of_words: int
    continued: int
    covered: int

    def as_json(self) -> dict[str, Any]:
        """The measures, by the names that the module explains; those of nothing are None."""
        return {
            "characters": self.characters,
            "bytes": self.bytes,
            "words": self.words,
            "tokens": self.tokens,
            "characters_per_token": _share(self.characters, self.tokens),
            "bytes_per_token": _share(self.bytes, self.tokens),
            "fertility": _share(self.tokens_of_words, self.words),
            "continued_words": _share(self.continued, self.words),
            "coverage": _share(self.covered, self.characters),
        }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


class Subject:
    """A tokenizer and what it makes of the texts that were added.

    Attributes:
        name: as given.
        parts: its components.
        tokenizer: encodes without special tokens, truncation, padding and post-processing.
        vocabulary: the text of every token, by id, ascending; bytes that are no whole characters as `\\xe2`.
        added: ids of added tokens.
        different: names of the texts that do not come back from their ids.
        texts: number of texts.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        content = json.loads(tokenizer.to_str())
        content |= {"post_processor": None, "truncation": None, "padding": None}  # it may trim the places of tokens
        self.name, self.parts = name, Parts.parse(json.dumps(content))
        self.tokenizer = Tokenizer.from_str(json.dumps(content))
        self.tokenizer.encode_special_tokens = True
        tokens = self.tokenizer.get_vocab(with_added_tokens=True)
        self.added = {token["id"] for token in self.parts.added_tokens}
        self._stored = {number: token for token, number in sorted(tokens.items(), key=lambda each: each[1])}
        read = _of_bytes if _decodes_bytes(content["decoder"]) else _marked if self.parts.marks_blanks else str
        texts = {number: token if number in self.added else read(token) for number, token in self._stored.items()}
        self._lengths = {number: len(token) for number, token in texts.items()}
        self.vocabulary = {number: _printable(token) for number, token in texts.items()}
        self._unknown = _unknown_id(self.tokenizer, self.parts.model)
        self._uses = np.zeros(max(self.vocabulary, default=-1) + 1, np.int64)
        self._sums = np.zeros((len(KINDS) + 1, 7), np.int64)  # by kind, in the order of `Counts`
        self.different: list[str] = []
        self.texts = 0

    def add(self, texts: Sequence[Text]) -> None:
        """Encode texts and add what is counted."""
        encodings = self.tokenizer.encode_batch([each.text for each in texts], add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        decoded = self.tokenizer.decode_batch(ids, skip_special_tokens=False)
        for text, encoding, back in zip(texts, encodings, decoded, strict=True):
            self._add(text, np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2))
            self.texts += 1
            if back != text.text:
                self.different.append(text.name)

    def _add(self, text: Text, ids: np.ndarray, places: np.ndarray) -> None:
        """Add one text. `places`: first character of each token and one past its last, [tokens, 2]."""
        self._uses += np.bincount(ids, minlength=len(self._uses))
        if not len(text.text):
            return
        rows = len(KINDS) + 1
        starts, ends = places.T
        full = ends > starts
        # Of the tokens that start before a word's end, all contain a part of it but those that end before its start.
        first, last = text.words.T
        tokens = np.searchsorted(np.sort(starts[full]), last) - np.searchsorted(np.sort(ends[full]), first, "right")
        known = full & (ids != self._unknown)
        change = np.zeros(len(text.text) + 1, np.int64)
        np.add.at(change, starts[known], 1)
        np.add.at(change, ends[known], -1)
        covered = np.cumsum(change[:-1]) > 0
        of_words, of_tokens = text.kinds[last - 1], text.kinds[np.maximum(ends - 1, 0)]
        columns = (
            np.bincount(text.kinds, minlength=rows),
            np.bincount(text.kinds, text.sizes, rows),
            np.bincount(of_words, minlength=rows),
            np.bincount(of_tokens, minlength=rows),
            np.bincount(of_words, tokens, rows),
            np.bincount(of_words[tokens > 1], minlength=rows),
            np.bincount(text.kinds[covered], minlength=rows),
        )
        self._sums += np.stack(columns, 1).astype(np.int64)

    def counts(self, kind: str | None = None) -> Counts:
        """The sums over one of the `KINDS`, or over everything."""
        sums = self._sums.sum(0) if kind is None else self._sums[KINDS.index(kind)]
        return Counts(*sums.tolist())

    def unused(self) -> list[int]:
        """Ids of the tokens that no text uses, ascending."""
        return [number for number in self.vocabulary if not self._uses[number]]

    def learned(self) -> list[int]:
        """Ids of the tokens that training made, ascending: no added tokens, and no single bytes or characters."""
        return [
            number
            for number, token in self._stored.items()
            if number not in self.added and len(token) > 1 and not _BYTE.fullmatch(token)
        ]

    def longest(self) -> list[int]:
        """Like `learned`, the longest first, in characters; of equal ones the lowest id first."""
        return sorted(self.learned(), key=lambda number: (-self._lengths[number], number))

    def tokens_of(self, word: str) -> int:
        """Number of tokens of a text of its own; 0 if one of them is an added token or the unknown token."""
        ids = self.tokenizer.encode(word, add_special_tokens=False).ids
        return 0 if self.added.intersection(ids) or self._unknown in ids else len(ids)


def _decodes_bytes(decoder: dict[str, Any] | None) -> bool:
    return decoder is not None and (
        decoder["type"] == "ByteLevel" or any(map(_decodes_bytes, decoder.get("decoders", [])))
    )


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level tokens: itself if it is printable, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _alphabet()


def _of_bytes(token: str) -> str:
    """The text of a byte-level token, with a lone surrogate for each byte of an incomplete character."""
    if not all(character in _BYTES for character in token):
        return token
    return bytes(_BYTES[character] for character in token).decode(errors="surrogateescape")


def _printable(text: str) -> str:
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _marked(token: str) -> str:
    return token.replace("\u2581", " ")


def _unknown_id(tokenizer: Tokenizer, model: dict[str, Any]) -> int:
    """Id of the token for what the vocabulary lacks; -1 if there is none."""
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    found = tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
    return -1 if found is None else found
