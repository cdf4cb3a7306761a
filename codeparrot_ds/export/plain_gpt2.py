"""The forward pass of GPT-2 in plain PyTorch, as proof of what a model's weights and configuration mean.

Independent of transformers, whose interpretation of a configuration depends on its version.
Source: Radford et al., 2019, and OpenAI's code (https://github.com/openai/gpt-2/blob/master/src/model.py).
"""

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)

from codeparrot_ds.run.gpt2 import GPT2

EMBEDDING = "transformer.wte.weight"


class Reader(Protocol):
    """Reader of weights, in fp32 on the CPU."""

    def __call__(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return a parameter in its shape; `rows` (first, end) selects rows, `end` excluded."""


def parameters_in_order(model: GPT2) -> list[str]:
    """Names of the parameters below the output head, in order of use."""
    modules = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    below = [f"h.{layer}.{module}" for layer in range(model.n_layer) for module in modules] + ["ln_f"]
    names = [f"transformer.{module}.{kind}" for module in below for kind in ("weight", "bias")]
    return [EMBEDDING, "transformer.wpe.weight", *names]


@torch.inference_mode()
def hidden_states(model: GPT2, read: Reader, ids: torch.Tensor) -> torch.Tensor:
    """Compute the last hidden state, [sequences, seq_len, n_embd] fp32, of ids [sequences, seq_len] int64."""
    with ThreadPoolExecutor(1) as reader:
        ahead = Prefetch(read, parameters_in_order(model), reader)

        def weight(name: str) -> torch.Tensor:
            return ahead.read(f"transformer.{name}").to(ids.device)

        def normalize(x: torch.Tensor, name: str) -> torch.Tensor:
            scale, bias = weight(f"{name}.weight"), weight(f"{name}.bias")
            return F.layer_norm(x, (model.n_embd,), scale, bias, model.layer_norm_epsilon)

        def project(x: torch.Tensor, name: str) -> torch.Tensor:
            return x @ weight(f"{name}.weight") + weight(f"{name}.bias")  # stored [in, out]

        x = weight("wte.weight")[ids]
        x += weight("wpe.weight")[: ids.shape[1]]
        for layer in range(model.n_layer):
            scale = 1 / math.sqrt(model.n_embd // model.n_head) / (layer + 1 if model.scale_by_layer else 1)
            queries_keys_values = project(normalize(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn")
            x += project(_attend(queries_keys_values, model.n_head, scale), f"h.{layer}.attn.c_proj")
            inner = project(normalize(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
            x += project(F.gelu(inner, approximate="tanh"), f"h.{layer}.mlp.c_proj")
        return normalize(x, "ln_f")


def _attend(queries_keys_values: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """Causal attention, one head at a time: [sequences, seq_len, 3 n_embd] -> [sequences, seq_len, n_embd]."""
    parts = [part.chunk(heads, dim=2) for part in queries_keys_values.chunk(3, dim=2)]
    seq_len = queries_keys_values.shape[1]
    future = torch.ones(seq_len, seq_len, dtype=torch.bool, device=queries_keys_values.device).triu(1)
    attended = []
    for query, key, value in zip(*parts, strict=True):
        scores = (query @ key.transpose(1, 2)).mul_(scale).masked_fill_(future, -math.inf)
        attended.append(scores.softmax(2) @ value)
    return torch.cat(attended, 2)


class Prefetch:
    """Reads each weight while the previous one is in use."""

    def __init__(self, read: Reader, names: Sequence[str], reader: ThreadPoolExecutor) -> None:
        """Prepare to read the weights `names`, given in order of use, with the single thread of `reader`."""
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
