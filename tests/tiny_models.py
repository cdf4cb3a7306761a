"""Small models made by plain transformers, without this package."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.conftest import VOCAB_SIZE


def plain_gpt2(directory: Path, tokenizer: Path, seed: int = 0, **config: Any) -> Path:
    """Save a GPT-2 with random weights, large enough for it to have preferences, and a tokenizer."""
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCAB_SIZE, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, **config}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**settings, **ends, initializer_range=0.2))
    model.transformer.wte.weight.data[0] *= 3  # so that some texts end
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    return directory
