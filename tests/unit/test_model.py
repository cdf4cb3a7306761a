"""Initial weights and parameter groups of the plain model; under ZeRO they are tested in tests/integration."""

import math

import torch

from codeparrot_ds.evaluation.complete import first_block
from codeparrot_ds.recipe import Model
from codeparrot_ds.training.model import build_model, initial_value, next_token_loss, parameter_groups

TINY = Model(vocab_size=300, seq_len=16, n_layer=2, n_head=2, n_embd=32)


def test_initial_weights_are_gpt2s_and_a_function_of_seed_and_name() -> None:
    network = build_model(TINY, eos_id=0, seed=5)
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
    assert torch.equal(state[name], initial_value(name, state[name].shape, TINY.n_layer, seed=5))
    assert not torch.equal(state[name], initial_value(name, state[name].shape, TINY.n_layer, seed=6))
    other = "transformer.h.1.attn.c_attn.weight"
    assert not torch.equal(state[name], state[other])


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


def test_a_completion_ends_where_a_new_block_starts() -> None:
    body = "    return a * b\n\n    # still inside"
    for start in ("def other():", "class A:", "# comment", "@decorator", "print(1)", "if x:"):
        assert first_block(f"{body}\n{start}\n more") == body
    assert first_block("x = 1\nprinter = 2\ndefault = 3") == "x = 1\nprinter = 2\ndefault = 3"
