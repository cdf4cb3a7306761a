"""One rank without a process group."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from codeparrot_ds.training.ranks import Ranks


class Alone(Ranks):
    """A single rank without peers."""

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def begin_max(self, values: Sequence[int]):  # type: ignore[no-untyped-def]
        return lambda: list(values)


@pytest.fixture
def alone() -> Ranks:
    return Alone(0, 1, 0, torch.device("cpu"))
