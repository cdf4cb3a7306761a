"""Write safetensors files block by block, with digests of the source weights and of the written bytes.

Format: an 8-byte little-endian length, a JSON header of that length, then the tensors' bytes.
Source: https://huggingface.co/docs/safetensors
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import xxhash

from codeparrot_ds.errors import CheckpointError
from codeparrot_ds.system.files import dump_json, start_write_back

BLOCK_ELEMENTS = 1 << 22  # per block that is read, converted and written: 16 MB in fp32
_CACHED_ELEMENTS = 1 << 26  # then dropped from the page cache, which a concurrent training run needs
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8  # bytes, of the header's end, so that tensors can be memory-mapped


class Weights(Protocol):
    """Source of weights: one checkpoint, or the mean of several."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Parameter name -> shape, without tied copies."""

    @property
    def tied(self) -> Mapping[str, str]:
        """Name of a tied copy -> name of the parameter that it shares."""

    def read(self, name: str, what: str = "fp32", start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return elements `start` to `stop` (excluded) of a parameter, flat, fp32 on the CPU."""

    def drop_from_cache(self) -> None:
        """Drop from the page cache what has been read."""


@dataclass(frozen=True)
class TensorProof:
    """Digests (xxh3-128) of one tensor. `master`: its fp32 bytes in the checkpoint; `written`: its bytes here."""

    shape: list[int]
    master: str
    written: str

    def as_json(self) -> dict[str, object]:
        """Return the entry of the certificate."""
        return asdict(self)


def write_weights(
    directory: Path,
    weights: Weights,
    dtype: torch.dtype,
    max_file_bytes: int,
    progress: Callable[[Sequence[str]], Iterator[str]],
) -> tuple[dict[str, TensorProof], dict[str, str]]:
    """Write safetensors files and, for several, their index.

    Args:
        directory: existing directory; receives model.safetensors, or model-00001-of-… and its index.
        weights: read in blocks; no tensor is ever held in memory as a whole.
        dtype: type to write; values outside its range are refused.
        max_file_bytes: maximum size of a file; a larger tensor gets a file of its own.
        progress: yields the names and shows the progress.

    Returns:
        Tensor name -> its digests, and file name -> its digest.

    Raises:
        CheckpointError: a weight is not finite, or not in the range of `dtype`.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        dict(weights.shapes),
        get_storage_size=lambda shape: shape.numel() * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    proofs: dict[str, TensorProof] = {}
    digests: dict[str, str] = {}
    remaining = progress(list(weights.shapes))
    for file, names in plan.filename_to_tensors.items():
        digests[file] = _write_file(directory / file, names, weights, dtype, proofs, remaining)
        weights.drop_from_cache()
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_bytes(dump_json(index))
    return proofs, digests


def _write_file(
    path: Path,
    names: list[str],
    weights: Weights,
    dtype: torch.dtype,
    proofs: dict[str, TensorProof],
    remaining: Iterator[str],
) -> str:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + weights.shapes[name].numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(weights.shapes[name]), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    whole, cached_elements = xxhash.xxh3_128(), 0
    with open(path, "wb") as file:
        for piece in (len(encoded).to_bytes(8, "little"), encoded):
            file.write(piece)
            whole.update(piece)
        for name in names:
            assert next(remaining) == name
            master, written = xxhash.xxh3_128(), xxhash.xxh3_128()
            for block in blocks(weights, name):
                master.update(_bytes(block))
                converted = block.to(dtype)
                _require_finite(block, converted, name, dtype)
                data = _bytes(converted)
                file.write(data)
                whole.update(data)
                if dtype != torch.float32:
                    written.update(data)
            start_write_back(file)
            cached_elements += weights.shapes[name].numel()
            if cached_elements > _CACHED_ELEMENTS:
                weights.drop_from_cache()
                cached_elements = 0
            digest = master.hexdigest()
            shape = list(weights.shapes[name])
            proofs[name] = TensorProof(shape, digest, digest if dtype == torch.float32 else written.hexdigest())
    return whole.hexdigest()


def blocks(weights: Weights, name: str) -> Iterator[torch.Tensor]:
    """Yield the elements of a parameter in order, in flat fp32 blocks, and prefetch the next block."""
    numel = weights.shapes[name].numel()
    with ThreadPoolExecutor(1) as reader:
        ahead = deque[Future[torch.Tensor]]()
        for start in range(0, numel, BLOCK_ELEMENTS):
            stop = min(numel, start + BLOCK_ELEMENTS)
            ahead.append(reader.submit(weights.read, name, start=start, stop=stop))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _bytes(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.contiguous().view(torch.uint8).numpy().data
    return data


def _require_finite(block: torch.Tensor, converted: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    if all(
        math.isfinite(extreme) for extreme in converted.aminmax()
    ):  # NaN gives NaN for both; several times faster than isfinite
        return
    if not block.isfinite().all():
        raise CheckpointError(
            f"{name}: contains non-finite weights, so training had diverged. Nothing was written. Convert an "
            "earlier checkpoint with --tag."
        )
    raise CheckpointError(
        f"{name}: contains weights of up to {float(block.abs().max()):.3g}, beyond the range of "
        f"{str(dtype).removeprefix('torch.')}. Nothing was written. Use --dtype bfloat16 or float32."
    )
