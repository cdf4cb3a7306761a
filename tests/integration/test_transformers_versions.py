"""Converted models in several versions of transformers, each in an environment of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codeparrot_ds.checkpoint.source import source_checkpoint
from codeparrot_ds.export.convert import convert
from codeparrot_ds.export.plain_gpt2 import EMBEDDING, hidden_states
from codeparrot_ds.export.written import WrittenWeights
from codeparrot_ds.run.gpt2 import GPT2
from tests.conftest import ROOT, Trained

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
GB = 1_000_000_000
VERSIONS = ["4.46.3", "4.57.6", "5.2.0", ""]  # the last is the newest
# What codeparrot_ds.cli needs to run `convert --check`, apart from torch and transformers.
OTHERS = [
    "fsspec",
    "isal",
    "msgspec",
    "psutil",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "safetensors",
    "tqdm",
    "typer",
    "xxhash",
]
LOSS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
directory, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(directory).eval()
with torch.no_grad():
    logits = model(ids[:, :-1]).logits
print(torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten()).item())
"""


@pytest.fixture(scope="module", params=VERSIONS)
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with this version of transformers."""
    directory = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    versions = [f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"]
    wanted = f"transformers=={request.param}" if request.param else "transformers"
    pip = [directory / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *versions, wanted, *OTHERS], check=True, timeout=900)
    return directory / "bin" / "python"


def run(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([python, *arguments], env=environment, capture_output=True, text=True, check=False)


def loss_in(python: Path, directory: Path, ids: torch.Tensor) -> float:
    done = run(python, "-c", LOSS, directory, json.dumps(ids.tolist()))
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def test_a_folded_model_is_the_same_in_every_version(python: Path, baseline: Trained, tmp_path: Path) -> None:
    checkpoint = source_checkpoint(baseline.run.path)
    certificates: dict[str, Any] = {}
    for name, keep in (("folded", False), ("kept", True)):
        certificates[name] = convert([checkpoint], tmp_path / name, keep_attention_scale=keep, memory_cap_bytes=8 * GB)
    where = tmp_path / "folded" / "config.json"
    model = GPT2.of_config(json.loads(where.read_text()), str(where))
    ids = torch.from_numpy(np.random.default_rng(1).integers(model.vocab_size, size=(4, model.n_positions + 1)))
    read = WrittenWeights(tmp_path / "folded").read
    logits = hidden_states(model, read, ids[:, :-1]) @ read(EMBEDDING).T
    ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten()).item()
    assert loss_in(python, tmp_path / "folded", ids) == pytest.approx(ours, abs=1e-5)
    checked = run(python, "-m", "codeparrot_ds.cli", "convert", "--check", tmp_path / "folded")
    assert checked.returncode == 0, checked.stderr

    version = run(python, "-c", "import transformers; print(transformers.__version__)").stdout.strip()
    checked = run(python, "-m", "codeparrot_ds.cli", "convert", "--check", tmp_path / "kept")
    if tuple(map(int, version.split(".")[:2])) >= (5, 4):
        assert checked.returncode == 0, checked.stderr
    else:
        assert checked.returncode == 1
        assert f"transformers {version} computes another model" in checked.stderr
        assert "--keep-attention-scale" in checked.stderr
