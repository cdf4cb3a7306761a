"""Run GPT-2 with weights that are read layer by layer, so that models larger than memory can be compared."""

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

_EMBEDDING = "transformer.wte.weight"
_HEAD_ROWS = 4096  # vocabulary rows whose logits are computed together


class Reader(Protocol):
    """Reader of weights, in fp32 on the CPU."""

    def __call__(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return a parameter in its shape; `rows` (first, end) selects rows, `end` excluded."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of two models' outputs on the same sequences. Losses are nats per token.

    Attributes:
        same_weights: whether the weights are bit-equal, so that only one model was run.
        sequences: number of sequences compared.
        tokens: number of targets in them.
        loss_master: loss with the checkpoint's weights.
        loss_written: loss with the weights that were written.
        largest_logit_difference: maximum over all positions and token ids.
        same_prediction: fraction of positions at which both predict the same token.
    """

    same_weights: bool
    sequences: int
    tokens: int
    loss_master: float
    loss_written: float
    largest_logit_difference: float
    same_prediction: float


def compare(
    config: Any, master: Reader | None, written: Reader, ids: np.ndarray, memory_bytes: int, device: torch.device
) -> Comparison:
    """Run both models over `ids` and compare logits and losses.

    Args:
        config: `transformers.GPT2Config` of both models.
        master: reads the checkpoint's weights; None if the converted weights are bit-equal to them.
        written: reads the converted weights.
        ids: token ids, [sequences, seq_len + 1] int64.
        memory_bytes: memory for activations; at least one sequence is run at a time.
        device: device to compute on, in fp32.
    """
    count, seq_len = len(ids), ids.shape[1] - 1
    at_once = max(1, min(count, memory_bytes // (seq_len * activation_bytes_per_token(config))))
    readers = [written] if master is None else [master, written]
    losses = torch.zeros(len(readers), dtype=torch.float64)
    largest, same = 0.0, 0
    for start in range(0, count, at_once):
        batch = torch.from_numpy(ids[start : start + at_once]).to(device)
        hidden = [_hidden(config, read, batch[:, :-1]) for read in readers]
        found = _compare_heads(config, readers, hidden, batch[:, 1:].flatten())
        losses += found[0]
        largest = max(largest, found[1]) if not math.isnan(found[1]) else math.nan
        same += found[2]
    tokens = count * seq_len
    found_losses = (losses / tokens).tolist()
    return Comparison(master is None, count, tokens, found_losses[0], found_losses[-1], largest, same / tokens)


def activation_bytes_per_token(config: Any) -> int:
    """Return the activation bytes per token: residual streams of both models, and the MLP at four times the width."""
    return 4 * (20 * int(config.n_embd) + 4 * _HEAD_ROWS)


def largest_weight_bytes(config: Any) -> int:
    """Return the bytes of weights in memory together: the embedding or two weights of a block, and one prefetched."""
    return 4 * (
        max(int(config.vocab_size) * int(config.n_embd), 8 * int(config.n_embd) ** 2) + 4 * int(config.n_embd) ** 2
    )


@torch.inference_mode()
def _hidden(config: Any, read: Reader, ids: torch.Tensor) -> torch.Tensor:
    """Return the last hidden state, [sequences, seq_len, n_embd]."""
    from transformers import GPT2Model

    with torch.device("meta"):
        network = GPT2Model(config).eval()
    with ThreadPoolExecutor(1) as reader:
        ahead = _Ahead(read, [f"transformer.{name}" for name, _ in network.named_parameters()], reader)
        for prefix, module in network.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                _read_when_called(module, f"transformer.{prefix}", ahead, ids.device)
        hidden: torch.Tensor = network(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


class _Ahead:
    """Prefetches each weight while the previous one is in use. `names` is in order of use."""

    def __init__(self, read: Reader, names: Sequence[str], reader: ThreadPoolExecutor) -> None:
        self._read, self._reader = read, reader
        self._next = dict(itertools.pairwise(names))
        self._waiting: dict[str, Future[torch.Tensor]] = {}

    def read(self, name: str) -> torch.Tensor:
        """Return a weight, and start reading the next one."""
        found = self._waiting.pop(name, None)
        value = found.result() if found is not None else self._read(name)
        following = self._next.get(name)
        if following is not None and not self._waiting:
            self._waiting[following] = self._reader.submit(self._read, following)
        return value


def _read_when_called(module: nn.Module, prefix: str, ahead: _Ahead, device: torch.device) -> None:
    empty = dict(module.named_parameters(recurse=False))

    def fill(*_: Any) -> None:
        for name in empty:
            value = ahead.read(f"{prefix}.{name}").to(device)
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def drop(*_: Any) -> None:
        for name, parameter in empty.items():
            module.register_parameter(name, parameter)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)


@torch.inference_mode()
def _compare_heads(
    config: Any, readers: Sequence[Reader], hidden: list[torch.Tensor], targets: torch.Tensor
) -> tuple[torch.Tensor, float, int]:
    """Return summed losses per model, the largest logit difference, and the number of equal predictions.

    hidden: [sequences, seq_len, n_embd] per model; targets: [tokens].
    """
    flat = [state.flatten(0, 1) for state in hidden]
    tokens = len(targets)
    normaliser = [torch.full((tokens,), -math.inf, dtype=torch.float64, device=targets.device) for _ in flat]
    right = [torch.zeros(tokens, dtype=torch.float64, device=targets.device) for _ in flat]
    best = [torch.full((tokens,), -math.inf, device=targets.device) for _ in flat]
    predicted = [torch.zeros(tokens, dtype=torch.int64, device=targets.device) for _ in flat]
    largest = torch.zeros((), device=targets.device)
    for first, last in _rows(int(config.vocab_size)):
        logits = [
            state @ read(_EMBEDDING, (first, last)).to(state).T for read, state in zip(readers, flat, strict=True)
        ]
        largest = torch.maximum(largest, (logits[0] - logits[-1]).abs().max())  # NaN stays NaN
        here = (targets >= first) & (targets < last)
        for number, part in enumerate(logits):
            normaliser[number] = torch.logaddexp(normaliser[number], part.logsumexp(1).double())
            right[number][here] = part[here].gather(1, targets[here, None] - first)[:, 0].double()
            value, index = part.max(1)
            better = value > best[number]
            best[number] = torch.where(better, value, best[number])
            predicted[number] = torch.where(better, index + first, predicted[number])
    losses = torch.stack([(total - hit).sum() for total, hit in zip(normaliser, right, strict=True)])
    return losses.cpu(), float(largest), int((predicted[0] == predicted[-1]).sum())


def _rows(vocab_size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, vocab_size, _HEAD_ROWS):
        yield first, min(vocab_size, first + _HEAD_ROWS)
