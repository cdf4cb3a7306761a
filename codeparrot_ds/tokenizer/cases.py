"""Texts on which a fast encoder may differ from `tokenizers`, made from the tokenizer's own components.

Every component type has an entry in `_PIECES`, which gives the strings that the component treats in a special way. They
are put side by side, cut, overlapped and mixed with one character of each kind. A tokenizer with any other component,
or with settings that fast encoders treat differently, has no complete cases: see `uncovered`.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from codeparrot_ds.tokenizer.directory import EOS_TOKEN
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.tokenizer.parts import Parts

_EVERY_CODE_POINT = range(0x110000)
_CODE_POINTS_A_TEXT = 64
# One character of each kind that a pre-tokenizer may distinguish.
_KINDS = ["a", "Z", "7", " ", "\n", "\t", "'", "s", ".", "_", "é", "中", "٣", "\u00a0", "\u0301", "🦜", "\r"]
_BETWEEN = ["", *_KINDS, "  ", "\r\n", " \n", "\n    ", "ab", "'s"]  # between two pieces
_MARKS = [chr(c) for c in (0x300, 0x301, 0x308, 0x30A, 0x323, 0x327, 0x328, 0x338, 0x345, 0x3099, 0x309A, 0x5B0, 0xE31)]
_SIDE_BY_SIDE = 4096  # pairs of pieces in every combination; of more, a sample
_RANDOM_TEXTS = 4096
_TRIPLES = 64  # characters of a regular expression up to which all combinations of three are compared

# A pattern of these alone is covered: which characters belong to a class or property is decided by the code points, and
# all else by `_for_pattern`. Not covered are, among others, look-behind, anchors, back references and nested classes.
_ESCAPE = r"\\[pP]\{\^?[A-Za-z_=]+\}|\\[sSdDwWrntfv]|\\u[0-9A-Fa-f]{4}|\\x[0-9A-Fa-f]{2}|\\[^A-Za-z0-9]"
_ITEM = re.compile(rf"{_ESCAPE}|[^\\]")  # within a class
_REGEX = re.compile(
    rf"{_ESCAPE}|\[\^?(?P<items>(?:{_ESCAPE}|(?!&&)[^\[\]\\])+)\]"
    r"|\(\?(?:i?:|[!=])|\((?!\?)|\)|\||(?:[*+?]|\{(?P<least>\d+)(?:,(?P<most>\d*))?\})\??(?![*+?{])"
    r"|(?P<literal>[^\\{}()|\[\]*+?^$])"
)


def uncovered(parts: Parts) -> str | None:
    """Why there are no complete cases for this tokenizer; None if there are."""
    for part in (*parts.normalizers, *parts.pre_tokenizers, parts.model):
        if part["type"] not in _PIECES:
            return f"the proof does not cover the component {part['type']}"
        pattern = part.get("pattern", {})
        regex = pattern.get("Regex")
        if regex is not None and (part["type"] != "Split" or _REGEX.sub("", regex)):
            return f"the proof does not cover the regular expression {regex[:80]!r} of {part['type']}"
    for setting in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if parts.model.get(setting):
            return f"the proof does not cover the model's {setting}"
    for token in parts.matched_tokens:
        for flag in ("single_word", "lstrip", "rstrip"):
            if token[flag]:
                return f"the added token {token['content']!a} is matched by the rule {flag}"
    return None


def code_points() -> Iterator[str]:
    """Every code point except surrogates, in contexts where its class affects the ids.

    Two preceding blanks distinguish white space; a following "'s" distinguishes letters and digits; a preceding
    apostrophe would be merged into a contraction or a run of punctuation. The 145,000 assigned code points also
    appear next to letters, digits and line ends.
    """
    yield from _grouped(_EVERY_CODE_POINT, "  {0}'s'{0}")
    assigned = [c for c in _EVERY_CODE_POINT if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]
    yield from _grouped(assigned, " {0}a{0}1{0}\n{0} {0}={0}'S{0}{0}")


def _grouped(code_points: Iterable[int], pattern: str) -> Iterator[str]:
    texts = (pattern.format(chr(c)) for c in code_points if not 0xD800 <= c < 0xE000)
    while group := "".join(itertools.islice(texts, _CODE_POINTS_A_TEXT)):
        yield group


def hard_cases(referee: Encoder) -> Iterator[str]:
    """Texts on which encoders were found to differ, crash or hang, and similar texts, for any tokenizer."""
    for literal in (EOS_TOKEN, "<|endoftext|", "|endoftext|>", EOS_TOKEN.upper(), EOS_TOKEN * 3):
        yield from (literal, f" {literal} ", f"x = '{literal}'\n", f"a{literal}b", f"\n{literal}\n")
    for unit in (" ", "\n", "\t", "a", "A", "0", "'", "=", "_", "é", "中", "🦜", "\r\n", " \n", "ab", "'s"):
        yield unit * 10_000
        yield from (f"x{unit * n}y" for n in range(1, 140))  # more than twice the widest vector register (64 bytes)
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
    random = np.random.default_rng(0)  # random token sequences exercise merges that ordinary text never needs
    for row in random.integers(0, len(tokens), (256, 256)):
        yield "".join(tokens[i] for i in row)
    encoded = " ".join(_KINDS * 64)
    yield from (encoded[i:] for i in range(64))  # the same text at every offset


def component_cases(referee: Encoder) -> Iterator[str]:
    """Texts made from the strings that the tokenizer's components treat in a special way. See `uncovered`."""
    parts = referee.parts
    components = (*parts.normalizers, *parts.pre_tokenizers, parts.model)
    pieces = [token["content"] for token in parts.added_tokens]
    for part in components:
        pieces += _PIECES[part["type"]](part)
    pieces = [piece for piece in dict.fromkeys(pieces) if piece]
    yield from _alone(pieces)
    yield from _side_by_side(pieces)
    yield from _mixed([*pieces, *_BETWEEN], 8)
    for part in parts.pre_tokenizers:
        yield from _for_pattern(part)
    if parts.canonical:
        yield from _canonical_cases()
    tokens = referee.tokens()
    yield from tokens  # whole words of their own, which `ignore_merges` takes from the vocabulary
    yield from _mixed(tokens, 4)


