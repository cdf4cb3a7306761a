"""Compare what models compute: logits and losses of weights that are read layer by layer.

Models larger than memory can be compared. Each is run by the plain code of `plain_gpt2`; the written one also by
transformers, which most users will run it with.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from codeparrot_ds.export.plain_gpt2 import EMBEDDING, Prefetch, Reader, hidden_states
from codeparrot_ds.export.written import WrittenWeights
from codeparrot_ds.run.gpt2 import GPT2
from codeparrot_ds.system.files import read_json

_CHECKED_TOKENS = 128
_HEAD_ROWS = 4096  # vocabulary rows whose logits are computed together
_Run = tuple[Reader, Callable[[torch.Tensor], torch.Tensor]]  # reads the head's weights; ids -> last hidden state


@dataclass(frozen=True)
class Comparison:
    """Comparison of models on the same sequences, all in fp32. Losses are nats per token.

    Attributes:
        same_weights: whether checkpoint and result have the same bits and configuration, so that they were run once.
        sequences: number of sequences compared.
        tokens: number of targets in them.
        loss_master: loss with the checkpoint's weights.
        loss_written: loss with the weights and the configuration that were written.
        loss_transformers: loss of the same according to transformers.
        largest_logit_difference: checkpoint to result; maximum over all positions and token ids.
        largest_transformers_difference: the same, between the plain code and transformers.
        largest_logit: largest absolute value of any logit of the result.
        same_prediction: fraction of positions at which checkpoint and result predict the same token.
    """

    same_weights: bool
    sequences: int
    tokens: int
    loss_master: float
    loss_written: float
    loss_transformers: float
    largest_logit_difference: float
    largest_transformers_difference: float
    largest_logit: float
    same_prediction: float


def compare_models(
    master: tuple[GPT2, Reader] | None,
    written: tuple[GPT2, Reader],
    config: Any,
    ids: np.ndarray,
    memory_bytes: int,
    device: torch.device,
) -> Comparison:
    """Run the models over `ids` and compare logits and losses.

    Args:
        master: the checkpoint's model and its weights; None if they are equal to `written`.
        written: the converted model and its weights.
        config: `transformers.GPT2Config` of the converted model.
        ids: token ids, [sequences, seq_len + 1] int64.
        memory_bytes: memory for activations; at least one sequence is run at a time.
        device: device to compute on, in fp32.
    """
    models = [written] if master is None else [master, written]
    runs: list[_Run] = [(read, partial(hidden_states, model, read)) for model, read in models]
    runs.append((written[1], partial(_transformers_hidden_states, config, written[1])))
    count, seq_len = len(ids), ids.shape[1] - 1
    at_once = max(1, min(count, memory_bytes // (seq_len * activation_bytes_per_token(written[0]))))
    losses = torch.zeros(len(runs), dtype=torch.float64)
    differences, largest, same = np.zeros(len(runs) - 1), 0.0, 0
    for start in range(0, count, at_once):
        batch = torch.from_numpy(ids[start : start + at_once]).to(device)
        found = _compare_heads(written[0].vocab_size, runs, batch)
        losses += found.losses
        differences = np.maximum(differences, found.differences)  # NaN stays NaN
        largest = max(largest, found.largest)
        same += found.same_predictions
    tokens = count * seq_len
    mean = (losses / tokens).tolist()
    return Comparison(
        same_weights=master is None,
        sequences=count,
        tokens=tokens,
        loss_master=mean[0],
        loss_written=mean[-2],
        loss_transformers=mean[-1],
        largest_logit_difference=0.0 if master is None else float(differences[0]),
        largest_transformers_difference=float(differences[-1]),
        largest_logit=largest,
        same_prediction=1.0 if master is None else same / tokens,
    )


def check_transformers(directory: Path) -> str:
    """Compare transformers' logits with those of the plain code, on one sequence of random ids.

    Returns what is wrong and how to mend it; empty if they agree. Raises DataError if the directory cannot be read.
    """
    from transformers import __version__

    where = directory / "config.json"
    model = GPT2.of_config(read_json(where, "model configuration"), str(where))
    written = WrittenWeights(directory)
    seq_len = min(model.n_positions, _CHECKED_TOKENS)
    ids = np.random.default_rng(0).integers(model.vocab_size, size=(1, seq_len + 1))
    found = compare_models(None, (model, written.read), load_config(directory), ids, 0, torch.device("cpu"))
    if agree(found.largest_transformers_difference, found.largest_logit):
        return ""
    scale = "scale_attn_by_inverse_layer_idx" if model.scale_by_layer else ""
    mend = (
        f"It may ignore {scale}, as versions before 5.4 do: install transformers>=5.4, or convert the checkpoint again "
        "without --keep-attention-scale."
        if scale
        else "Use another version."
    )
    return (
        f"transformers {__version__} computes another model than these weights and this config.json describe: logits "
        f"differ by up to {found.largest_transformers_difference:.2g}. {mend}"
    )


def agree(difference: float, largest_logit: float) -> bool:
    """Whether two fp32 computations of a logit differ by rounding only.

    Measured for up to 48 layers: rounding 1.3e-6 of the largest logit. An ignored attention scale changes the logits of
    an untrained model of four layers by 1.5e-3 of it, those of larger or trained models by more.
    """
    return difference <= 1e-5 * max(1.0, largest_logit)  # false for NaN


def activation_bytes_per_token(model: GPT2) -> int:
    """Return the activation bytes per token: hidden states, an MLP at four times their size, scores and logits."""
    return 4 * (20 * model.n_embd + 3 * model.n_positions + 6 * _HEAD_ROWS)


def largest_weight_bytes(model: GPT2) -> int:
    """Return the bytes of weights in memory together: the embedding or two weights of a block, and one prefetched."""
    return 4 * (max(model.vocab_size * model.n_embd, 8 * model.n_embd**2) + 4 * model.n_embd**2)


def load_config(directory: Path) -> Any:
    """Return the `transformers.GPT2Config` in a directory."""
    from transformers import GPT2Config

    return GPT2Config.from_pretrained(directory, local_files_only=True)


@torch.inference_mode()
def _transformers_hidden_states(config: Any, read: Reader, ids: torch.Tensor) -> torch.Tensor:
    """Return the last hidden state, [sequences, seq_len, n_embd], with transformers' default attention."""
    from transformers import GPT2Model

    with torch.device("meta"):
        network = GPT2Model(config).eval()
    with ThreadPoolExecutor(1) as reader:
        ahead = Prefetch(read, [f"transformer.{name}" for name, _ in network.named_parameters()], reader)
        for prefix, module in network.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                _read_when_called(module, f"transformer.{prefix}", ahead, ids.device)
        hidden: torch.Tensor = network(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def _read_when_called(module: nn.Module, prefix: str, ahead: Prefetch, device: torch.device) -> None:
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


@dataclass(frozen=True)
class _Heads:
    losses: torch.Tensor  # [runs] float64, summed over tokens
    differences: list[float]  # largest difference of logits between each run and the next
    largest: float  # absolute value of a logit of the last run
    same_predictions: int  # of the first run and the last but one


@torch.inference_mode()
def _compare_heads(vocab_size: int, runs: Sequence[_Run], batch: torch.Tensor) -> _Heads:
    """Run all models on a batch, [sequences, seq_len + 1] int64, and compare their logits, a part at a time."""
    states = [run(batch[:, :-1]).flatten(0, 1) for _, run in runs]
    targets = batch[:, 1:].flatten()
    tokens = len(targets)
    normaliser = [torch.full((tokens,), -math.inf, dtype=torch.float64, device=targets.device) for _ in runs]
    right = [torch.zeros(tokens, dtype=torch.float64, device=targets.device) for _ in runs]
    best = [torch.full((tokens,), -math.inf, device=targets.device) for _ in runs]
    predicted = [torch.zeros(tokens, dtype=torch.int64, device=targets.device) for _ in runs]
    differences = torch.zeros(len(runs) - 1, device=targets.device)
    largest = torch.zeros((), device=targets.device)
    for first, last in _rows(vocab_size):
        here = (targets >= first) & (targets < last)
        previous = None
        for number, ((read, _), state) in enumerate(zip(runs, states, strict=True)):
            logits = state @ read(EMBEDDING, (first, last)).to(state).T
            if previous is not None:  # NaN stays NaN
                differences[number - 1] = torch.maximum(differences[number - 1], (logits - previous).abs().max())
            normaliser[number] = torch.logaddexp(normaliser[number], logits.logsumexp(1).double())
            right[number][here] = logits[here].gather(1, targets[here, None] - first)[:, 0].double()
            value, index = logits.max(1)
            better = value > best[number]
            best[number] = torch.where(better, value, best[number])
            predicted[number] = torch.where(better, index + first, predicted[number])
            previous = logits
        largest = torch.maximum(largest, logits.abs().max())
    losses = torch.stack([(total - hit).sum() for total, hit in zip(normaliser, right, strict=True)])
    same = int((predicted[0] == predicted[-2]).sum())
    return _Heads(losses.cpu(), differences.tolist(), float(largest), same)


def _rows(vocab_size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, vocab_size, _HEAD_ROWS):
        yield first, min(vocab_size, first + _HEAD_ROWS)
