"""Read the weights of a Hugging Face directory, one tensor at a time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.errors import DataError
from codeparrot_ds.system.files import read_json


class WrittenWeights:
    """The weights in a Hugging Face directory's safetensors files.

    Attributes:
        names: names of all tensors.
    """

    def __init__(self, directory: Path) -> None:
        """Read the index. Raises DataError if the weights cannot be read."""
        from safetensors import SafetensorError, safe_open

        index = directory / "model.safetensors.index.json"
        self._files: dict[str, Path] = {}
        try:
            if index.exists():
                weight_map = read_json(index, "index of weights")["weight_map"]
                self._files = {name: directory / Path(file).name for name, file in weight_map.items()}
            else:
                with safe_open(directory / "model.safetensors", "pt") as file:
                    self._files = dict.fromkeys(file.keys(), directory / "model.safetensors")
        except (SafetensorError, OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise DataError(
                f"{directory}: its weights cannot be read ({error}). Convert the checkpoint again."
            ) from None
        self.names = set(self._files)

    def tensor(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Read a tensor as written; `rows` (first, end) selects rows, `end` excluded. Raises DataError."""
        with self._open(name) as file:
            found: torch.Tensor = file.get_slice(name)[slice(*rows)] if rows else file.get_tensor(name)
        return found

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Read a tensor in fp32; see `tensor`."""
        return self.tensor(name, rows).float()

    def shape(self, name: str) -> list[int]:
        """Return a tensor's shape without reading it. Raises DataError."""
        with self._open(name) as file:
            return list(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type without reading it. Raises DataError."""
        with self._open(name) as file:
            empty: torch.Tensor = file.get_slice(name)[0:0]
        return empty.dtype

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        """Open the file that holds a tensor. It is opened for each read: mapped pages count as memory."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._files[name], "pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise DataError(f"{self._files[name]}: {name} cannot be read ({error}).") from None
