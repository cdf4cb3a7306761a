"""Complete prompts with a converted model, as the chapter does."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.evaluation.pretrained import load_pretrained

# A line that begins at the margin with one of these starts a new block: the completion is over.
_NEW_BLOCK = re.compile(r"\n(?=class\b|def\b|#|@|print\b|if\b)")


@dataclass(frozen=True)
class Sampling:
    """How to sample. The defaults are the chapter's."""

    num: int = 4
    temperature: float = 0.4
    top_p: float = 0.95
    max_new_tokens: int = 64
    seed: int = 1


def complete(model_directory: Path, prompts: list[str], sampling: Sampling) -> list[list[str]]:
    """`sampling.num` completions of each prompt, without the prompt, cut where a new block starts.

    Raises ConfigError when a prompt and its completion do not fit into the model's context together.
    """
    model, tokenizer, device = load_pretrained(model_directory)
    completions = []
    torch.manual_seed(sampling.seed)
    for prompt in prompts:
        ids = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt").to(device)
        length = ids["input_ids"].shape[1]
        if length + sampling.max_new_tokens > model.config.n_positions:
            raise ConfigError(
                f"the prompt has {length} tokens; with --max-new-tokens {sampling.max_new_tokens} that is more than "
                f"the model's context of {model.config.n_positions}. Shorten one of them."
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
        texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        completions.append([first_block(text) for text in texts])
    return completions


def first_block(text: str) -> str:
    """`text` up to the first line that starts a new block."""
    return _NEW_BLOCK.split(text, maxsplit=1)[0].rstrip()
