"""The order of the data: a permutation, the same for every world size."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codeparrot_ds.recipe import Batch
from codeparrot_ds.shards.order import Order, Permutation
from codeparrot_ds.shards.validation import perplexity, unigram_loss, validation_sequences
from codeparrot_ds.training.ranks import Ranks


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_every_number_is_sent_to_another_one(n: int, seed: int, epoch: int) -> None:
    assert sorted(Permutation(n, seed, epoch)(np.arange(n)).tolist()) == list(range(n))


def test_seeking_needs_no_walk() -> None:
    permutation = Permutation(1_000_000_000, 1, 0)
    far = np.array([999_999_999, 0, 123_456_789])
    assert permutation(far).tolist() == [int(permutation(np.array([p]))[0]) for p in far]


def test_it_looks_random() -> None:
    """Against numpy's own shuffles: fixed points, and correlation of neighbours."""
    n, trials = 1000, 200
    fixed, correlations = [], []
    for seed in range(trials):
        sent = Permutation(n, seed, 0)(np.arange(n))
        fixed.append((sent == np.arange(n)).sum())
        correlations.append(np.corrcoef(sent[:-1], sent[1:])[0, 1])
    assert 0.7 < np.mean(fixed) < 1.3  # 1 expected, standard error 1 / sqrt(200) = 0.07
    assert abs(np.mean(correlations)) < 0.01  # standard error 1 / sqrt(200 * 1000) = 0.0022
    assert 0.8 < np.std(correlations) * np.sqrt(n) < 1.2


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("micro", [1, 2])
def test_every_world_size_sees_the_same_global_batch(world_size: int, micro: int) -> None:
    """Each rank as training asks for its part: the global batch, of which it takes its slice."""
    order, batch = Order(1000, seed=7), Batch(global_batch_size=24, micro_batch_size=micro)
    size, accumulation = batch.micro_batch_and_accumulation(world_size)
    alone = np.concatenate([order.take(sample, 1) for sample in range(50 * 24)])  # one at a time, on one rank
    for step in range(50):
        seen = []
        for rank in range(world_size):
            ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
            seen.append(order.take(step * 24, 24)[ranks.slice(size * accumulation)].reshape(accumulation, size))
        assert np.concatenate([part.ravel() for part in seen]).tolist() == alone[step * 24 : step * 24 + 24].tolist()


def test_an_epoch_visits_every_sequence_once_and_the_next_in_another_order() -> None:
    order = Order(101, seed=3)
    first, second = order.take(0, 101), order.take(101, 101)
    assert sorted(first) == sorted(second) == list(range(101))
    assert first.tolist() != second.tolist()
    across = order.take(95, 12)  # a batch that spans two epochs
    assert across.tolist() == [*first[95:], *second[:6]]


def test_the_validation_set_is_fixed_and_spread() -> None:
    assert validation_sequences(10, 20).tolist() == list(range(10))
    assert validation_sequences(1000, 4).tolist() == [0, 250, 500, 750]


def test_unigram_loss_is_the_entropy_of_the_counts() -> None:
    assert unigram_loss(np.array([[0, 1], [2, 3]]), 8) == pytest.approx(np.log(4))
    assert unigram_loss(np.array([5, 5]), 8) == 0
    assert perplexity(np.log(7)) == pytest.approx(7)
    assert perplexity(1e6) == float("inf")
