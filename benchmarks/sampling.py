"""Sampling of HumanEval beside a bare loop of transformers' `generate`, and `complete` up to its first token.

    python benchmarks/sampling.py MODEL [--batch-size 64 --max-new-tokens 128 --repeats 3]

Both sample the same prompts in the same batches, on one thread, by turns in one process; the figure is tokens per
second of CPU time. Tokens after the end token of a sample are not counted. In a second comparison our samples end at
CodeParrot's stop strings, while the loop, as in CodeParrot's script, runs to the end and cuts afterwards; there the
figure is samples per second of CPU time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from codeparrot_ds.evaluation.benchmarks import BENCHMARKS
from codeparrot_ds.evaluation.pretrained import Pretrained, load_pretrained
from codeparrot_ds.evaluation.problems import load_humaneval
from codeparrot_ds.evaluation.sampling import Run, Settings
from codeparrot_ds.evaluation.stops import Stops

PROMPT = "def area(width, height):"
TEMPERATURE = 0.8


def bare(found: Pretrained, run: Run, batches: int) -> tuple[int, int]:
    """Generate with transformers alone. Returns samples and tokens."""
    samples = tokens = 0
    for batch in list(run.batches())[:batches]:
        prompts = [run.tasks[task].ids for task, _ in batch.samples]
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), found.encoder.eos_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
            mask[row, longest - len(prompt) :] = 1
        room = min(run.tasks[task].new_tokens for task, _ in batch.samples)
        with torch.inference_mode():
            output = found.model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=run.settings.top_p,
                top_k=0,
                max_new_tokens=room,
                pad_token_id=found.encoder.eos_id,
            )[:, longest:]
        for row in output.tolist():
            samples += 1
            tokens += row.index(found.encoder.eos_id) + 1 if found.encoder.eos_id in row else len(row)
    return samples, tokens


def ours(run: Run, batches: int) -> tuple[int, int]:
    """Generate as `evaluate humaneval` does. Returns samples and tokens."""
    rows = [row for batch in list(run.batches())[:batches] for row in run._generate(batch)]
    return len(rows), sum(row["tokens"] for row in rows)


def measure(generate: Callable[[], tuple[int, int]]) -> tuple[float, float]:
    """Samples and tokens per second of CPU time."""
    start = time.process_time()
    samples, tokens = generate()
    seconds = time.process_time() - start
    return samples / seconds, tokens / seconds


def first_token(model: str) -> float:
    """CPU time of `complete` up to its first token (seconds)."""
    command = [sys.executable, "-m", "codeparrot_ds.cli", "complete", model, PROMPT, "--num", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    shown = b""
    while not shown.partition(PROMPT.encode())[2].strip(b"\n"):
        shown += process.stdout.read(1)
    times = psutil.Process(process.pid).cpu_times()
    process.stdout.read()
    process.wait()
    return times.user + times.system


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = load_pretrained(options.model, fp32=False)
    problems = load_humaneval()
    settings = Settings(
        samples=1,
        temperatures=(TEMPERATURE,),
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        stops=Stops([]),
    )
    result: dict[str, Any] = {"model": found.name, "parameters": found.model.num_parameters(), **vars(options)}
    with tempfile.TemporaryDirectory() as work:
        free, stopped = (
            Run(found, BENCHMARKS["humaneval"], problems, its, Path(work) / name)
            for name, its in (("free", settings), ("stopped", replace(settings, stops=Stops())))
        )
        measure(lambda: ours(free, 1))  # allocates
        rounds = [
            (
                measure(lambda: bare(found, free, options.batches)),
                measure(lambda: ours(free, options.batches)),
                measure(lambda: ours(stopped, options.batches)),
            )
            for _ in range(options.repeats)
        ]
    result["tokens_per_cpu_second"] = {
        "transformers": median(loop[1] for loop, _, _ in rounds),
        "ours": median(own[1] for _, own, _ in rounds),
        "ratio": median(own[1] / loop[1] for loop, own, _ in rounds),
    }
    result["samples_per_cpu_second"] = {
        "transformers": median(loop[0] for loop, _, _ in rounds),
        "ours_with_stops": median(own[0] for _, _, own in rounds),
        "ratio": median(own[0] / loop[0] for loop, _, own in rounds),
    }
    result["complete_first_token_cpu_seconds"] = first_token(options.model)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
