"""Step-by-step comparison of two runs: first difference of data and losses, and runs that cannot be compared."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from codeparrot_ds.cli.output import parse_steps
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.report.compare import Peak, compare
from codeparrot_ds.report.compare_text import as_rows, as_table
from codeparrot_ds.run.directory import RunDirectory

COMMAND = Path(sys.executable).with_name("codeparrot-ds")
STEPS = 40


def train_row(step: int, **changed: Any) -> dict[str, Any]:
    """Return a row as training writes it."""
    return {
        "kind": "train",
        "step": step,
        "loss": 6.0 - step / 16,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "samples_seen": (step + 1) * 4,
        "skipped_steps": 0,
        "batch_digest": f"{step:016x}",
        **changed,
    }


def valid_row(step: int, **changed: Any) -> dict[str, Any]:
    """Return a row as evaluation writes it."""
    return {"kind": "valid", "step": step, "loss_valid": 6.5 - step / 16, "perplexity_valid": 1.0, **changed}


def rows_of(steps: int = STEPS, changed: dict[int, dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a run of `steps` steps, evaluated at start and end; `changed` overrides rows by step."""
    train = [train_row(step, **(changed or {}).get(step, {})) for step in range(steps)]
    return [valid_row(0), *train, valid_row(steps)]


Make = Callable[..., RunDirectory]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a run directory: `make(name, rows, batch=4, tail="", engine=..., **recipe)`."""

    def write(
        name: str,
        rows: list[dict[str, Any]] | None = None,
        *,
        batch: int = 4,
        tail: str = "",
        engine: dict[str, Any] | None = None,
        status: dict[str, Any] | None = None,
        **recipe: Any,
    ) -> RunDirectory:
        run = RunDirectory(tmp_path / name)
        run.path.mkdir()
        body = {
            "name": name,
            "seed": 1,
            "runs": str(tmp_path / f"runs-of-{name}"),
            "batch": {"global_batch_size": batch},
            "engine": {"deepspeed": str(run.ds_config), "precision": "fp32"},
            "logging": {"every_steps": 2},
            **recipe,
        }
        run.recipe.write_text(yaml.safe_dump(body))
        run.ds_config.write_text(json.dumps(engine or {"zero_optimization": {"stage": 3}}))
        run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows or rows_of()) + tail)
        run.write_status(**(status or {"state": "finished", "world_size": 2}))
        return run

    return write


def command(*arguments: str | Path | RunDirectory) -> subprocess.CompletedProcess[str]:
    """Run `codeparrot-ds compare`."""
    words = [str(a.path) if isinstance(a, RunDirectory) else str(a) for a in arguments]
    return subprocess.run([str(COMMAND), "compare", *words], capture_output=True, text=True, timeout=120, check=False)


def test_equal_runs_are_bit_identical(make: Make) -> None:
    found = compare(make("a"), make("b"), tolerance=0)
    assert found.same
    assert found.recipe == {}
    assert (found.data.steps, found.data.different, found.data.first_different) == (STEPS, 0, None)
    assert (found.loss.different, found.loss.first_beyond, found.loss.absolute) == (0, None, Peak(0.0, 0))
    assert found.loss_valid.steps == 2
    rows = dict(as_rows(found))
    assert rows["data"] == "same digests at all 40 common steps"
    assert rows["training loss"] == "bit-identical at all 40 common steps"
    assert rows["validation loss"] == "bit-identical at all 2 common steps"
    assert rows["verdict"] == "same data, equal losses"


def test_different_data_is_found_at_the_first_step_that_differs(make: Make) -> None:
    parted = {step: {"batch_digest": "f" * 16} for step in (17, 18, 30)}
    found = compare(make("a"), make("b", rows_of(changed=parted)))
    assert not found.same
    assert (found.data.first_different, found.data.different) == (17, 3)
    assert found.loss.first_beyond is None
    assert [row.step for row in found.table if not row.same_data] == [17, 18]
    assert {15, 16, 17, 18, 19, 20} <= {row.step for row in found.table}
    assert dict(as_rows(found))["data"] == "first difference at step 17; 3 of 40 steps differ"
    assert dict(as_rows(found))["verdict"] == "different data, equal losses"


def test_diverging_losses_are_measured_and_compared_with_the_tolerance(make: Make) -> None:
    # 1e-9 at step 9; 3e-3 at step 20, of 4.75: 6.3e-4; 2.5e-3 at step 36, of 3.75: 6.7e-4, the largest share.
    apart = {9: 1e-9, 20: 3e-3, 36: 2.5e-3}
    changed = {step: {"loss": 6.0 - step / 16 - difference} for step, difference in apart.items()}
    a, b = make("a"), make("b", rows_of(changed=changed))
    found = compare(a, b)
    assert found.same
    assert not found.data.different
    assert (found.loss.first_different, found.loss.different, found.loss.first_beyond) == (9, 3, None)
    assert found.loss.absolute is not None and found.loss.relative is not None
    assert (found.loss.absolute.step, found.loss.relative.step) == (20, 36)
    assert math.isclose(found.loss.absolute.difference, 3e-3)
    assert math.isclose(found.loss.relative.difference, 2.5e-3 / 3.75)
    assert {7, 8, 9, 10, 11, 12, 20} <= {row.step for row in found.table}
    assert next(row for row in found.table if row.step == 20).difference == pytest.approx(-3e-3)
    assert compare(a, b, tolerance=5e-4).loss.first_beyond == 20
    assert compare(a, b, tolerance=6.5e-4).loss.first_beyond == 36
    assert 36 in {row.step for row in compare(a, b, tolerance=6.5e-4).table}
    assert compare(a, b, tolerance=0).loss.first_beyond == 9
    assert compare(b, a, tolerance=6.5e-4).loss == compare(a, b, tolerance=6.5e-4).loss


def test_the_table_shows_the_first_difference_in_data_or_loss(make: Make) -> None:
    a = make("a")
    loss_first = make("b", rows_of(changed={11: {"loss": 5.0}, 27: {"batch_digest": "0"}}))
    data_first = make("c", rows_of(changed={11: {"batch_digest": "0"}, 27: {"loss": 5.0}}))
    for other in (loss_first, data_first):
        assert {9, 10, 11, 12, 13, 14} <= {row.step for row in compare(a, other).table}


def test_one_unit_in_the_last_place_is_a_difference(make: Make) -> None:
    next_up = {5: {"loss": math.nextafter(train_row(5)["loss"], 9.0)}}
    a, b = make("a"), make("b", rows_of(changed=next_up))
    assert compare(a, b).loss.first_different == 5
    assert compare(a, b).same
    assert not compare(a, b, tolerance=0).same


def test_validation_losses_count_and_learning_rates_do_not(make: Make) -> None:
    rates = {step: {"learning_rate": 2e-3} for step in range(30, STEPS)}
    a, b = make("a"), make("b", rows_of(changed=rates))
    found = compare(a, b)
    assert found.same
    assert found.learning_rate.first_different == 30
    apart = make("c", [*rows_of()[:-1], valid_row(STEPS, loss_valid=9.0)])
    assert not compare(a, apart).same
    assert compare(a, apart).loss_valid.first_different == STEPS
    assert dict(as_rows(compare(a, apart)))["verdict"] == "same data, validation losses beyond 0.001"
    never = make("d", [row for row in rows_of() if row["kind"] == "train"])
    assert compare(a, never).same
    assert dict(as_rows(compare(a, never)))["validation loss"] == "not recorded at any common step"


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_a_null_loss_equals_only_another_null(make: Make, nothing: float | None) -> None:
    """Training writes null; Python's json would also write and read NaN."""
    broken = rows_of(changed={25: {"loss": nothing}})
    a, b, also = make("a"), make("b", broken), make("c", broken)
    found = compare(a, b, tolerance=10)
    assert not found.same
    assert (found.loss.first_beyond, found.loss.not_finite) == (25, 1)
    assert found.loss.absolute == Peak(0.0, 0)
    assert "largest difference" not in str(as_rows(found))
    assert next(line for line in as_table(found) if line.split()[0] == "25").endswith("not finite           -")
    both = compare(b, also, tolerance=0)
    assert both.same
    assert dict(as_rows(both))["training loss"] == "bit-identical at all 40 common steps; 1 step not finite"
    nowhere = rows_of(2, {0: {"loss": nothing}, 1: {"loss": nothing}})
    assert compare(make("d", nowhere), make("e", nowhere)).loss.absolute is None


