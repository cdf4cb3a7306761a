"""What a GPT-2 computes, apart from its weights: from a recipe or from a Hugging Face `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from codeparrot_ds.errors import DataError, list_problems
from codeparrot_ds.run.sections import Model

# Keys of config.json that change the result, and the only values that this package computes. Others are refused.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names for one function
    "scale_attn_weights": (True,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


@dataclass(frozen=True)
class GPT2:
    """Everything beside the weights that determines what a GPT-2 computes.

    Attributes:
        vocab_size: rows of the embedding.
        n_positions: context (tokens).
        n_embd: hidden size.
        n_layer: number of blocks.
        n_head: attention heads per block.
        scale_by_layer: whether layer i (from 0) divides its attention scores by i + 1.
        layer_norm_epsilon: added to the variance in layer normalization.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    scale_by_layer: bool
    layer_norm_epsilon: float = 1e-5

    @classmethod
    def of_recipe(cls, model: Model) -> "GPT2":
        """The model that a recipe trains."""
        scale = model.scale_attn_by_inverse_layer_idx
        return cls(model.vocab_size, model.seq_len, model.n_embd, model.n_layer, model.n_head, scale)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], where: str) -> "GPT2":
        """The model that a `config.json` describes. Raises DataError, naming `where`, if it is not a plain GPT-2."""
        stated = {**{key: values[0] for key, values in _FIXED.items()}, **config}
        problems = [
            f"{key} {stated[key]!r} is not supported here (must be {' or '.join(map(repr, values))})"
            for key, values in _FIXED.items()
            if stated[key] not in values
        ]
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        problems += [f"{key} is not a number" for key in sizes if type(config.get(key)) is not int]
        if config.get("n_inner") not in (None, 4 * config.get("n_embd", 0)):
            problems.append(f"n_inner {config['n_inner']!r} is not four times n_embd")
        if problems:
            raise DataError(list_problems(where, problems))
        return cls(
            vocab_size=config["vocab_size"],
            n_positions=config["n_positions"],
            n_embd=config["n_embd"],
            n_layer=config["n_layer"],
            n_head=config["n_head"],
            scale_by_layer=bool(config.get("scale_attn_by_inverse_layer_idx", False)),
            layer_norm_epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
        )
