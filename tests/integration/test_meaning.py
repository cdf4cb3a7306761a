"""What a converted model means does not depend on a library's version, nor on which of its files is read."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.checkpoint.zero import ZeroCheckpoint
from codeparrot_ds.errors import CheckpointError, ConfigError, DataError
from codeparrot_ds.evaluation.loss import validation_loss
from codeparrot_ds.export.certificate import CERTIFICATE, check
from codeparrot_ds.export.convert import convert
from codeparrot_ds.run.recipe import load_recipe
from codeparrot_ds.system.files import digest_bytes, digest_file
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.training.preflight import check_shards
from tests.conftest import Trained, save_recipe

pytestmark = pytest.mark.slow
GB = 1_000_000_000
Copy = Callable[[str], Trained]


@pytest.fixture(scope="module")
def converted(baseline: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "hf"
    convert([source_checkpoint(baseline.run.path)], output, memory_cap_bytes=8 * GB)
    return output


def folded(name: str, value: torch.Tensor) -> torch.Tensor:
    """The value with the queries of layer i, from 0, divided by i + 1. They are the first third of the columns."""
    if ".attn.c_attn." not in name:
        return value
    value, width = value.clone(), value.shape[-1] // 3
    value[..., :width] /= int(name.split(".")[2]) + 1
    return value


def test_the_attention_scale_is_folded_or_kept(baseline: Trained, converted: Path, tmp_path: Path) -> None:
    kept, checkpoint = tmp_path / "kept", source_checkpoint(baseline.run.path)
    certificate = convert([checkpoint], kept, keep_attention_scale=True, memory_cap_bytes=8 * GB)
    assert certificate["attention_scale"] == "kept"
    assert certificate["forward"]["same_weights"]
    assert certificate["forward"]["loss_written"] == certificate["forward"]["loss_master"]
    settings = [json.loads((each / "config.json").read_text()) for each in (kept, converted)]
    assert [each["scale_attn_by_inverse_layer_idx"] for each in settings] == [True, False]
    assert "transformers 5.4" in (kept / "README.md").read_text()
    assert "transformers 5.4" not in (converted / "README.md").read_text()

    masters = dict(ZeroCheckpoint(checkpoint).tensors())
    written: dict[Path, dict[str, torch.Tensor]] = {path: {} for path in (kept, converted)}
    for path, tensors in written.items():
        for file in path.glob("*.safetensors"):
            tensors.update(load_file(file))
    assert all(torch.equal(written[kept][name], value) for name, value in masters.items())
    assert all(torch.equal(written[converted][name], folded(name, value)) for name, value in masters.items())
    digests = check(converted)["tensors"]
    for name, value in masters.items():
        assert digests[name]["master"] == digest_bytes(folded(name, value).reshape(-1).view(torch.uint8).numpy().data)

    # Both are one model, in transformers as a whole and in the recipe's evaluation.
    recipe = load_recipe(baseline.run.recipe)
    losses = [validation_loss(path, recipe.data.sources, 2).loss_valid for path in (kept, converted)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    # A finished directory is kept only if it was asked for in this form.
    with pytest.raises(ConfigError, match="exists"):
        convert([checkpoint], kept, memory_cap_bytes=8 * GB)


def ignore_attention_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make transformers do what it did before 5.4: scaled_dot_product_attention gets no scale of the layer."""
    right = GPT2Attention.__init__

    def wrong(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        right(self, config, *arguments, **options)
        self.scaling = self.head_dim**-0.5

    monkeypatch.setattr(GPT2Attention, "__init__", wrong)


def test_transformers_that_ignores_the_attention_scale_is_noticed(
    baseline: Trained, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, checkpoint = tmp_path / "kept", source_checkpoint(baseline.run.path)
    convert([checkpoint], kept, keep_attention_scale=True, memory_cap_bytes=8 * GB)
    check(kept)
    ignore_attention_scale(monkeypatch)
    with pytest.raises(CheckpointError, match=r"computes another model.*scale_attn_by_inverse_layer_idx.*>=5\.4"):
        check(kept)
    assert check(converted)["attention_scale"] == "folded"  # means the same in every version
    with pytest.raises(CheckpointError, match=r"logits differ from transformers' by up to"):
        convert(
            [source_checkpoint(baseline.run.path)], tmp_path / "new", keep_attention_scale=True, memory_cap_bytes=8 * GB
        )
    convert([checkpoint], tmp_path / "new", memory_cap_bytes=8 * GB)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        (
            "tokenizer_config.json",
            {"model_max_length": 256},
            r"context \(tokens\): 32 in config.*256 in tokenizer_",
        ),
        ("config.json", {"n_ctx": 16}, r"context \(tokens\): 32 in config\.json \(n_positions\), 16 in config\.json"),
        ("config.json", {"vocab_size": 299}, r"vocabulary size: 299 in config\.json"),
        (
            "config.json",
            {"dtype": "bfloat16"},
            r"dtype: 'bfloat16' in config\.json.*'float32' in the tensors",
        ),
        ("config.json", {"n_layer": 1}, r"layers: 1 in config\.json \(n_layer\), 2 in the tensors"),
        ("config.json", {"tie_word_embeddings": False}, r"tied embeddings: False in config\.json"),
        ("config.json", {"eos_token_id": 5}, r"id of the eos token: 5 in config\.json"),
        ("generation_config.json", {"eos_token_id": [7]}, r"id of the eos token: .*7 in generation_config\.json"),
        ("generation_config.json", {"pad_token_id": 3}, None),  # stated once
        ("tokenizer_config.json", {"eos_token": "def"}, r"id of the eos token: .*eos_token 'def'"),
        ("tokenizer_config.json", {"pad_token": "nowhere"}, r"id of the pad token: .*'no id in tokenizer\.json'"),
        ("special_tokens_map.json", {"bos_token": {"content": "class"}}, r"id of the bos token: .*special_tokens_map"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"content": "<s>"}}}, r"added token 0: '<s>' in"),
        ("tokenizer.json", {"truncation": {"max_length": 8}}, r"context \(tokens\): .*8 in tokenizer\.json"),
    ],
)
def test_files_that_contradict_each_other_are_named(
    converted: Path, tmp_path: Path, file: str, changes: dict[str, Any], said: str | None
) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", converted, copy], check=True)
    body = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
    if file == "tokenizer.json":
        changes = {
            "truncation": {**changes["truncation"], "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        }
    (copy / file).write_text(json.dumps({**body, **changes}))
    certificate = json.loads((copy / CERTIFICATE).read_text())
    certificate["files"][file] = digest_file(copy / file)
    (copy / CERTIFICATE).write_text(json.dumps(certificate))
    if said is None:
        check(copy)
        return
    with pytest.raises(CheckpointError, match=said):
        check(copy)


def test_ids_of_another_tokenizer_are_not_taken_for_the_models(
    baseline: Trained, converted: Path, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Its vocabulary has the same size: neither `evaluate loss` nor `model.init_from` would notice."""
    subprocess.run(["cp", "-r", converted, tmp_path / "other"], check=True)
    body = json.loads((converted / "tokenizer.json").read_text())
    vocab = body["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(body))
    sources = load_recipe(baseline.run.recipe).data.sources
    with pytest.raises(DataError, match=r"gives other ids than .*use shards that were built with its tokenizer"):
        validation_loss(tmp_path / "other", sources, 2)
    tiny_recipe["model"]["init_from"] = str(tmp_path / "other")
    recipe = save_recipe(tiny_recipe, tmp_path / "recipe.yaml")
    with pytest.raises(DataError, match=r"gives other ids than .*build the shards with its tokenizer"):
        check_shards(load_recipe(recipe))
    tiny_recipe["model"]["init_from"] = str(converted)
    check_shards(load_recipe(save_recipe(tiny_recipe, tmp_path / "recipe.yaml")))


def test_an_exported_tokenizer_agrees_with_its_model(copy_baseline: Copy, tmp_path: Path) -> None:
    """The tokenizer of training states another limit, cuts and pads, and names other special tokens and another class.

    GPT2Tokenizer would use its own pre-tokenizer, which does not split numbers into digits.
    """
    run = copy_baseline("stated").run
    tokenizer = Tokenizer.from_file(str(run.tokenizer / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), tokenizer.pre_tokenizer]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(run.tokenizer / "tokenizer.json"))
    stated = {"model_max_length": 256, "pad_token": "<pad>", "bos_token": {"content": "<s>"}}
    stated |= {"tokenizer_class": "GPT2Tokenizer", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (run.tokenizer / "tokenizer_config.json").write_text(json.dumps(stated))
    (run.tokenizer / "special_tokens_map.json").write_text(json.dumps({"unk_token": "<unk>"}))
    convert([source_checkpoint(run.path)], tmp_path / "hf", memory_cap_bytes=8 * GB)
    check(tmp_path / "hf")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (loaded.model_max_length, loaded.eos_token, loaded.pad_token_id) == (
        32,
        "<|endoftext|>",
        loaded.eos_token_id,
    )
    text = "def f(x):\n    return 1010101\n" * 3
    assert loaded(text)["input_ids"] == Encoder(tmp_path / "hf").encode(text).tolist()
    assert len(loaded(text)["input_ids"]) > 8
