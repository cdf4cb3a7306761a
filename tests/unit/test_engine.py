"""Settings of PyTorch that belong to a run's engine."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from codeparrot_ds.run.recipe import Recipe
from codeparrot_ds.run.sections import Engine
from codeparrot_ds.training.engine import build_engine, exact_matmul


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_an_evaluation_computes_matrix_products_in_fp32() -> None:
    """The result is that of fp32, also where the processor has instructions for bfloat16."""
    torch.manual_seed(0)
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    torch.set_float32_matmul_precision("highest")
    expected = left @ right
    torch.set_float32_matmul_precision("medium")
    with exact_matmul():
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.equal(left @ right, expected)
    assert torch.get_float32_matmul_precision() == "medium"
    with pytest.raises(RuntimeError, match="stopped"), exact_matmul():
        raise RuntimeError("stopped")
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("wanted", ["medium", "highest"])
def test_the_recipe_sets_the_precision_of_matrix_products(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def initialize(*arguments: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return SimpleNamespace(_config=None)

    monkeypatch.setattr("codeparrot_ds.training.zero1.initialize", initialize)
    monkeypatch.setattr("codeparrot_ds.training.writer.CheckpointWriter", lambda config: None)
    body = {
        "name": "tiny",
        "model": {"vocab_size": 8, "seq_len": 8},
        "data": {"shards": "shards"},
        "batch": {"global_batch_size": 1},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"steps": 1},
        "engine": {"deepspeed": "zero1", "precision": "fp32", "float32_matmul_precision": wanted},
    }
    build_engine(torch.nn.Linear(2, 2), Recipe.model_validate(body), {"zero_optimization": {"stage": 1}})
    assert seen == [wanted]


def test_the_precision_of_matrix_products_is_refused_where_it_has_no_effect() -> None:
    body = {"deepspeed": "zero1", "precision": "bf16", "float32_matmul_precision": "medium"}
    with pytest.raises(ValueError, match="medium has no effect with precision bf16: remove it"):
        Engine.model_validate(body)
    assert Engine.model_validate(body | {"precision": "fp32"}).float32_matmul_precision == "medium"
    assert Engine.model_validate(body | {"float32_matmul_precision": "highest"}).precision == "bf16"
