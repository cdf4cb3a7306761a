"""The certificate of a converted model: its source, what was verified, and the data to verify it again."""

import importlib.metadata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds import __version__
from codeparrot_ds.errors import CheckpointError, DataError, list_problems
from codeparrot_ds.export.forward import check_transformers
from codeparrot_ds.export.statements import find_contradictions
from codeparrot_ds.export.written import WrittenWeights
from codeparrot_ds.run.directory import CERTIFICATE
from codeparrot_ds.system.files import FORMAT_VERSION, digest_bytes, digest_file, read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Values of `attention_scale`: the model has none; it was folded into the weights; it was kept as a setting.
NO_SCALE, FOLDED, KEPT = "none", "folded", "kept"
# Suffixes of files that transformers loads if present.
_LOADED = (".safetensors", ".bin", ".pt", ".py", ".json", ".h5", ".msgpack")


def versions() -> dict[str, str]:
    """Return the versions of the packages that a conversion depends on."""
    names = ("torch", "transformers", "safetensors", "deepspeed")
    return {"codeparrot-ds": __version__, **{name: importlib.metadata.version(name) for name in names}}


def read_certificate(directory: Path) -> dict[str, Any]:
    """Read the certificate of a converted model. Raises DataError if it is missing or invalid."""
    body = read_json(directory / CERTIFICATE, "certificate")
    wanted = {"files": dict, "tensors": dict, "tied": dict, "dtype": str, "source": list}
    if (
        not isinstance(body, dict)
        or (body.get("kind"), body.get("format_version")) != ("certificate", FORMAT_VERSION)
        or not all(isinstance(body.get(key), kind) for key, kind in wanted.items())
        or body["dtype"] not in DTYPES
    ):
        raise DataError(f"{directory / CERTIFICATE}: not a certificate of this version. Convert the checkpoint again.")
    return body


def verify(directory: Path) -> dict[str, Any]:
    """Verify every file and tensor of a converted model against its certificate, and return the certificate.

    Raises:
        DataError: the directory has no valid certificate.
        CheckpointError: names each file and tensor that does not match.
    """
    certificate = read_certificate(directory)
    problems = _files(directory, certificate["files"])
    if not problems:
        problems = check_tensors(directory, certificate)
    if problems:
        fix = "Copy the directory again, or convert the checkpoint again."
        raise CheckpointError(list_problems(str(directory), problems, fix))
    return certificate


def check(directory: Path) -> dict[str, Any]:
    """Verify a converted model, and that the installed transformers computes what it says. Returns the certificate.

    Raises:
        DataError: the directory has no valid certificate.
        CheckpointError: see `verify`; or files contradict one another, or transformers computes another model.
    """
    certificate = verify(directory)
    if problems := find_contradictions(directory):
        raise CheckpointError(list_problems(str(directory), problems, "Convert the checkpoint again."))
    if difference := check_transformers(directory):
        raise CheckpointError(f"{directory}: {difference}")
    return certificate


def _files(directory: Path, expected: dict[str, Any]) -> list[str]:
    problems = []
    there = {file.relative_to(directory).as_posix(): file for file in directory.rglob("*") if file.is_file()}
    for name, digest in sorted(expected.items()):
        if name not in there:  # names in `there` are inside the directory, those of the certificate may not be
            problems.append(f"{name} is missing")
        elif digest_file(there[name]) != digest:
            problems.append(f"{name}: its digest differs from the certificate")
    added = sorted(name for name in there.keys() - expected.keys() - {CERTIFICATE} if name.endswith(_LOADED))
    return problems + [
        f"{name} is not in the certificate, and might be loaded instead of a file that is" for name in added
    ]


def check_tensors(directory: Path, certificate: dict[str, Any]) -> list[str]:
    """Read every tensor as transformers does, and name those that do not match the certificate."""
    written = WrittenWeights(directory)
    tensors, dtype = certificate["tensors"], DTYPES[certificate["dtype"]]
    problems = [f"tensor {name} is missing" for name in sorted(tensors.keys() - written.names)]
    problems += [f"tensor {name} is not in the certificate" for name in sorted(written.names - tensors.keys())]

    def problem(name: str) -> str | None:
        tensor = written.tensor(name)
        if tensor.dtype != dtype or list(tensor.shape) != tensors[name]["shape"]:
            return f"tensor {name}: {tensor.dtype} {list(tensor.shape)} does not match the certificate"
        if digest_bytes(tensor.reshape(-1).view(torch.uint8).numpy().data) != tensors[name]["written"]:
            return f"tensor {name}: the digest of its values differs from the certificate"
        return None

    with ThreadPoolExecutor(2) as pool:
        problems += filter(None, pool.map(problem, sorted(tensors.keys() & written.names)))
    return problems
