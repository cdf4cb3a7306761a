"""Generate tokens for a batch of prompts, and turn the tokens of each sample into text as they arrive."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from codeparrot_ds.errors import DataError
from codeparrot_ds.evaluation.pretrained import Pretrained
from codeparrot_ds.evaluation.stops import Arriving, Stops
from codeparrot_ds.tokenizer.encode import Encoder

# (logits [samples, vocab] fp32 of the next token, indices of these samples) -> ids, [samples] int64
Draw = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
# (indices of samples, the new id of each) -> those that have ended
Take = Callable[[Sequence[int], Sequence[int]], set[int]]
END_TOKEN, STOP, LENGTH = "end token", "stop string", "length"  # why a completion ended
_DROP_SHARE = 8  # samples that have ended are dropped from the batch once they are one in this many
_NOT_A_CHARACTER = "\ufffd"


@torch.inference_mode()
def generate(
    found: Pretrained, prompts: Sequence[np.ndarray], sources: Sequence[int], draw: Draw, take: Take, drop: bool
) -> None:
    """Generate one token per sample and step, until all samples have ended.

    Prompts are padded on the left and each is run once, whatever the number of its samples.

    Args:
        found: the model.
        prompts: ids of each prompt, [tokens] integers, at least one.
        sources: index of each sample's prompt.
        draw: chooses the next tokens.
        take: receives them, and returns the samples that have ended.
        drop: drop samples that have ended from the batch; otherwise `draw` always receives all of them.

    Raises:
        DataError: the model has no key-value cache.
    """
    device, model = found.device, found.model
    accepted = inspect.signature(model.forward).parameters
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), found.encoder.eos_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, np.int64))
        mask[row, longest - len(prompt) :] = 1
    padded = not bool(mask.all())
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    last_position = (found.context or sys.maxsize) - 1
    rows = torch.tensor(sources, device=device)
    live = list(range(len(sources)))
    ended: set[int] = set()
    cache: Any = None
    while True:
        options: dict[str, Any] = {"position_ids": positions} if "position_ids" in accepted else {}
        if padded:
            options["attention_mask"] = mask
        if cache is None and "logits_to_keep" in accepted:
            options["logits_to_keep"] = 1
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        logits = output.logits[:, -1].float()
        if cache is None:
            cache = output.past_key_values
            if not hasattr(cache, "batch_select_indices"):
                raise DataError(f"{found.name}: keeps no key-value cache. Use a model with attention.")
            cache.batch_select_indices(rows)  # a row per sample from here on
            logits, mask, positions = logits[rows], mask[rows], positions[rows]
        tokens = draw(logits, live)
        ended |= take(live, tokens.tolist())
        if len(ended) == len(live) or (drop and _DROP_SHARE * len(ended) >= len(live)):
            kept = [row for row, sample in enumerate(live) if sample not in ended]
            if not kept:
                return
            rows = torch.tensor(kept, device=device)
            cache.batch_select_indices(rows)
            tokens, mask, positions = tokens[rows], mask[rows], positions[rows]
            live, ended = [live[row] for row in kept], set()
        # Samples that have ended but are not dropped yet may be past the context.
        ids, positions = tokens[:, None], (positions[:, -1:] + 1).clamp(max=last_position)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


class TextStream:
    """The text of ids that arrive one by one.

    A character is complete once its last byte is there, so pieces end between characters; together they are the text
    that `Encoder.decode` gives for all ids.
    """

    def __init__(self, encoder: Encoder, before: int | None = None) -> None:
        """Begin a stream; `before` is the last id before it. SentencePiece drops a blank at the start of a text."""
        self._encoder = encoder
        # The last id of the text so far, which decoders may need, and those after it.
        self._ids = [] if before is None else [before]
        self._shown = len(self._decode())  # characters of the first of these

    def add(self, token: int) -> str:
        """Add an id, and return the text that it completes."""
        self._ids.append(token)
        text = self._decode()
        if text.endswith(_NOT_A_CHARACTER):
            return ""
        piece = text[self._shown :]
        self._ids = [token]
        self._shown = len(self._decode())
        return piece

    def finish(self) -> str:
        """Return the rest, with U+FFFD for an incomplete character."""
        return self._decode()[self._shown :]

    def _decode(self) -> str:
        return self._encoder.decode(np.array(self._ids, np.int64))


class Continuation:
    """What a model writes after a prompt, token by token, until it ends.

    Attributes:
        ids: the tokens, including those that ended it.
        ended: why it ended: `END_TOKEN`, `STOP` or `LENGTH`; None while it has not.
    """

    def __init__(self, found: Pretrained, stops: Stops, room: int, before: int) -> None:
        """Begin a continuation of at most `room` tokens; `before` is the last id of the prompt."""
        self.ids: list[int] = []
        self.ended: str | None = None
        self._end_ids, self._room = found.end_ids, room
        self._stream, self._arriving = TextStream(found.encoder, before), Arriving(stops)

    @property
    def text(self) -> str:
        """The text of an ended continuation, up to the first stop string."""
        assert self.ended is not None
        return self._arriving.text

    def add(self, token: int) -> str:
        """Add a token, and return the text that is now certain to belong to the continuation."""
        self.ids.append(token)
        text = ""
        if token in self._end_ids:
            self.ended = END_TOKEN
        else:
            text = self._arriving.add(self._stream.add(token))
            if self._arriving.ended:
                self.ended = STOP
            elif len(self.ids) >= self._room:
                self.ended = LENGTH
        if self.ended in (END_TOKEN, LENGTH):
            text += self._arriving.add(self._stream.finish()) + self._arriving.finish()
        return text