def test_a_truncated_last_line_is_skipped(make: Make) -> None:
    whole = json.dumps(train_row(10, loss=99.0))
    killed = make("b", rows_of(10)[:-1], tail=whole[: len(whole) // 2], status={"state": "running"})
    found = compare(make("a"), killed)
    assert found.same
    assert (found.data.steps, found.last_step, found.a.only_here, found.b.only_here) == (10, 9, 30, 0)
    assert found.b.state == "running"
    assert dict(as_rows(found))["common steps"] == "10, from 0 to 9; 30 only in A"
    killed.metrics.write_text(killed.metrics.read_text() + whole[len(whole) // 2 :] + "\n")
    assert compare(make("c"), killed).loss.first_beyond == 10


def test_a_run_without_status_and_engine_settings_is_compared(make: Make) -> None:
    run = make("b")
    run.status_file.unlink()
    run.ds_config.unlink()
    found = compare(make("a"), run)
    assert found.same
    assert found.recipe == {"ds_config.zero_optimization.stage": (3, None)}
    assert found.b.state is None
    assert "no status" in dict(as_rows(found))["B"]


def test_of_repeated_steps_the_last_rows_count(make: Make) -> None:
    """The run was at step 30, went back to 20 and was killed at 25: rows beyond 25 are from its first life."""
    first = [row for row in rows_of(30, {step: {"loss": 50.0} for step in range(20, 30)}) if row["kind"] == "train"]
    again = [train_row(step) for step in range(20, 25)]
    whole = make("a", [*rows_of(), valid_row(30)])
    found = compare(whole, make("b", [valid_row(0), *first, valid_row(30, loss_valid=1.0), *again]))
    assert found.same
    assert (found.b.steps, found.b.taken_again, found.last_step) == (25, 10, 24)
    assert found.loss_valid.steps == 1
    assert "10 rows of repeated steps" in dict(as_rows(found))["B"]


def test_the_evaluation_of_the_restored_weights_stays(make: Make) -> None:
    evaluated = [*rows_of(20), *(train_row(step) for step in (20, 21)), train_row(20)]
    found = compare(make("a", evaluated), make("b", evaluated))
    assert found.loss_valid.steps == 2
    assert found.a.taken_again == 2


def test_runs_of_other_length_are_compared_where_both_have_steps(make: Make) -> None:
    """B started from A's weights of step 30 and trained on."""
    later = [train_row(step) for step in range(30, 50)]
    found = compare(make("a"), make("b", later))
    assert found.same
    assert (found.first_step, found.last_step, found.data.steps) == (30, 39, 10)
    assert (found.a.only_here, found.b.only_here) == (30, 10)


def test_steps_can_be_chosen(make: Make) -> None:
    changed = {5: {"loss": 9.0}, 20: {"batch_digest": "0"}}
    a, b = make("a"), make("b", rows_of(changed=changed))
    assert not compare(a, b).same
    between = compare(a, b, first=6, end=20)
    assert between.same
    assert (between.first_step, between.last_step, between.a.steps, between.loss_valid.steps) == (6, 19, 14, 0)
    assert compare(a, b, first=21, end=STEPS).loss_valid.steps == 1  # of the weights after the last of these steps
    assert compare(a, b, first=20).data.first_different == 20


@pytest.mark.parametrize(
    ("text", "steps"), [(":", (0, None)), ("5:", (5, None)), (":7", (0, 7)), (" 100:200 ", (100, 200))]
)
def test_ranges_of_steps(text: str, steps: tuple[int, int | None]) -> None:
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "5", "7:7", "9:3", "-3:4", "1:2:3", "a:b", ":0"])
def test_invalid_ranges_of_steps(text: str) -> None:
    with pytest.raises(ConfigError, match="write them like 100:200"):
        parse_steps(text)


def test_recipe_keys_that_differ_are_named(make: Make) -> None:
    a = make("a", optimizer={"learning_rate": 1e-3, "betas": [0.9, 0.95]}, seed=1)
    b = make("b", optimizer={"learning_rate": 2e-3, "betas": [0.9, 0.95]}, seed=2, engine={"zero_optimization": {}})
    found = compare(a, b)
    assert found.same
    assert found.recipe == {
        "seed": (1, 2),
        "optimizer.learning_rate": (1e-3, 2e-3),
        "ds_config.zero_optimization.stage": (3, None),
        "ds_config.zero_optimization": (None, {}),
    }
    rows = dict(as_rows(found))
    assert rows["recipe"] == "4 keys differ"
    assert rows["  optimizer.learning_rate"] == "0.001 | 0.002"
    assert rows["  ds_config.zero_optimization.stage"] == "3 | -"


def test_runs_of_other_global_batches_are_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"takes 4 sequences per step, .*b 8 .*steps do not correspond"):
        compare(make("a"), make("b", batch=8))


def test_the_table_stays_short(make: Make) -> None:
    changed = {step: {"loss": 1.0} for step in range(700, 3000)}
    found = compare(make("a", rows_of(3000)), make("b", rows_of(3000, changed)))
    steps = [row.step for row in found.table]
    assert steps == sorted(set(steps))
    assert {0, 698, 699, 700, 701, 702, 703, 2999} <= set(steps)
    assert len(steps) <= 14
    assert len(as_table(found)) == len(steps) + 1


def test_a_directory_that_is_no_run_is_reported(make: Make, tmp_path: Path) -> None:
    a = make("a")
    with pytest.raises(DataError, match="no-such: no such run"):
        compare(a, RunDirectory(tmp_path / "no-such"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no run here"):
        compare(a, RunDirectory(tmp_path / "empty"))
    early = make("early")
    for content in ("", '{"kind": "tr', json.dumps(valid_row(0)) + "\n"):
        early.metrics.write_text(content)
        with pytest.raises(DataError, match=r"no training step recorded.*every_steps \(2\)"):
            compare(a, early)
    early.metrics.unlink()
    with pytest.raises(DataError, match="no training step recorded"):
        compare(a, early)
    with pytest.raises(DataError, match=r"no common steps: .*a has steps 0 to 39, .*late has steps 90 to 90"):
        compare(a, make("late", [train_row(90)]))
    with pytest.raises(DataError, match=r"no common steps within --steps 50:60"):
        compare(a, make("other"), first=50, end=60)


@pytest.mark.parametrize("tolerance", [-1e-3, math.nan, math.inf])
def test_a_tolerance_is_0_or_a_positive_number(make: Make, tolerance: float) -> None:
    with pytest.raises(ConfigError, match="tolerance"):
        compare(make("a"), make("b"), tolerance)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("recipe.yaml", b"{", "not valid YAML"),
        ("recipe.yaml", b"- 1", "not the recipe of a run"),
        ("ds_config.json", b"{", "not valid JSON"),
        ("status.json", b"[]", "not a run status"),
        ("metrics.jsonl", b"\xff\xfe", "damaged"),
        ("metrics.jsonl", b'{"step": 1}\n', "row 1 is not a valid training record"),
        ("metrics.jsonl", b'{"kind": "train", "step": 1}\n', "row 1 is not a valid training record"),
        ("metrics.jsonl", b"7\n", "row 1 is not a valid training record"),
    ],
)
def test_damage_is_one_message(make: Make, file: str, content: bytes, expected: str) -> None:
    run = make("b")
    (run.path / file).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        compare(make("a"), run)


def test_the_exit_code_tells_whether_the_runs_are_the_same(make: Make) -> None:
    a, b = make("a"), make("b")
    slightly = make("slightly", rows_of(changed={3: {"loss": train_row(3)["loss"] + 1e-6}}))
    other = make("other", rows_of(changed={8: {"batch_digest": "0"}}))
    done = command(a, b, "--tolerance", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "same data, equal losses" in done.stdout
    assert command(a, slightly).returncode == 0
    strict = command(a, slightly, "--tolerance", "0")
    assert (strict.returncode, strict.stderr) == (1, "")
    assert "same data, training losses beyond 0" in strict.stdout
    parted = command(a, other)
    assert (parted.returncode, parted.stderr) == (1, "")
    assert [line.split()[1] for line in parted.stdout.splitlines() if line.split()[:1] == ["8"]] == ["differs"]
    assert command(a, other, "--steps", "9:").returncode == 0
    assert command(a).returncode == 2


def test_json_is_one_object_that_says_the_same(make: Make) -> None:
    a = make("a", seed=1)
    b = make("b", rows_of(changed={8: {"batch_digest": "0", "loss": None}}), seed=2)
    done = command(a, b, "--json")
    assert done.returncode == 1

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    printed = json.loads(done.stdout, parse_constant=no_constant)
    assert printed == json.loads(json.dumps(compare(a, b).to_dict()))
    assert printed["same"] is False
    assert printed["recipe"] == {"seed": [1, 2]}
    assert printed["data"] == {"steps": STEPS, "different": 1, "first_different": 8}
    assert printed["loss"]["first_beyond"] == 8
    assert printed["loss"]["absolute"] == {"difference": 0.0, "step": 0}
    row = next(row for row in printed["table"] if row["step"] == 8)
    assert row == {"step": 8, "same_data": False, "loss_a": 5.5, "loss_b": None, "difference": None}
    same = command(a, a, "--json")
    assert (same.returncode, json.loads(same.stdout)["same"]) == (0, True)


def test_errors_are_one_message_on_standard_error(make: Make, tmp_path: Path) -> None:
    done = command(make("a"), tmp_path / "no-such", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'no-such'}: no such run")


def test_comparing_loads_no_torch(make: Make) -> None:
    a, b = make("a"), make("b")
    code = """
import sys
from pathlib import Path
from codeparrot_ds.report.compare import compare
from codeparrot_ds.report.compare_text import as_rows
from codeparrot_ds.run.directory import RunDirectory
as_rows(compare(*(RunDirectory(Path(run)) for run in sys.argv[1:])))
print(*{"torch", "transformers", "deepspeed", "datasets", "numpy"} & set(sys.modules))
"""
    words = [sys.executable, "-c", code, str(a.path), str(b.path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
