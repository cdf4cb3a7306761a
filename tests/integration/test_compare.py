"""What training really writes is what `compare` reads."""

from collections.abc import Callable

import pytest

from codeparrot_ds.report.compare import compare
from tests.conftest import Trained

pytestmark = pytest.mark.slow


def test_one_rank_and_two_saw_the_same_data_and_learnt_the_same(
    baseline: Trained, train_tiny: Callable[..., Trained]
) -> None:
    alone = train_tiny("alone", ranks=1, stage=1)
    found = compare(baseline.run, alone.run, tolerance=1e-3)
    assert found.same
    assert found.data.steps == len(baseline.digests())
    assert found.loss_valid.steps == len(baseline.valid_losses())
    assert (found.a.world_size, found.b.world_size) == (2, 1)
    assert found.recipe["ds_config.zero_optimization.stage"] == (3, 1)
    other = compare(baseline.run, train_tiny("other", options=["seed=2"]).run)
    assert not other.same
    assert other.data.first_different == 0
    assert other.recipe == {"seed": (1, 2)}
