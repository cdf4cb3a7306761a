"""Peers of our preprocessing: how each is installed and run, and how its output is read."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from documents import Documents
from environments import TORCH

DRIVERS = Path(__file__).resolve().parent / "peers"
MEGATRON_URL = "https://github.com/NVIDIA/Megatron-LM"

# Megatron-LM's tools import all of megatron.core and megatron.training, hence triton; gigatoken is their fast path.
_MEGATRON_PACKAGES = (TORCH, "numpy", "packaging", "transformers", "triton", "gigatoken")
# They also import typing.override, new in Python 3.12; nothing else in them needs 3.12.
_OVERRIDE = "import typing\n\nfrom typing_extensions import override\n\ntyping.override = override\n"


@dataclass(frozen=True)
class Task:
    """Input and output of a pipeline run.

    Attributes:
        jsonl: the documents in one uncompressed file.
    """

    documents: Documents
    jsonl: Path
    tokenizer: Path
    workers: int
    output: Path


@dataclass(frozen=True)
class Peer:
    """A preprocessing pipeline of another project.

    Attributes:
        environment: name of its virtual environment, which peers may share.
        packages: pip requirements of that environment.
        command: function from task to arguments, the first of which is a Python file.
        read: function from output directory to all ids in it, [tokens] uint16.
        note: remark below the table.
        at_start: see environments.environment.
    """

    title: str
    environment: str
    packages: tuple[str, ...]
    command: Callable[[Task], list[str]]
    read: Callable[[Path], np.ndarray]
    note: str = ""
    at_start: str = ""


def peers(megatron: Path | None) -> dict[str, Peer]:
    """All peers by name; Megatron-LM's only if a checkout is available."""
    found = {
        "datasets": Peer(
            "datasets.map, batched",
            "datasets",
            ("datasets", "transformers"),
            _driver("datasets_map.py"),
            _read_arrow,
            "ids saved as int32 in Arrow",
        ),
        "nanogpt": Peer(
            "nanoGPT prepare, tiktoken",
            "nanogpt",
            ("datasets", "tiktoken", "numpy", "tqdm"),
            _driver("nanogpt_prepare.py"),
            _read_flat("*.bin"),
        ),
        "datatrove": Peer(
            "datatrove DocumentTokenizer",
            "datatrove",
            ("datatrove[io,processing]", "tokenizers", "orjson"),
            _driver("datatrove_tokenizer.py"),
            _read_flat("ids/*.ds"),
        ),
    }
    if megatron is not None:
        note = "reads one uncompressed file; unpacking is not counted"
        for name, tool, option in (
            ("megatron", "preprocess_data.py", "--workers"),
            ("megatron-fast", "preprocess_data_fast.py", "--use-gigatoken"),
        ):
            found[name] = Peer(
                f"Megatron-LM {tool}",
                "megatron",
                _MEGATRON_PACKAGES,
                _megatron(megatron / "tools" / tool, option),
                _read_flat("*.bin"),
                note if option == "--workers" else f"{note}; one process with as many threads as cores",
                _OVERRIDE if sys.version_info < (3, 12) else "",
            )
    return found


def _megatron(tool: Path, option: str) -> Callable[[Task], list[str]]:
    def command(task: Task) -> list[str]:
        task.output.mkdir()
        return [
            *(str(tool), "--input", str(task.jsonl), "--output-prefix", str(task.output / "documents")),
            *("--json-keys", "content", "--append-eod"),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(task.tokenizer)),
            *([option, str(task.workers)] if option == "--workers" else [option]),
        ]

    return command


def _driver(name: str) -> Callable[[Task], list[str]]:
    def command(task: Task) -> list[str]:
        files = map(str, task.documents.files)
        return [str(DRIVERS / name), str(task.tokenizer), str(task.workers), str(task.output), *files]

    return command


def _read_flat(pattern: str) -> Callable[[Path], np.ndarray]:
    def read(output: Path) -> np.ndarray:
        return np.concatenate([np.fromfile(file, "<u2") for file in sorted(output.glob(pattern))])

    return read


def _read_arrow(output: Path) -> np.ndarray:
    import pyarrow as pa

    pieces = []
    for file in sorted(output.glob("*.arrow")):
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as batches:
            pieces += [batch.column("input_ids").flatten().to_numpy().astype("<u2") for batch in batches]
    return np.concatenate(pieces)


def megatron_checkout(given: Path | None, work: Path) -> Path | None:
    """A checkout of Megatron-LM: the one given, else a clone below `work`; None if cloning fails."""
    if given is not None:
        return given.resolve()
    target = work / "Megatron-LM"
    if not target.exists():
        command = ["git", "clone", "--quiet", "--depth", "1", MEGATRON_URL, str(target)]
        if subprocess.run(command, env=dict(os.environ) | {"GIT_TERMINAL_PROMPT": "0"}).returncode != 0:
            print(f"{MEGATRON_URL} could not be cloned; skipped. Pass a checkout with --megatron.", file=sys.stderr)
            return None
    return target


def megatron_version(checkout: Path) -> str:
    """Version of a checkout, and its commit if known."""
    version = runpy.run_path(str(checkout / "megatron" / "core" / "package_info.py"))["__version__"]
    if not (checkout / ".git").exists():
        return str(version)
    head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    return f"{version} {head.stdout.strip()}".strip()