def _alone(pieces: Sequence[str]) -> Iterator[str]:
    """Each piece between characters of every kind, repeated, cut, and in other forms of the same letters."""
    for piece in pieces:
        yield from (f"{before}{piece}{after}" for before in _BETWEEN for after in _BETWEEN)
        yield from (piece * n for n in range(2, 6))
        forms = {piece.upper(), piece.lower(), piece.title(), piece.swapcase()}
        forms |= {unicodedata.normalize(form, piece) for form in ("NFC", "NFD", "NFKC")}
        forms |= {piece[:n] for n in range(1, len(piece))} | {piece[n:] for n in range(1, len(piece))}
        for form in sorted(forms):
            yield from (form, f"a{form}b", f" {form} ", f"{form}{piece}", f"{piece}{form}")


def _side_by_side(pieces: Sequence[str]) -> Iterator[str]:
    """Two pieces next to each other, with a character of each kind between them, and overlapping."""
    pairs: Iterable[tuple[str, str]] = itertools.product(pieces, pieces)
    if len(pieces) ** 2 > _SIDE_BY_SIDE:
        random = np.random.default_rng(1)
        pairs = ((pieces[a], pieces[b]) for a, b in random.integers(0, len(pieces), (_SIDE_BY_SIDE, 2)))
    for a, b in pairs:
        yield from (f"{a}{between}{b}" for between in _BETWEEN)
        yield from (a + b[n:] for n in range(1, min(len(a), len(b))) if a.endswith(b[:n]))


def _mixed(pieces: Sequence[str], most: int) -> Iterator[str]:
    """Random sequences of up to `most` pieces."""
    random = np.random.default_rng(2)
    for count, row in zip(
        random.integers(2, most + 1, _RANDOM_TEXTS), random.integers(0, len(pieces), (_RANDOM_TEXTS, most)), strict=True
    ):
        yield "".join(pieces[i] for i in row[:count])


