"""Nucleus sampling with random numbers of each sample's own, so that a sample does not depend on its batch."""

import zlib

import numpy as np
import torch

_LIKELY = 128  # tokens that usually contain the nucleus


def uniforms(seed: int, temperature: float, task_id: str, sample: int, count: int) -> np.ndarray:
    """The random numbers of one sample, [count] float64 in [0, 1): a function of these values alone."""
    key = [seed, round(temperature * 1_000_000), zlib.crc32(task_id.encode()), sample]
    return np.random.default_rng(key).random(count)


def draw_tokens(logits: torch.Tensor, temperature: float, top_p: float, drawn: torch.Tensor) -> torch.Tensor:
    """Draw a token per row from the most likely ones that together have the probability `top_p`.

    The same distribution as transformers' warpers of temperature and top-p give. Sorting a whole vocabulary takes
    longer than a step of a small model, so it is done only for rows whose nucleus is not among the likeliest tokens.

    Args:
        logits: [rows, vocab] fp32.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: at most 1.
        drawn: uniform random numbers, [rows] float64 in [0, 1).

    Returns:
        Token ids, [rows] int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p >= 1:
        return _inverse(probabilities.double(), drawn)
    likely, ids = probabilities.topk(min(_LIKELY, probabilities.shape[1]))
    tokens = _from_nucleus(likely, ids, top_p, drawn)
    wider = (likely.sum(-1) < top_p) & (likely.shape[1] < probabilities.shape[1])
    if bool(wider.any()):
        rest, ids = probabilities[wider].sort(descending=True)
        tokens[wider] = _from_nucleus(rest, ids, top_p, drawn[wider])
    return tokens


def _from_nucleus(likely: torch.Tensor, ids: torch.Tensor, top_p: float, drawn: torch.Tensor) -> torch.Tensor:
    """Draw from probabilities in descending order, [rows, n], of the tokens `ids`."""
    before = likely.cumsum(-1) - likely
    kept = torch.where(before < top_p, likely, 0.0)
    return ids.gather(1, _inverse(kept.double(), drawn)[:, None])[:, 0]


def _inverse(weights: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The column of each row at which the cumulative weight exceeds `drawn` times the row's sum."""
    cumulative = weights.cumsum(-1)
    chosen = torch.searchsorted(cumulative, (drawn * cumulative[:, -1])[:, None], right=True)[:, 0]
    last = (weights > 0).long().cumsum(-1).argmax(-1)  # a product rounded up to the sum would be past the last one
    return torch.minimum(chosen, last)
