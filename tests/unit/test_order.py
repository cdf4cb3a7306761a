"""The data order: a permutation, the same for every world size."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.run.sections import Batch
from codeparrot_ds.shards.order import Blend, BlendedOrder, Order, Permutation, skip_ranges
from codeparrot_ds.shards.validation import perplexity, unigram_loss, validation_sequences
from codeparrot_ds.training.ranks import Ranks


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_every_number_is_sent_to_another_one(n: int, seed: int, epoch: int) -> None:
    assert sorted(Permutation(n, seed, epoch)(np.arange(n)).tolist()) == list(range(n))


def test_seeking_takes_constant_time() -> None:
    permutation = Permutation(1_000_000_000, 1, 0)
    far = np.array([999_999_999, 0, 123_456_789])
    assert permutation(far).tolist() == [int(permutation(np.array([p]))[0]) for p in far]


def test_it_looks_random() -> None:
    """Compared with numpy's shuffles: fixed points, and correlation of neighbours."""
    n, trials = 1000, 200
    fixed, correlations = [], []
    for seed in range(trials):
        sent = Permutation(n, seed, 0)(np.arange(n))
        fixed.append((sent == np.arange(n)).sum())
        correlations.append(np.corrcoef(sent[:-1], sent[1:])[0, 1])
    assert 0.7 < np.mean(fixed) < 1.3  # 1 expected, standard error 1 / sqrt(200) = 0.07
    assert abs(np.mean(correlations)) < 0.01  # standard error 1 / sqrt(200 * 1000) = 0.0022
    assert 0.8 < np.std(correlations) * np.sqrt(n) < 1.2


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro", [1, 2, "auto"])
def test_every_world_size_sees_the_same_global_batch(world_size: int, micro: Any) -> None:
    """Sequences of each rank as in training: its slice of the global batch."""
    order, batch = Order(1000, seed=7), Batch(global_batch_size=48, micro_batch_size=micro)
    size, accumulation = batch.micro_batch_and_accumulation(world_size)
    alone = np.concatenate([order.take(sample, 1) for sample in range(50 * 48)])  # one at a time, on one rank
    for step in range(50):
        seen = []
        for rank in range(world_size):
            ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
            seen.append(order.take(step * 48, 48)[ranks.slice(size * accumulation)].reshape(accumulation, size))
        assert np.concatenate([part.ravel() for part in seen]).tolist() == alone[step * 48 : step * 48 + 48].tolist()


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


@settings(deadline=None, max_examples=60)
@given(weights=st.lists(st.sampled_from([0.1, 0.25, 0.5, 1, 2, 3, 0.7, 5.5]), min_size=1, max_size=5))
def test_every_source_of_a_blend_has_its_share_of_any_prefix(weights: list[float]) -> None:
    sources, places = Blend(weights).at(np.arange(3000))
    shares = np.array(weights) / sum(weights)
    seen = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(seen - np.arange(1, 3001)[:, None] * shares).max() < 1 + 1e-9
    for source in range(len(weights)):
        assert places[sources == source].tolist() == list(range(int((sources == source).sum())))


def test_a_blend_is_found_at_any_position_at_once() -> None:
    blend = Blend([0.6, 0.3, 0.1])
    far = np.arange(10**12, 10**12 + 20)
    assert [one.tolist() for one in blend.at(far)] == [
        np.concatenate([blend.at(np.array([p]))[i] for p in far]).tolist() for i in (0, 1)
    ]


@pytest.mark.parametrize(("weights", "what"), [([], "above 0"), ([1, 0], "above 0"), ([0.333333, 1], "fewer digits")])
def test_invalid_weights_are_named(weights: list[float], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Blend(weights)


def test_sources_of_equal_length_have_different_orders() -> None:
    fed = BlendedOrder([50, 50], [1, 1], seed=5).take(0, 100)
    first, second = fed[fed < 50], fed[fed >= 50] - 50
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist()


def test_a_blended_order_repeats_each_source_independently() -> None:
    order = BlendedOrder([10, 30], [1, 1], seed=5)
    taken = order.take(0, 60)  # three epochs of the first source, one of the second
    small, large = taken[taken < 10], taken[taken >= 10]
    assert sorted(large.tolist()) == list(range(10, 40))
    for epoch in range(3):
        assert sorted(small[epoch * 10 : epoch * 10 + 10].tolist()) == list(range(10))
    assert np.concatenate([order.take(p, 1) for p in range(60)]).tolist() == taken.tolist()
    assert BlendedOrder([40], [2.5], seed=5).take(7, 90).tolist() == Order(40, seed=5).take(7, 90).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro", [1, 2, "auto"])
def test_every_world_size_sees_the_same_global_batch_of_a_blend(world_size: int, micro: Any) -> None:
    order, batch = (
        BlendedOrder([100, 57, 9], [0.5, 0.3, 0.2], seed=7),
        Batch(global_batch_size=48, micro_batch_size=micro),
    )
    size, accumulation = batch.micro_batch_and_accumulation(world_size)
    share = size * accumulation
    for step in range(30):
        seen = [order.take(step * 48, 48)[rank * share : (rank + 1) * share] for rank in range(world_size)]
        alone = [int(order.take(sample, 1)[0]) for sample in range(step * 48, step * 48 + 48)]
        assert np.concatenate(seen).tolist() == alone


def test_positions_are_as_random_as_numpys() -> None:
    """The image of one position over many seeds is uniform by a chi-squared test, as for numpy's shuffle."""
    n, trials = 20, 4000
    ours, theirs = np.zeros((n, n)), np.zeros((n, n))
    for seed in range(trials):
        ours[np.arange(n), Permutation(n, seed, 0)(np.arange(n))] += 1
        theirs[np.arange(n), np.random.default_rng(seed).permutation(n)] += 1
    expected = trials / n
    chi = [((counts - expected) ** 2 / expected).sum() for counts in (ours, theirs)]
    degrees = (n - 1) ** 2  # rows and columns both sum to `trials`
    assert max(chi) < degrees + 5 * np.sqrt(2 * degrees), chi


def test_skipped_ranges_are_never_read_and_all_else_once() -> None:
    skipped_ranges = [(30, 40), (10, 14), (36, 44), (100, 100)]
    places = skip_ranges(np.arange(60), skipped_ranges)
    assert places.tolist() == [*range(10), *range(14, 30), *range(44, 78)]
    assert skip_ranges(np.arange(5), []).tolist() == [0, 1, 2, 3, 4]
    for start in range(0, 60, 7):  # depends only on the position
        assert (
            skip_ranges(np.arange(start, start + 7), skipped_ranges).tolist()
            == skip_ranges(np.arange(67), skipped_ranges).tolist()[start : start + 7]
        )
