"""Complete prompts with a converted model, as in the book's CodeParrot chapter (README.md)."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.evaluation.pretrained import load_pretrained

# An unindented line that starts with one of these begins a new block and ends the completion.
_NEW_BLOCK = re.compile(r"\n(?=class\b|def\b|#|@|print\b|if\b)")


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. The defaults are those of that chapter."""

    num: int = 4
    temperature: float = 0.4
    top_p: float = 0.95
    max_new_tokens: int = 64
    seed: int = 1


def complete(model_directory: Path, prompts: list[str], sampling: Sampling) -> list[list[str]]:
    """Return `sampling.num` completions per prompt, without the prompt, cut where a new block starts.

    Raises ConfigError if a prompt and its completion together exceed the model's context.
    """
    model, tokenizer, device = load_pretrained(model_directory)
    completions = []
    torch.manual_seed(sampling.seed)
    for prompt in prompts:
        ids = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt").to(device)
        length = ids["input_ids"].shape[1]
        if length + sampling.max_new_tokens > model.config.n_positions:
            raise ConfigError(
                f"the prompt has {length} tokens; with --max-new-tokens {sampling.max_new_tokens} that exceeds the "
                f"model's context of {model.config.n_positions}. Shorten the prompt or lower --max-new-tokens."
            )
        with torch.no_grad():
            output = model.generate(
                **ids,
                do_sample=True,
                num_return_sequences=sampling.num,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=0,
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=tokenizer.eos_token_id,
            )
        completions.append([first_block(text) for text in _after(tokenizer, output, length)])
    return completions


def _after(tokenizer: Any, ids: torch.Tensor, length: int) -> list[str]:
    """The text after the first `length` tokens of each row of `ids`.

    Decoded with the tokens before it where possible: on its own, SentencePiece's decoder drops a blank at its start.
    """
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    (prompt,) = tokenizer.batch_decode(ids[:1, :length], **how)
    return [
        text.removeprefix(prompt) if text.startswith(prompt) else tokenizer.decode(row[length:], **how)
        for text, row in zip(tokenizer.batch_decode(ids, **how), ids, strict=True)
    ]


def first_block(text: str) -> str:
    """Return `text` up to the first line that starts a new block."""
    return _NEW_BLOCK.split(text, maxsplit=1)[0].rstrip()
