"""The kinds of text in a Python file, by Python's own tokenizer: code, comments, strings and indentation."""

import io
import re
import tokenize
import warnings

import numpy as np

KINDS = ("code", "comments", "strings", "indentation")
_CODE, _COMMENT, _STRING, _INDENTATION = range(len(KINDS))
_LINE_END = re.compile(r"\r\n|\r|\n")
_LINE_START = re.compile(r"(?<![^\r\n])[ \t\f]+")
# Python 3.12 and later split f-strings (3.14: t-strings) into several tokens. They are strings as a whole, as before.
_OPENING = {getattr(tokenize, name, None) for name in ("FSTRING_START", "TSTRING_START")} - {None}
_CLOSING = {getattr(tokenize, name, None) for name in ("FSTRING_END", "TSTRING_END")} - {None}


def kinds_of(text: str) -> np.ndarray:
    """The kind of each character of a Python file, [characters] uint8, an index into `KINDS`.

    Comments and strings are the tokens that Python calls so: a string with its prefix and quotes, a docstring too, and
    an f-string with the expressions in it. Indentation is the white space at the start of a line, outside of strings.
    All else is code, with the blanks between its tokens and the ends of the lines.

    Raises ValueError with the reason when Python cannot tokenize the text.
    """
    kinds = np.full(len(text), _CODE, np.uint8)
    for match in _LINE_START.finditer(text):
        kinds[match.start() : match.end()] = _INDENTATION
    bom = int(text.startswith("\ufeff"))
    starts = [bom, *(match.end() for match in _LINE_END.finditer(text))]
    source = _LINE_END.sub("\n", text[bom:])
    depth, opened = 0, (0, 0)
    for token in _tokens(source):
        if token.type == tokenize.COMMENT:
            kinds[_place(starts, token.start) : _place(starts, token.end)] = _COMMENT
        elif token.type == tokenize.STRING and not depth:
            kinds[_place(starts, token.start) : _place(starts, token.end)] = _STRING
        elif token.type in _OPENING:
            opened = opened if depth else token.start
            depth += 1
        elif token.type in _CLOSING:
            depth -= 1
            if not depth:
                kinds[_place(starts, opened) : _place(starts, token.end)] = _STRING
    return kinds


def _tokens(source: str) -> list[tokenize.TokenInfo]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings
            tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError, ValueError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else error.args[1][0] if len(error.args) > 1 else None
        raise ValueError(f"{error.args[0]}{f', line {line}' if line else ''}") from None
    for token in tokens:
        if token.type == tokenize.ERRORTOKEN:  # an error since Python 3.12
            raise ValueError(f"unexpected {token.string[:1]!a}, line {token.start[0]}")
    return tokens


def _place(starts: list[int], position: tuple[int, int]) -> int:
    """Index of the character at a line (from 1) and column."""
    return starts[position[0] - 1] + position[1]
