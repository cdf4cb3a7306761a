"""Initial weights and parameter groups of the plain model; tests/integration tests them under ZeRO."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from codeparrot_ds.run.sections import Model
from codeparrot_ds.training.loss import LossHead
from codeparrot_ds.training.model import (
    TokenEmbedding,
    build_model,
    initial_value,
    next_token_loss,
    parameter_groups,
)

TINY = Model.model_validate({"vocab_size": 300, "seq_len": 16, "n_layer": 2, "n_head": 2, "n_embd": 32})


def test_initial_weights_are_gpt2s_and_a_function_of_seed_and_name() -> None:
    network: Any = build_model(TINY, eos_id=0, seed=5)
    state = dict(network.named_parameters())
    assert network.lm_head.weight is network.transformer.wte.weight
    assert abs(state["transformer.wte.weight"].std().item() - 0.02) < 0.001
    projection = state["transformer.h.1.mlp.c_proj.weight"].std().item()
    assert abs(projection - 0.02 / math.sqrt(2 * TINY.n_layer)) < 0.0007
    for name, value in state.items():
        if name.endswith("bias"):
            assert torch.count_nonzero(value) == 0
        elif ".ln_" in name:
            assert torch.all(value == 1)
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(state[name], initial_value(name, state[name].shape, TINY, seed=5))
    assert not torch.equal(state[name], initial_value(name, state[name].shape, TINY, seed=6))
    other = "transformer.h.1.attn.c_attn.weight"
    assert not torch.equal(state[name], state[other])


def test_init_std_scales_the_matrices_and_is_stored_in_the_configuration() -> None:
    wider = TINY.model_copy(update={"init_std": 0.05})
    network, scaled = (build_model(model, eos_id=0, seed=5) for model in (TINY, wider))
    for (name, value), other in zip(network.named_parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(other, value * 2.5 if value.dim() == 2 else value, msg=name)
    assert (network.config.initializer_range, scaled.config.initializer_range) == (0.02, 0.05)
    drawn: Any = build_model(wider, eos_id=0, seed=5, draw_on=torch.device("cpu"))
    assert abs(drawn.transformer.wte.weight.std().item() - 0.05) < 0.0025


def test_weight_decay_names_every_parameter_once() -> None:
    network = build_model(TINY, eos_id=0, seed=1)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in parameter_groups(network, 0.1))
    assert sorted(decayed + plain) == sorted(names.values())
    assert all(name.endswith("bias") or ".ln_" in name for name in plain)
    assert not any(name.endswith("bias") or ".ln_" in name for name in decayed)


def test_the_loss_of_a_uniform_guess_is_ln_vocab() -> None:
    loss = next_token_loss(torch.zeros(2, 5, 300, dtype=torch.bfloat16), torch.zeros(2, 5, dtype=torch.long))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - math.log(300)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [7, 64])
def test_the_loss_in_chunks_is_the_loss(dtype: torch.dtype, chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    head = LossHead(16, 50, bias=False).to(dtype)
    head.chunk_tokens = chunk_tokens
    hidden = torch.randn(2, 20, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (2, 20), generator=generator)
    results = []
    for compute in (lambda: head(hidden, targets), lambda: next_token_loss(head(hidden), targets)):
        loss = compute()
        (loss / 3).backward()
        assert hidden.grad is not None
        assert head.weight.grad is not None
        results.append((loss.detach(), hidden.grad, head.weight.grad))
        hidden.grad = head.weight.grad = None
    for ours, reference in zip(*results, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert ours.dtype == reference.dtype
        assert float((ours - reference).abs().max()) <= tolerance * float(reference.abs().max())


def test_logits_are_never_whole_in_memory() -> None:
    tokens, vocab, chunk = 4096, 2000, 128
    head = LossHead(8, vocab, bias=False)
    head.chunk_tokens = chunk
    hidden = torch.randn(1, tokens, 8, requires_grad=True)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        head(hidden, torch.zeros(1, tokens, dtype=torch.long)).backward()
    assert chunk * vocab <= largest < tokens * vocab / 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_a_frequent_token_is_summed_in_fp32(dtype: torch.dtype) -> None:
    ids = torch.zeros(4, 1024, dtype=torch.long)
    ids[:, ::64] = 1
    gradient = torch.rand(4, 1024, 8, generator=torch.Generator().manual_seed(1)).to(dtype)

    def summed(make: Any) -> torch.Tensor:
        embedding = make(2, 8).to(dtype)
        embedding(ids).backward(gradient)
        result: torch.Tensor = embedding.weight.grad.double()
        return result

    exact = torch.stack([gradient[ids == token].double().sum(0) for token in (0, 1)])
    assert torch.allclose(summed(TokenEmbedding), exact, rtol=4e-3)
    if dtype == torch.bfloat16:  # otherwise ours would not be needed
        assert not torch.allclose(summed(torch.nn.Embedding), exact, rtol=0.2)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_activation_checkpointing_changes_no_bit(checkpointing: str) -> None:
    def gradients(mode: str) -> list[torch.Tensor]:
        network = build_model(Model.model_validate({**TINY.model_dump(), "activation_checkpointing": mode}), 0, 1)
        network.train()
        ids = torch.arange(2 * 9).reshape(2, 9)
        network(ids[:, :-1], targets=ids[:, 1:]).backward()
        return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(checkpointing), gradients("none"), strict=True))


def test_selective_checkpointing_spares_every_second_block() -> None:
    network: Any = build_model(
        Model.model_validate({**TINY.model_dump(), "activation_checkpointing": "selective"}), 0, 1
    )
    checkpointed = [block.gradient_checkpointing for block in network.transformer.h]
    assert checkpointed == [i % 2 == 0 for i in range(len(checkpointed))]
