"""Values of YAML files and of `--set` are what the type of their key says, however they look."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from codeparrot_ds.corpus.options import load_cleaning
from codeparrot_ds.errors import ConfigError
from codeparrot_ds.planning.tune import _with_choice
from codeparrot_ds.run.recipe import PATHS, Recipe, load_recipe, make_paths_absolute, read_recipe
from codeparrot_ds.system.typed_yaml import Section, Text, dump_yaml, parse_yaml, read_as
from tests.conftest import ROOT, save_recipe

QUICKSTART = ROOT / "launch" / "recipes" / "quickstart.yaml"


def value_of(recipe: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


# What YAML 1.1 takes for a date, an octal number, a number of seconds, a boolean, nothing, or text.
VALUES = [
    ("name", "2026-11-24", "2026-11-24"),
    ("name", "0100", "0100"),
    ("name", "26e9", "26e9"),
    ("name", "1_000", "1_000"),
    ("name", "on", "on"),
    ("name", "No", "No"),
    ("name", "null", "null"),
    ("seed", "0100", 100),
    ("seed", "010", 10),
    ("seed", "1_000", 1000),
    ("seed", "1e3", 1000),
    ("seed", "2.6e+10", 26_000_000_000),
    ("seed", "26e9", 26_000_000_000),
    ("seed", "0x10", 16),
    ("seed", "0o10", 8),
    ("seed", "+7", 7),
    ("seed", "9007199254740993", 2**53 + 1),
    ("optimizer.learning_rate", "1e-4", 1e-4),
    ("optimizer.learning_rate", "5", 5.0),
    ("optimizer.learning_rate", ".5", 0.5),
    ("optimizer.learning_rate", "1_0.5", 10.5),
    ("engine.compile", "on", True),
    ("engine.compile", "yes", True),
    ("engine.compile", "True", True),
    ("engine.compile", "off", False),
    ("engine.compile", "0", False),
    ("data.shards", "2024", Path("2024")),
    ("data.shards", "2024-01-01", Path("2024-01-01")),
    ("data.shards", "on", Path("on")),
    ("data.shards", "{2024: 0.5, on: 1, 1:30: 2}", {Path("2024"): 0.5, Path("on"): 1.0, Path("1:30"): 2.0}),
    ("model.init_from", "null", None),
    ("model.init_from", "~", None),
    ("model.init_from", "'null'", Path("null")),
    ("checkpoints.every_minutes", "null", None),
    ("checkpoints.every_minutes", "1e1", 10.0),
    ("optimizer.betas", "[9e-1, .95]", (0.9, 0.95)),
    ("batch.micro_batch_size", "auto", "auto"),
    ("batch.micro_batch_size", "8", 8),
    ("engine.allow_untested", "[on, 010]", ("on", "010")),
]


@pytest.mark.parametrize(("key", "text", "expected"), VALUES, ids=lambda value: str(value)[:30])
def test_a_value_is_what_its_key_holds(key: str, text: str, expected: Any, tmp_path: Path) -> None:
    found = value_of(load_recipe(QUICKSTART, [f"{key}={text}"]), key)
    assert found == expected
    assert type(found) is type(expected)
    body = yaml.safe_load(QUICKSTART.read_text())
    section, _, last = key.rpartition(".")
    (body.setdefault(section, {}) if section else body)[last] = "VALUE"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(body).replace("VALUE", text))  # in a file, the same rules hold
    assert value_of(load_recipe(tmp_path / "r.yaml"), key) == expected


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=1:30", "seed: must be a whole number (got '1:30')"),
        ("seed=1.5", "seed: must be a whole number (got '1.5')"),
        ("seed=1e999", "seed: must be a whole number (got '1e999')"),
        ("seed=1,000", "seed: must be a whole number (got '1,000')"),
        ("seed=", "seed: must be a whole number, but has no value"),
        ("seed=null", "seed: must be a whole number (got 'null')"),
        ("seed=" + "9" * 5000, "seed: must be a whole number"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: must be a number (got '.inf')"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate: must be a number (got 'nan')"),
        ("optimizer.learning_rate=1:30", "optimizer.learning_rate: must be a number (got '1:30')"),
        ("guards.hang_seconds=1e999", "guards.hang_seconds: must be a number or null (got '1e999')"),
        ("engine.compile=2026-11-24", "engine.compile: must be true or false (got '2026-11-24')"),
        ("engine.precision=off", "engine.precision: must be 'bf16', 'fp16' or 'fp32' (got 'off')"),
        ("batch.micro_batch_size=many", "batch.micro_batch_size: must be a whole number or 'auto' (got 'many')"),
        ("data.shards=[a]", "data.shards: must be a path (got ['a']); or must be a mapping (got ['a'])"),
        ("data.shards={a: -1}", "data.shards.a: must be greater than 0 (got -1.0)"),
        ("optimizer.betas=0.9", "optimizer.betas: must be a list (got '0.9')"),
        ("optimizer.betas=[0.9, on]", "optimizer.betas: must be a number"),
        ("model=5", "model: must be a section: a mapping of keys to values (got '5')"),
        ("name={a: b}", "name: must be text"),
    ],
)
def test_a_value_of_another_type_is_explained(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_recipe(QUICKSTART, [override])
    assert said in str(refused.value)
    assert "pydantic" not in str(refused.value)
    assert "Input should" not in str(refused.value)


def test_the_same_rules_hold_for_the_file_of_corpus_clean(tmp_path: Path) -> None:
    path = tmp_path / "clean.yaml"
    path.write_bytes("\ufeffnear_duplicates:\n  jaccard: 9e-1\n  bands: 0021\nheuristics: ~\nsecrets:\n".encode())
    rules = load_cleaning(path)
    assert (rules.near_duplicates.jaccard, rules.near_duplicates.bands) == (0.9, 21)  # type: ignore[union-attr]
    assert (rules.heuristics, rules.secrets) == (None, None)
    path.write_text("licences: {allowed: [2024, on]}\n")
    assert load_cleaning(path).licences.allowed == ("2024", "on")
    path.write_text("near_duplicates: {bands: 1:30}\nnear_duplicates: {}\n")
    with pytest.raises(ConfigError, match="near_duplicates appears twice in one section"):
        load_cleaning(path)


@pytest.mark.parametrize(
    "repeated", ["seed: 1\nseed: 2\n", "model: {n_layer: 1, n_layer: 1}\n", "a: {<<: {b: 1}, c: 1, c: 2}\n"]
)
def test_a_key_given_twice_is_refused(repeated: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(repeated)
    with pytest.raises(ConfigError, match="appears twice in one section"):
        read_recipe(tmp_path / "r.yaml")


def test_an_override_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--set seed=2: seed is set twice, also by seed=1\. Remove one"):
        load_recipe(QUICKSTART, ["seed=1", "name=x", "seed=2"])


def test_a_trial_replaces_the_overrides_of_its_keys() -> None:
    class Choice:
        """Stands for `planning.plan.Choice`."""

        def overrides(self) -> list[str]:
            """See `planning.plan.Choice`."""
            return ["seed=2"]

    assert _with_choice(["seed=1", "name=x"], Choice()) == ["name=x", "seed=2"]  # type: ignore[arg-type]


def test_merged_sections_keep_their_own_keys() -> None:
    text = b"a: &one {x: 1, y: 2}\nb: &two {<<: *one, y: 3}\nc: {<<: *two, x: 0}\n"
    assert parse_yaml(text, "f")["c"] == {"x": "0", "y": "3"}


@pytest.mark.parametrize("text", ["'010'", '"null"', "2026-11-24", "on", "~", "", "[a, 1e3]", "{2024: 0x10}"])
def test_what_is_read_is_written_as_it_was(text: str) -> None:
    once = parse_yaml(f"key: {text}\n".encode(), "f")
    again = parse_yaml(dump_yaml(once).encode(), "f")
    assert again == once
    assert getattr(again["key"], "plain", None) == getattr(once["key"], "plain", None)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Co", "Cn"]), min_size=1))
def test_a_text_is_never_taken_for_something_else(text: str) -> None:
    assert read_as(str, Text(text)) == text
    assert parse_yaml(dump_yaml({"k": Text(text, plain=False)}).encode(), "f") == {"k": text}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_reads_as_itself(number: float) -> None:
    assert read_as(float, Text(repr(number))) == number


@given(st.integers(-(10**25), 10**25))
def test_every_integer_reads_as_itself(number: int) -> None:
    assert read_as(int, Text(f"{number:_}")) == read_as(int, Text(str(number))) == number


def test_a_section_refuses_numbers_that_are_not_finite() -> None:
    class Limits(Section):
        """A section."""

        most: float

    for number in (math.inf, math.nan):
        with pytest.raises(ValueError, match="finite"):
            Limits.model_validate({"most": number})


def test_paths_are_expanded_and_all_are_known(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = {key: f"~/{key}" for key in PATHS}
    recipe = load_recipe(
        save_recipe(tiny_recipe, tmp_path / "r.yaml"), [f"{key}={each}" for key, each in given.items()]
    )
    flat = {f"{name}.{key}": each for name, part in recipe if isinstance(part, Section) for key, each in part}
    flat |= dict(recipe)
    assert {key for key, each in flat.items() if isinstance(each, Path)} == set(PATHS)
    assert {key: str(flat[key]) for key in PATHS} == {key: f"/home/me/{key}" for key in PATHS}
    both = load_recipe(tmp_path / "r.yaml", ["data.shards={~/a: 1, ~nobody-here/b: 2}"])
    assert list(both.data.sources) == [Path("/home/me/a"), Path("~nobody-here/b")]


def test_a_recipe_that_is_written_has_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = read_recipe(QUICKSTART, ["data.shards={a: 1, /b: 2}", "model.init_from=null"])
    make_paths_absolute(body)
    assert body["engine"]["deepspeed"] == str(ROOT / "codeparrot_ds" / "ds_configs" / "zero3.json")  # as shipped
    (tmp_path / "written.yaml").write_text(dump_yaml(body))
    written = load_recipe(tmp_path / "written.yaml")
    assert list(written.data.sources) == [tmp_path / "a", Path("/b")]
    assert written.model.init_from is None
    plain = load_recipe(QUICKSTART, ["data.shards={a: 1, /b: 2}"])
    keep = {"data", "engine"}
    assert written.model_dump(exclude=keep) == plain.model_dump(exclude=keep)
    assert isinstance(written, Recipe)
