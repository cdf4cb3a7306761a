"""Where a completion ends: at the first stop string, in a whole text or in one that arrives in pieces."""

import re
from collections.abc import Sequence

from codeparrot_ds.errors import ConfigError

# An unindented line that starts so begins a new block. These are the stop strings of CodeParrot's evaluation.
NEW_BLOCK = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif")


class Stops:
    """A set of stop strings.

    One that ends in a word character counts only where the word ends: "\\nif" stops at "\\nif x", not at "\\nifx".
    """

    def __init__(self, strings: Sequence[str] = NEW_BLOCK) -> None:
        """Take the strings; none is allowed. Raises ConfigError if one is empty."""
        if "" in strings:
            raise ConfigError("a stop string is empty: every completion would be. Remove it.")
        self.strings = tuple(strings)
        self.longest = max(map(len, strings), default=0)
        self.word_ends = tuple(each for each in strings if re.fullmatch(r"\w", each[-1]))
        ends = [re.escape(each) + (r"(?!\w)" if each in self.word_ends else "") for each in strings]
        self.pattern = re.compile("|".join(ends) if ends else r"(?!)")

    def cut(self, text: str) -> str:
        """`text` up to the first stop string."""
        return self.pattern.split(text, maxsplit=1)[0]


class Arriving:
    """A completion that arrives in pieces.

    Attributes:
        text: what has arrived, up to the first stop string.
        ended: whether a stop string has arrived. A word counts once the character after it is there.
    """

    def __init__(self, stops: Stops) -> None:
        self.text, self.ended = "", False
        self._stops = stops
        self._certain = 0  # characters of `text` that no stop string can begin in

    def add(self, piece: str) -> str:
        """Add a piece, and return what is now certain to belong to the completion."""
        if self.ended:
            return ""
        self.text += piece
        match = self._stops.pattern.search(self.text, self._certain)
        if match and (match.end() < len(self.text) or match[0] not in self._stops.word_ends):
            return self._end(match.start())
        start = max(self._certain, len(self.text) - self._stops.longest)
        while start < len(self.text) and not self._may_stop(self.text[start:]):
            start += 1
        found = self.text[self._certain : start]
        self._certain = start
        return found

    def finish(self) -> str:
        """Return the rest of the completion, now that no more text follows."""
        if self.ended:
            return ""
        match = self._stops.pattern.search(self.text, self._certain)
        return self._end(match.start() if match else len(self.text))

    def _end(self, length: int) -> str:
        found = self.text[self._certain : length]
        self.text, self._certain, self.ended = self.text[:length], length, True
        return found

    def _may_stop(self, tail: str) -> bool:
        """Whether a stop string may begin where `tail` does."""
        return any(each.startswith(tail) for each in self._stops.strings)
