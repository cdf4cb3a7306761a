"""GPT-2's `scale_attn_by_inverse_layer_idx`, moved from the configuration into the weights and back.

With this setting, layer i (from 0) divides its attention scores by i + 1. Scores are linear in the queries, so dividing
the query columns of `c_attn` by i + 1 ("folding") gives the same model without the setting, which many runtimes ignore.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

_QUERY_KEY_VALUE = re.compile(r"transformer\.h\.(\d+)\.attn\.c_attn\.(?:weight|bias)")


def fold(name: str, values: torch.Tensor, n_embd: int, start: int = 0) -> torch.Tensor:
    """Divide the queries among `values` by the layer's number, from 1; all other values are returned unchanged.

    Args:
        name: parameter name; only `c_attn` has queries, in the first third of its columns.
        values: elements of the parameter from `start` on, flat, fp32. Not modified.
        n_embd: hidden size.
        start: index of the first element in the parameter.
    """
    return _scale_queries(torch.div, name, values, n_embd, start)


def unfold(name: str, values: torch.Tensor, n_embd: int, start: int = 0) -> torch.Tensor:
    """Multiply the queries among `values` by the layer's number, from 1. The inverse of `fold`, up to rounding."""
    return _scale_queries(torch.mul, name, values, n_embd, start)


def _scale_queries(
    operation: Callable[..., Any], name: str, values: torch.Tensor, n_embd: int, start: int
) -> torch.Tensor:
    match = _QUERY_KEY_VALUE.fullmatch(name)
    if match is None:
        return values
    factors = torch.ones(3 * n_embd, dtype=values.dtype)
    factors[:n_embd] = int(match[1]) + 1
    factors = factors.roll(-start)
    whole = len(values) - len(values) % len(factors)  # elements in complete rows of c_attn
    scaled = torch.empty_like(values)
    operation(values[:whole].view(-1, len(factors)), factors, out=scaled[:whole].view(-1, len(factors)))
    operation(values[whole:], factors[: len(values) - whole], out=scaled[whole:])
    return scaled
