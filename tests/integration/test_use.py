"""A converted model in common programs: pipelines, `transformers serve` and lm-eval."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.export.convert import convert
from tests.conftest import Trained

pytestmark = pytest.mark.slow
PROMPT = "async def main():\n    "
NEW_TOKENS = 8
START_SECONDS = 120


@pytest.fixture(scope="module")
def converted(baseline: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("used") / "hf"
    convert([source_checkpoint(baseline.run.path)], output, memory_cap_bytes=8_000_000_000)
    return output


@pytest.fixture(scope="module")
def continuation(converted: Path) -> str:
    """The model's own greedy continuation, token by token."""
    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return str(tokenizer.decode(ids[0, length:]))


def test_a_pipeline_completes(converted: Path, continuation: str) -> None:
    complete = pipeline("text-generation", str(converted))
    answer = complete(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, return_full_text=False)
    assert answer[0]["generated_text"] == continuation


@pytest.fixture
def server(converted: Path, tmp_path: Path) -> Iterator[str]:
    """Address of `transformers serve` with the model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    log = tmp_path / "log"
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [program, "serve", converted, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START_SECONDS):
            assert process.poll() is None, log.read_text()
            try:
                call(f"{address}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        else:
            pytest.fail(log.read_text())
        yield address
    finally:
        process.kill()
        process.wait()


def call(address: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_transformers_serve_serves_it(converted: Path, continuation: str, server: str) -> None:
    body = {"model": str(converted), "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "seed": 1}
    answer = call(f"{server}/v1/completions", body)
    assert answer["choices"][0]["text"] == continuation


def test_transformers_serve_does_this_differently(converted: Path, continuation: str, server: str) -> None:
    """As docs/serving.md says. If a release mends it, change the page."""
    body = {"model": str(converted), "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "seed": 1}

    def texts(**more: Any) -> list[str]:
        return [choice["text"] for choice in call(f"{server}/v1/completions", {**body, **more})["choices"]]

    (stopped,) = texts(stop=[continuation[:1]])
    assert stopped.startswith(continuation[:1])  # OpenAI's interface ends the text before it
    assert continuation.startswith(stopped) and stopped != continuation
    assert texts(n=3) == [continuation]
    assert texts(suffix="\n# the end") == [f"{continuation}\n# the end"]
    with pytest.raises(urllib.error.HTTPError, match="400"):
        texts(prompt=[PROMPT, PROMPT])


@pytest.mark.nightly
def test_lm_eval_measures_what_the_model_computes(converted: Path, tmp_path: Path) -> None:
    """Bits per byte of some lines of code, from our own task, compared with a direct computation."""
    lines = ["import asyncio", "def close(self):\n    self._loop = None", "class Error(Exception):\n    pass"]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    task = {
        "task": "own_lines",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lines.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "own_lines.yaml").write_text(yaml.safe_dump(task))
    program = Path(sys.executable).with_name("lm_eval")
    done = subprocess.run(
        [
            *(program, "run", "--model", "hf", "--model_args", f"pretrained={converted}", "--device", "cpu"),
            *("--tasks", "own_lines", "--include_path", tmp_path, "--output_path", tmp_path / "results"),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(next((tmp_path / "results").rglob("*.json")).read_text())
    found = next(value for key, value in results["results"]["own_lines"].items() if re.match("bits_per_byte", key))

    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted)
    nats = 0.0
    for line in lines:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(line).input_ids]])
        assert ids.shape[1] <= model.config.n_positions
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0].log_softmax(-1)
        nats -= float(logits.gather(1, ids[0, 1:, None]).sum())
    expected = nats / math.log(2) / sum(len(line.encode()) for line in lines)
    assert found == pytest.approx(expected, rel=1e-4)
