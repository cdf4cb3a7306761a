"""Refuse a tokenizer whose ids do not determine the text, before anything is encoded with it.

Its settings are checked by name. What the names do not tell (a vocabulary without a token for some byte, a decoder that
does not match, components unknown to us) is found by encoding and decoding texts with every kind of character.
"""

import string
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from codeparrot_ds.errors import DataError, list_problems
from codeparrot_ds.system.files import read_json
from codeparrot_ds.tokenizer.directory import CONFIG_FILE, TOKENIZER_FILE
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.tokenizer.parts import BLANK, accepted_changes, config_conflicts, refused_settings

# All characters of one and two bytes; of the others, every 977th: each byte that UTF-8 has, in every position.
_CHARACTERS = [chr(c) for c in (*range(0x800), *range(0x800, 0x110000, 977)) if not 0xD800 <= c < 0xE000]
_WHITE = (" ", "\t", "\n", "\r", "\r\n", "\x0b", "\x0c", "\x85", "\u00a0", "\u2028", "\u3000", "\ufeff")
_LAYOUT = (
    "def f(a, b):\n    if a:\n\t\treturn  b  \n\n\n        # end\r\n",
    "  x = 'it''s'  ",
    "\n\n  x",
    "x \n",
    "UPPER lower 0123456789 caf\u00e9 \U0001f99c\n",
)
_MEND = "Correct it, use another tokenizer, or train one: `codeparrot-ds tokenizer train`."
_SHOWN = 8  # characters named in a message


def require_lossless(encoder: Encoder, directory: Path) -> list[str]:
    """Check that the same text always gets the same ids, here and in transformers, and that they decode to this text.

    Args:
        encoder: reference encoder of the tokenizer.
        directory: of the tokenizer.

    Returns:
        The changes of the text that are accepted (see `parts.accepted_changes`).

    Raises:
        DataError: encoding is random or loses text; names each setting that is to blame.
    """
    problems = refused_settings(encoder.parts, encoder.eos_token) or _found_by_encoding(encoder)
    if (config := directory / CONFIG_FILE).is_file():
        problems += config_conflicts(encoder.parts, read_json(config, "tokenizer config"))
    if problems:
        raise DataError(list_problems(str(directory / TOKENIZER_FILE), problems, _MEND))
    return accepted_changes(encoder.parts)


def _found_by_encoding(encoder: Encoder) -> list[str]:
    contents = [token["content"] for token in encoder.parts.matched_tokens]
    texts = [text for text in _texts() if not any(content in text for content in contents)]
    if encoder.parts.canonical:  # Python's Unicode may be older than the library's
        texts = [text for text in texts if all(unicodedata.category(c) != "Cn" for c in text)]
    ids, ends = encoder.encode_flat(texts)
    again, _ = encoder.encode_flat(texts)
    if not np.array_equal(ids, again):
        return ["the same text gets different ids when it is encoded twice"]
    lost: dict[str, list[str]] = {}  # component -> texts
    for text, one in zip(texts, np.split(ids, ends[:-1]), strict=True):
        if not _same(encoder, encoder.decode(one), text):
            lost.setdefault(encoder.lost_by(text), []).append(text)
    problems = [f"{component} {_listed(their)}" for component, their in lost.items()]
    glued = list(_with_tokens([encoder.eos_token, *contents], encoder.eos_token))
    if encoder.eos_id in encoder.encode_flat(glued)[0]:
        problems.append(f"the text {encoder.eos_token} in a document becomes the end token (id {encoder.eos_id})")
    return problems


def _texts() -> Iterator[str]:
    """Every kind of character, alone and between letters; white space in runs and at the ends; source code."""
    yield from chain(_CHARACTERS, _LAYOUT)
    for white in _WHITE:
        yield from (white * n for n in (*range(2, 20), 300))
        yield from (f"a{white}b", f"a{white}", f"{white}b", f" {white} ", f"a {white}\n{white}  b")
    characters = iter(_CHARACTERS)
    while group := list(islice(characters, 64)):
        yield "".join(f"a{c} {c}1" for c in group)


def _with_tokens(contents: Iterable[str], eos_token: str) -> Iterator[str]:
    for content in contents:
        yield from (content, f"a{content}b", f" {content} ", f"\n{content}\n", content * 2, f"{eos_token}{content}")
        yield from (f"{content}{eos_token}", f"{content} {eos_token} {content}", content.upper(), content[:-1])


def _same(encoder: Encoder, found: str, text: str) -> bool:
    """Whether `found` is `text`, apart from the accepted changes."""
    parts = encoder.parts
    if parts.canonical:
        found, text = (unicodedata.normalize("NFC", each) for each in (found, text))
    if parts.marks_blanks:
        found, text = found.replace(BLANK, " "), text.replace(BLANK, " ")
    return found == text or (parts.prefixes_blank and (found == " " + text or " " + found == text))


def _listed(texts: list[str]) -> str:
    """The shortest of `texts`, quoted, common characters first, and how many there are."""
    shortest = sorted(set(texts), key=lambda text: (len(text), text not in string.printable, text))
    shown = ", ".join(ascii(text) if len(text) <= 20 else ascii(text[:20]) + "..." for text in shortest[:_SHOWN])
    return shown if len(shortest) <= _SHOWN else f"{shown} and {len(shortest) - _SHOWN:,} more of the texts tried"
