"""Complete prompts, several candidates at a time, with their text as it is generated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.evaluation.generate import Continuation, Draw, generate
from codeparrot_ds.evaluation.pretrained import Pretrained, fit_context
from codeparrot_ds.evaluation.stops import Stops


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. The defaults are those of the book's CodeParrot chapter.

    Attributes:
        num: completions per prompt.
        temperature: divides the logits; 0 takes the most likely token, which gives a single completion.
        top_p: sample from the most likely tokens that together have this probability.
        max_new_tokens: maximum length of a completion (tokens).
        seed: of the random numbers, the same for each prompt.
        stops: end a completion at these strings.
    """

    num: int = 4
    temperature: float = 0.4
    top_p: float = 0.95
    max_new_tokens: int = 64
    seed: int = 1
    stops: Stops = field(default_factory=Stops)

    @property
    def candidates(self) -> int:
        """Completions per prompt that can differ."""
        return self.num if self.temperature > 0 else 1


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model sees it.

    Attributes:
        text: as given.
        ids: its tokens that fit into the context, [tokens].
        dropped: number of tokens before these, which do not.
        new_tokens: maximum length of a completion (tokens).
    """

    text: str
    ids: np.ndarray
    dropped: int
    new_tokens: int


@dataclass
class Completion:
    """One completion, without the prompt.

    Attributes:
        text: the text so far; without white space at its end when it has ended.
        ids: its tokens, including those that ended it.
        ended: why it ended (see `generate.Continuation`); None while it has not.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    ended: str | None = None


@dataclass(frozen=True)
class Piece:
    """New text of candidate `number` (from 0); `ended` as in `Completion`."""

    number: int
    text: str
    ended: str | None


def read_prompt(path: Path, line: int | None) -> str:
    """The text of a source file up to the end of a line (from 1; default: the last), without its line end.

    The line end is left to the model: tokenizers join it with the indentation that follows. Raises ConfigError or
    DataError.
    """
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise DataError(f"{path}: not a file of UTF-8 text.") from None
    lines = text.removesuffix("\n").split("\n")
    if line is not None and not 1 <= line <= len(lines):
        raise ConfigError(f"{path}: has {len(lines):,} lines, but --line is {line:,}. Name a line of the file.")
    return "\n".join(lines[:line]).removesuffix("\r")


def encode_prompt(found: Pretrained, text: str, max_new_tokens: int) -> Prompt:
    """Encode a prompt and keep the end that fits into the context. The end token stands for an empty prompt."""
    ids = found.encoder.encode(text)
    ids = ids if len(ids) else np.array([found.encoder.eos_id])
    kept, room = fit_context(found, len(ids), max_new_tokens)
    return Prompt(text, ids[len(ids) - kept :], len(ids) - kept, room)


def complete(
    found: Pretrained, prompt: Prompt, sampling: Sampling, show: Callable[[Piece], None] = lambda piece: None
) -> list[Completion]:
    """Complete a prompt, and call `show` with each piece of text as soon as it is certain.

    With the same seed and settings, `transformers.GenerationMixin.generate` gives the same tokens.

    Args:
        found: the model.
        prompt: from `encode_prompt`.
        sampling: settings.
        show: receives the pieces of all candidates in the order in which they are generated.
    """
    candidates = [_Candidate(found, sampling.stops, prompt) for _ in range(sampling.candidates)]

    def take(numbers: Sequence[int], tokens: Sequence[int]) -> set[int]:
        for number, token in zip(numbers, tokens, strict=True):
            candidate = candidates[number]
            if candidate.completion.ended is None:
                text = candidate.add(token)
                if text or candidate.completion.ended:
                    show(Piece(number, text, candidate.completion.ended))
        return {number for number in numbers if candidates[number].completion.ended is not None}

    torch.manual_seed(sampling.seed)
    # Samples that have ended stay in the batch, because each draw takes random numbers for all.
    generate(found, [prompt.ids], [0] * len(candidates), _draw(sampling), take, drop=False)
    return [candidate.completion for candidate in candidates]


class _Candidate:
    """A completion in progress."""

    def __init__(self, found: Pretrained, stops: Stops, prompt: Prompt) -> None:
        self.completion = Completion()
        self._continuation = Continuation(found, stops, prompt.new_tokens, int(prompt.ids[-1]))
        self._blank = ""  # white space that is shown only if more text follows

    def add(self, token: int) -> str:
        """Add a token, and return the text to show."""
        text = self._blank + self._continuation.add(token)
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        self.completion.text += shown
        self.completion.ids, self.completion.ended = self._continuation.ids, self._continuation.ended
        return shown


def _draw(sampling: Sampling) -> Draw:
    """Choose the next tokens as transformers does."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    if sampling.temperature == 0:
        return lambda logits, samples: logits.argmax(-1)
    cool, nucleus = TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)

    def draw(logits: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        scores = cool(None, logits)
        scores = nucleus(None, scores) if sampling.top_p < 1 else scores
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]

    return draw