def _for_pattern(part: dict[str, Any]) -> Iterator[str]:
    """Short texts over the characters of a regular expression, and runs of the lengths that it counts."""
    regex = part.get("pattern", {}).get("Regex")
    if regex is None:
        return
    alphabet = list(dict.fromkeys([*_KINDS, *_literals(part)]))
    yield from _mixed(alphabet, 12)
    last = alphabet if len(alphabet) <= _TRIPLES else [""]
    yield from ("".join(f"{a}{b}{c}\n" for c in last) for a in alphabet for b in alphabet)
    counts = {int(n) for match in _REGEX.finditer(regex) for n in match.group("least", "most") if n}
    lengths = sorted({n * times + more for n in counts if n <= 1000 for times in (1, 2, 3) for more in (-1, 0, 1)})
    yield from (f"{before}{c * n}{after}" for c in alphabet for n in lengths for before in " a" for after in " a")


def _literals(part: dict[str, Any]) -> list[str]:
    """The characters that a `Split` pattern names, each in all its cases; for a range, its ends and neighbours."""
    if "String" in part["pattern"]:
        return [part["pattern"]["String"]]
    found: list[str] = []
    for match in _REGEX.finditer(part["pattern"]["Regex"]):
        items = _ITEM.findall(match["items"]) if match["items"] else [match["literal"] or match[0]]
        for item in items:
            if item.startswith(("\\u", "\\x")):
                found.append(chr(int(item[2:], 16)))
            elif len(item) == 1 and (match["items"] or match["literal"]):
                found.append(item)
            elif len(item) == 2 and item[0] == "\\" and not item[1].isalnum():
                found.append(item[1])
    near = {chr(ord(c) + step) for c in found for step in (-1, 1) if 0 < ord(c) < 0x10FFFF}
    cases = {case for c in found for case in (c.upper(), c.lower(), c.title())} | {"\u017f", "\u212a"}
    every = [*found, *sorted(near), *sorted(cases)]
    return [c for c in every if not any(0xD800 <= ord(one) < 0xE000 for one in c)]


def _canonical_cases() -> Iterator[str]:
    """Texts that canonical normalization composes, decomposes or reorders."""
    yield from _grouped(_EVERY_CODE_POINT, "e{0}\u0301")
    composed = [chr(c) for c in _EVERY_CODE_POINT if unicodedata.decomposition(chr(c))[:1] not in ("", "<")]
    composed += [chr(c) for c in range(0xAC00, 0xD7A4, 7)]  # Hangul syllables are composed by arithmetic
    texts = (f"{unicodedata.normalize('NFD', c)}{c}\u0323 {unicodedata.normalize('NFD', c)}x" for c in composed)
    while group := "".join(itertools.islice(texts, _CODE_POINTS_A_TEXT)):
        yield group
    for base in ("e", "A", "q", "\u1100", "\u1100\u1161", "か", "ש", "ก", "å", "ǘ"):
        yield from (f"{base}{''.join(marks)}{base}" for marks in itertools.product(_MARKS, repeat=2))
        yield from (f"{base}{mark * n}" for mark in _MARKS for n in (3, 30, 31, 200))
    singletons = ["\u212b", "\u2126", "\u0958", "\ufb1d"]  # not composed again
    yield from _mixed([*_MARKS, *singletons, "e", "A", "가", "\u1100", "\u1161", "\u11a8"], 12)


def _no_pieces(part: dict[str, Any]) -> list[str]:
    """For components that act on classes of characters, which the code points and kinds cover."""
    return []


def _replacing(part: dict[str, Any]) -> list[str]:
    return [*part["pattern"].values(), part["content"]]


def _of_model(part: dict[str, Any]) -> list[str]:
    return [part["unk_token"] or "", *(f"<0x{byte:02X}>" for byte in (0, 10, 32, 255) if part["byte_fallback"])]


_PIECES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "NFC": _no_pieces,
    "Replace": _replacing,
    "Prepend": lambda part: [part["prepend"]],
    "ByteLevel": _no_pieces,
    "Digits": _no_pieces,
    "Split": _literals,
    "BPE": _of_model,
}
