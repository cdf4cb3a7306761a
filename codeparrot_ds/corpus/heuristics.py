"""CodeParrot's measures of a source file, and the rules that remove a document by them.

Source: `preprocessing.py` of the original, https://github.com/huggingface/transformers/tree/v4.30.0/examples/
research_projects/codeparrot. Its two random rules draw from an unseeded generator; these draw from a digest of the
document, so the result can be reproduced.
"""

import re
from dataclasses import dataclass

import numpy as np
import xxhash

from codeparrot_ds.corpus.options import Heuristics

_ASCII_SPACE = b" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f"  # what str.isspace is true of in ASCII text
_OTHER_LINE_ENDS = b"\r\x0b\x0c\x1c\x1d\x1e"  # of str.splitlines in ASCII text
_OTHER, _ALPHANUMERIC, _NEWLINE, _LINE_END, _EQUALS = range(5)
_CLASSES = bytes(
    _NEWLINE if c == ord("\n")
    else _LINE_END if c in _OTHER_LINE_ENDS
    else _EQUALS if c == ord("=")
    else _ALPHANUMERIC if c < 128 and chr(c).isalnum()
    else _OTHER
    for c in range(256)
)  # fmt: skip
_ASCII = re.compile(r"[\x00-\x7f]+")


@dataclass(frozen=True, slots=True)
class Measures:
    """Measures of a document.

    Attributes:
        line_max: length of the longest line (characters).
        line_mean: mean length of its lines (characters).
        alphanumeric_share: share of characters that are letters or digits of any script.
        generated: whether one of the first lines says that the file was generated.
        config_or_test: whether it looks like a configuration or a test file.
        no_keywords: whether it contains none of the keywords.
        assignments: number of "=" characters.
    """

    line_max: int
    line_mean: float
    alphanumeric_share: float
    generated: bool
    config_or_test: bool
    no_keywords: bool
    assignments: int


def measure(text: str, rules: Heuristics) -> Measures:
    """Measure a non-empty text."""
    encoded = text.encode()
    classified = encoded.translate(_CLASSES)
    classes = np.frombuffer(classified, np.uint8)
    newlines = np.flatnonzero(classes == _NEWLINE)
    letters = int(np.count_nonzero(classes == _ALPHANUMERIC))
    if len(encoded) == len(text) and _LINE_END not in classified:
        line_max, line_mean = _measure_lines(len(text), newlines)
        head = text[: _end_of_line(rules.scanned_lines, len(text), newlines)]
    else:
        letters += sum(map(str.isalnum, _ASCII.sub("", text)))
        lines = text.splitlines() or [""]
        line_max, line_mean = max(map(len, lines)), sum(map(len, lines)) / len(lines)
        head = "\n".join(lines[: rules.scanned_lines])
    head, lower = head.lower(), text.lower()
    most = int(rules.config_or_test_per_line * len(newlines))
    return Measures(
        line_max=line_max,
        line_mean=line_mean,
        alphanumeric_share=letters / len(text) if text else 0.0,
        generated=any(phrase in head for phrase in rules.generated_phrases),
        config_or_test=(
            any(phrase in head for phrase in rules.config_or_test_phrases)
            or any(lower.count(word) > most for word in rules.config_or_test_words)
        ),
        no_keywords=not any(keyword in lower for keyword in rules.keywords),
        assignments=int(np.count_nonzero(classes == _EQUALS)),
    )


def _measure_lines(size: int, newlines: np.ndarray) -> tuple[int, float]:
    """Longest and mean line of a text of `size` characters whose lines end at `newlines`."""
    if not len(newlines):
        return size, float(size)
    first, last = int(newlines[0]), size - 1 - int(newlines[-1])
    between = int((newlines[1:] - newlines[:-1]).max(initial=1)) - 1
    return max(first, between, last), (size - len(newlines)) / (len(newlines) + (last > 0))


def _end_of_line(number: int, size: int, newlines: np.ndarray) -> int:
    """Where the line `number`, from 1, of a text of `size` characters ends; 0 for none."""
    if number == 0:
        return 0
    return int(newlines[number - 1]) if number <= len(newlines) else size


def digest_without_space(text: str) -> bytes:
    """xxh3-128 of the text without white space, by which exact duplicates are found."""
    encoded = text.encode()
    if len(encoded) == len(text):
        return xxhash.xxh3_128_digest(encoded.translate(None, _ASCII_SPACE))
    return xxhash.xxh3_128_digest("".join(text.split()).encode())


def find_reason(
    found: Measures, rules: Heuristics, digest: bytes, *, python: bool, characters_per_token: float | None = None
) -> tuple[str, float] | None:
    """Return why a document is removed, and the value that decided it; None to keep it.

    Rules are applied in the original's order.

    Args:
        found: its measures.
        rules: thresholds.
        digest: of the document, for the rules that remove a share.
        python: whether the document is Python; some rules apply to Python only.
        characters_per_token: of the tokenizer; None leaves this rule out.
    """
    if found.generated:
        return "generated", 1.0
    if found.line_max > rules.line_max:
        return "longest line", float(found.line_max)
    if found.line_mean > rules.line_mean:
        return "mean line", found.line_mean
    if found.alphanumeric_share < rules.alphanumeric_share:
        return "alphanumeric share", found.alphanumeric_share
    if characters_per_token is not None and characters_per_token < rules.characters_per_token:
        return "characters per token", characters_per_token
    if found.config_or_test and (drawn := draw(digest, "config or test")) <= rules.removed_share:
        return "config or test", drawn
    if python and found.no_keywords and (drawn := draw(digest, "no keywords")) <= rules.removed_share:
        return "no keywords", drawn
    if python and found.assignments <= rules.assignments:
        return "few assignments", float(found.assignments)
    return None


def draw(digest: bytes, rule: str) -> float:
    """A number in [0, 1), uniform over documents, the same for one document and rule every time."""
    return xxhash.xxh3_64_intdigest(digest + rule.encode()) / 2**64
