"""How a benchmark's problems are put to a model, and how what it writes becomes a completion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.evaluation.pretrained import Pretrained, fit_context
from codeparrot_ds.evaluation.problems import Problem, load_humaneval, load_problems
from codeparrot_ds.evaluation.stops import NEW_BLOCK, Stops

# Beginning, suffix and middle, as models name them.
_SENTINELS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
)


@dataclass(frozen=True)
class Task:
    """A problem as the model sees it.

    Attributes:
        problem: the problem.
        ids: the prompt's tokens, [tokens], as many as fit into the context.
        dropped: tokens of the prompt that do not fit.
        new_tokens: maximum length of a completion (tokens).
        stripped: white space at the end of the problem's prompt that the model does not see.
    """

    problem: Problem
    ids: np.ndarray
    dropped: int
    new_tokens: int
    stripped: str = ""

    def completion(self, text: str) -> tuple[str, bool]:
        """The completion that continues the problem's whole prompt, given what the model wrote after the stripped one.

        The white space that was stripped is in the prompt already. The second value is False if the model wrote
        something else in its place, so that prompt and completion are not quite what it wrote.
        """
        if text.startswith(self.stripped):
            return text[len(self.stripped) :], True
        return text, False


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of code.

    Attributes:
        name: "humaneval", "mbpp" or "infill".
        stops: default stop strings.
        load: reads the problems of a file; of no file for HumanEval.
        encode: turns a problem into a task, given the model, the maximum of new tokens and whether to strip prompts.
    """

    name: str
    stops: Sequence[str]
    load: Callable[[Path | None], list[Problem]]
    encode: Callable[[Pretrained, Problem, int, bool], Task]


def _load_humaneval(path: Path | None) -> list[Problem]:
    return load_humaneval() if path is None else load_problems(path)


def _load_file(path: Path | None) -> list[Problem]:
    assert path is not None
    return load_problems(path)


def _load_infilling(path: Path | None) -> list[Problem]:
    problems = _load_file(path)
    if without := [problem.task_id for problem in problems if not problem.suffix]:
        raise DataError(
            f"{path}: {len(without):,} problems have no suffix to infill before, e.g. {without[0]}. Use a file of "
            "HumanEval-Infilling, or `evaluate humaneval --problems` for completion."
        )
    return problems


def _encode_prompt(found: Pretrained, problem: Problem, max_new_tokens: int, strip: bool) -> Task:
    """The end token, which begins a document, and the prompt; without white space at its ends if `strip`."""
    text = problem.prompt.strip() if strip else problem.prompt
    stripped = problem.prompt[len(problem.prompt.rstrip()) :] if strip else ""
    ids = np.concatenate([[found.encoder.eos_id], found.encoder.encode(text)]).astype(np.int64)
    kept, room = fit_context(found, len(ids), max_new_tokens)
    return Task(problem, ids[len(ids) - kept :], len(ids) - kept, room, stripped)


def _encode_infilling(found: Pretrained, problem: Problem, max_new_tokens: int, strip: bool) -> Task:
    """Prefix, suffix, middle. If they are too long, the prefix loses its start and the suffix its end."""
    sentinels = next((each for each in _SENTINELS if all(found.encoder.id_of(token) for token in each)), None)
    if sentinels is None:
        raise ConfigError(
            f"{found.name}: its tokenizer has no tokens for infilling, such as {' '.join(_SENTINELS[0])}. Use a model "
            "that was trained to fill in the middle."
        )
    begin, then, middle = (found.encoder.id_of(token) for token in sentinels)
    prefix, suffix = found.encoder.encode(problem.prompt), found.encoder.encode(problem.suffix)
    length = len(prefix) + len(suffix) + 3
    kept, room = fit_context(found, length, max_new_tokens)
    of_suffix = min(len(suffix), max(kept - 3 - len(prefix), (kept - 3) // 2))
    of_prefix = min(len(prefix), kept - 3 - of_suffix)
    ids = np.array([begin, *prefix[len(prefix) - of_prefix :], then, *suffix[:of_suffix], middle], np.int64)
    return Task(problem, ids, length - len(ids), room)


# MBPP's stop strings are those of the BigCode evaluation harness: its answers begin with "def".
_MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/")
BENCHMARKS = {
    each.name: each
    for each in (
        Benchmark("humaneval", NEW_BLOCK, _load_humaneval, _encode_prompt),
        Benchmark("mbpp", _MBPP_STOPS, _load_file, _encode_prompt),
        Benchmark("infill", (), _load_infilling, _encode_infilling),
    )
}


def stops_of(benchmark: Benchmark, given: Sequence[str] | None) -> Stops:
    """The stop strings that a user gave, in which \\n stands for a line end; by default the benchmark's."""
    return Stops(benchmark.stops if given is None else [each.replace("\\n", "\n") for each in given])
