"""Start from the weights of other models (`model.init_from`): the same function, or an error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from codeparrot_ds.checkpoint.attention_scale import fold, unfold
from codeparrot_ds.errors import CheckpointError, ConfigError, DataError
from codeparrot_ds.run.sections import Model
from codeparrot_ds.training.model import build_model

TINY = Model.model_validate({"vocab_size": 300, "seq_len": 16, "n_layer": 2, "n_head": 2, "n_embd": 32})


@pytest.mark.parametrize("bare", [False, True])
def test_a_model_starts_from_a_hugging_face_directory(tmp_path: Path, bare: bool) -> None:
    source: Any = build_model(TINY, eos_id=0, seed=3)
    plain: Any = transformers.GPT2LMHeadModel(source.config)
    plain.load_state_dict(source.state_dict())
    (plain.transformer if bare else plain).save_pretrained(tmp_path / "gpt2", max_shard_size="50KB")
    started: Any = build_model(Model.model_validate({**TINY.model_dump(), "init_from": tmp_path / "gpt2"}), 0, 1)
    for (name, ours), (_, theirs) in zip(started.named_parameters(), source.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert started.lm_head.weight is started.transformer.wte.weight


@pytest.mark.parametrize("scaled", [False, True])
def test_a_model_that_scales_attention_otherwise_starts_as_the_same_function(tmp_path: Path, scaled: bool) -> None:
    """The directory has the scale of attention as a setting and the recipe has not, or the other way round."""
    there = Model.model_validate({**TINY.model_dump(), "scale_attn_by_inverse_layer_idx": scaled})
    source: Any = build_model(there, eos_id=0, seed=3)
    for parameter in source.parameters():
        parameter.data.mul_(5)  # so that attention is far from uniform
    plain = transformers.GPT2LMHeadModel(source.config)
    plain.load_state_dict(source.state_dict())
    plain.save_pretrained(tmp_path / "gpt2")
    here = {**TINY.model_dump(), "scale_attn_by_inverse_layer_idx": not scaled, "init_from": tmp_path / "gpt2"}
    started: Any = build_model(Model.model_validate(here), 0, 1)
    ids = torch.arange(2 * TINY.seq_len).view(2, -1)
    with torch.no_grad():
        expected, found = source.eval()(ids).logits, started.eval()(ids).logits
        started.transformer.h[1].attn.scaling *= 2.0  # the check is able to see the scale
        other = started(ids).logits
    assert (found - expected).abs().max() < 1e-5
    assert (other - expected).abs().max() > 1e-3
    # Layer 1 is the second: its queries, the first 32 columns, are halved or doubled; layer 0 is unchanged.
    ours, theirs = (m.transformer.h[1].attn.c_attn.weight for m in (started, source))
    assert torch.equal(ours[:, :32], theirs[:, :32] * (0.5 if scaled else 2.0))
    assert torch.equal(ours[:, 32:], theirs[:, 32:])
    assert torch.equal(started.transformer.h[0].attn.c_attn.weight, source.transformer.h[0].attn.c_attn.weight)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_folding_does_not_depend_on_how_a_tensor_is_cut(kind: str) -> None:
    """Layer 2 of hidden size 4: [4, 12] weights, of which the first 4 columns are divided by 3."""
    name = f"transformer.h.2.attn.c_attn.{kind}"
    values = torch.arange(1.0, 49.0) if kind == "weight" else torch.arange(1.0, 13.0)
    expected = values.clone().view(-1, 12)
    expected[:, :4] /= 3
    for size in (1, 5, 12, 13, 48):
        parts = [fold(name, values[at : at + size], 4, at) for at in range(0, len(values), size)]
        assert torch.equal(torch.cat(parts), expected.flatten())
    assert torch.equal(unfold(name, torch.tensor([1.0, 2.0]), 4, start=3), torch.tensor([3.0, 2.0]))
    for other in ("transformer.h.2.attn.c_proj.weight", "transformer.h.2.mlp.c_fc.weight", "transformer.wte.weight"):
        assert fold(other, values, 4) is values


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_head": 4}, "n_head is 4, but the recipe's model has 2"),  # the weights have the same shapes
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"activation_function": "relu"}, "activation_function 'relu' is not supported"),
        ({"scale_attn_weights": False}, "scale_attn_weights False is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False is not supported"),
        ({"model_type": "gpt_bigcode"}, "model_type 'gpt_bigcode' is not supported"),
    ],
)
def test_a_directory_that_means_another_model_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    source: Any = build_model(TINY, eos_id=0, seed=3)
    source.save_pretrained(tmp_path / "gpt2")
    config = tmp_path / "gpt2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises((CheckpointError, DataError), match=said):
        build_model(Model.model_validate({**TINY.model_dump(), "init_from": tmp_path / "gpt2"}), 0, 1)


def test_weights_that_contradict_their_configuration_are_refused(tmp_path: Path) -> None:
    source: Any = build_model(TINY, eos_id=0, seed=3)
    source.save_pretrained(tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.1.ln_1.bias"] = torch.ones(33)
    del tensors["transformer.h.1.ln_2.bias"]
    save_file(tensors, file, {"format": "pt"})
    said = r"(?s)2 problems.*h\.1\.ln_1\.bias: its shape is \[33\].*ln_2\.bias is missing"
    with pytest.raises(CheckpointError, match=said):
        build_model(Model.model_validate({**TINY.model_dump(), "init_from": tmp_path / "gpt2"}), 0, 1)


def test_a_tensor_in_two_files_and_another_head_are_refused(tmp_path: Path) -> None:
    source: Any = build_model(TINY, eos_id=0, seed=3)
    source.save_pretrained(tmp_path / "gpt2")
    save_file({"transformer.ln_f.bias": torch.ones(32)}, tmp_path / "gpt2" / "model-00001-of-00002.safetensors")
    head = {"lm_head.weight": torch.ones(TINY.vocab_size, 32)}
    save_file(head, tmp_path / "gpt2" / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)2 problems.*ln_f\.bias is in both model-.*lm_head\.weight differs"):
        build_model(Model.model_validate({**TINY.model_dump(), "init_from": tmp_path / "gpt2"}), 0, 1)


@pytest.mark.parametrize("version", ["5.3.9", "4.57.6"])
def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(ConfigError, match=rf"transformers {version} is installed, but 5\.4 is needed"):
        build_model(TINY, eos_id=0, seed=1)


@pytest.mark.parametrize("version", ["5.4.0", "5.23.0.dev0", "6.0"])
def test_a_new_transformers_is_not(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    build_model(TINY, eos_id=0, seed=1)


def test_a_directory_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    wider = Model.model_validate({**TINY.model_dump(), "n_embd": 2 * TINY.n_embd})
    plain: Any = transformers.GPT2LMHeadModel(build_model(wider, eos_id=0, seed=3).config)
    plain.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match=rf"n_embd is {wider.n_embd}, but the recipe's model has {TINY.n_embd}"):
        build_model(Model.model_validate({**TINY.model_dump(), "init_from": tmp_path / "gpt2"}), 0, 1)
    with pytest.raises(DataError, match=r"nowhere/config\.json: no such file"):
        build_model(Model.model_validate({**TINY.model_dump(), "init_from": tmp_path / "nowhere"}), 0, 1)
