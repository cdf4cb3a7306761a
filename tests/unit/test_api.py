"""The names that scripts import: what they accept and refuse, and what importing them costs."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import codeparrot_ds
from codeparrot_ds import api, complete, load_recipe, open_shards, sequences_of_step, validation_loss
from codeparrot_ds.errors import ConfigError, DataError
from tests.conftest import SEQ_LEN, save_recipe
from tests.unit.test_architecture import heavy_imports


def test_importing_the_package_is_free_and_its_names_do_not_need_torch() -> None:
    assert heavy_imports("import codeparrot_ds; dir(codeparrot_ds)") == set()
    assert not heavy_imports("from codeparrot_ds import *") & {"torch", "transformers", "deepspeed", "datasets"}


def test_each_name_is_there_and_documented_and_no_other_is() -> None:
    for name in codeparrot_ds.__all__:
        assert name in dir(codeparrot_ds)
        assert getattr(codeparrot_ds, name) is getattr(api, name)
    functions = [getattr(api, name) for name in codeparrot_ds.__all__ if name.islower()]
    for function in functions:
        text = inspect.getdoc(function) or ""
        assert all(f"\n    {name}: " in text for name in inspect.signature(function).parameters), function
        assert "\nRaises:\n" in text and f"{function.__name__}(" in text, function
    with pytest.raises(AttributeError, match="no attribute 'np'"):
        _ = codeparrot_ds.np  # type: ignore[attr-defined]


def test_recipes_and_shards_are_named_by_text_or_path(
    data: Path, tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = save_recipe(tiny_recipe, tmp_path / "tiny.yaml")
    (tmp_path / "shards").symlink_to(data / "shards")
    recipe = load_recipe("~/tiny.yaml", ["schedule.steps=9"])
    assert recipe.schedule.steps == 9
    assert load_recipe(path).model == recipe.model
    assert load_recipe("codeparrot-xl").model.n_layer == 48
    opened = open_shards("~/shards", SEQ_LEN)
    assert opened.digest == open_shards(recipe.data.sources, SEQ_LEN).digest
    assert len(open_shards({"~/shards": 0.5, data / "shards": 0.5}, SEQ_LEN).train) == 2 * len(opened.train)
    assert opened.train.batch(np.arange(3)).shape == (3, SEQ_LEN + 1)
    assert opened.eos_id == opened.manifests[0].eos_id


def test_the_ranks_of_a_step_share_what_it_reads(data: Path, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(save_recipe(tiny_recipe, tmp_path / "tiny.yaml"))
    opened = open_shards(data / "shards", SEQ_LEN)
    batch = recipe.batch.global_batch_size
    expected = opened.order(recipe.seed).take(5 * batch, batch).tolist()
    assert sequences_of_step(recipe, 5).tolist() == expected
    parts = [sequences_of_step(recipe, 5, rank=rank, world_size=4, data=opened) for rank in range(4)]
    assert np.concatenate(parts).tolist() == expected and parts[0].dtype == np.int64


def test_what_is_out_of_range_is_named(data: Path, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(save_recipe(tiny_recipe, tmp_path / "tiny.yaml"))
    for step, rank, world_size in ((-1, 0, 2), (0, -1, 2), (0, 2, 2), (0, None, 0), (0, None, 3)):
        with pytest.raises(ConfigError, match="rank"):
            sequences_of_step(recipe, step, rank=rank, world_size=world_size)
    for shards, seq_len in ((data / "shards", 0), ({}, 8)):
        with pytest.raises(ConfigError, match="at least 1"):
            open_shards(shards, seq_len)
    with pytest.raises(DataError, match="no shards manifest"):
        open_shards(tmp_path, 8)
    model: Any = None  # arguments are checked first
    with pytest.raises(ConfigError, match=r"5 problems(.|\n)*num 0(.|\n)*seed -1"):
        complete(model, "x", num=0, temperature=-1, top_p=0, max_new_tokens=0, seed=-1)
    with pytest.raises(ConfigError, match="top_p nan"):
        complete(model, "x", top_p=float("nan"))
    with pytest.raises(ConfigError, match="sequences 0"):
        validation_loss(model, data / "shards", sequences=0)
