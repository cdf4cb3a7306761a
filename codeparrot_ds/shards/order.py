"""The order of training data: a stateless, seeded permutation of sequence numbers.

The position in the data is one integer, `samples_seen`. World size, micro-batch size and gradient accumulation do not
change what a step reads: a step takes the next `global_batch_size` sequences, and each rank takes its slice of them.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from codeparrot_ds.errors import ConfigError

_LONGEST_PERIOD = 100_000  # of a blend's pattern, whose tables then take 1.6 MB
_ROUNDS = 6
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's multipliers


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, [n] uint64 -> [n] uint64: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random permutation of 0 .. n - 1 in O(1) memory: a Feistel network with cycle walking.

    The network permutes the smallest 2^(2k) >= n numbers, fewer than 4 n; a result outside 0 .. n - 1 is permuted
    again until it is inside, fewer than four times on average (Black and Rogaway, 2002).
    """

    n: int
    seed: int
    epoch: int
    source: int = 0

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map `positions`, [k] integers in 0 .. n - 1, to [k] int64 in 0 .. n - 1; distinct positions stay distinct."""
        half = max(1, ((self.n - 1).bit_length() + 1) // 2)
        keys = np.random.default_rng([self.seed, self.epoch, *([self.source] if self.source else [])]).integers(
            0, 2**64, _ROUNDS, dtype=np.uint64
        )
        values = self._network(positions.astype(np.uint64), np.uint64(half), keys)
        while (outside := values >= self.n).any():
            values[outside] = self._network(values[outside], np.uint64(half), keys)
        return values.astype(np.int64)

    @staticmethod
    def _network(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = values >> half, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << half) | right


@dataclass(frozen=True)
class Order:
    """Reading order of the sequences: an infinite series of epochs, each a permutation of all sequences.

    Attributes:
        sequences: number of sequences in the training split.
        seed: of the permutations; epoch e uses (seed, e).
        source: index of the source in a blend, so that equal sources are read in different orders.
    """

    sequences: int
    seed: int
    source: int = 0

    def take(self, samples_seen: int, count: int) -> np.ndarray:
        """Sequence numbers of samples `samples_seen` .. `samples_seen + count - 1`, [count] int64."""
        return self.at(np.arange(samples_seen, samples_seen + count))

    def at(self, samples: np.ndarray) -> np.ndarray:
        """Sequence numbers, [n] int64, of arbitrary `samples`, [n] integers from 0."""
        epochs, positions = np.divmod(samples, self.sequences)
        taken = np.empty(len(samples), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            permutation = Permutation(self.sequences, self.seed, int(epoch), self.source)
            taken[here] = permutation(positions[here])
        return taken


def positions_of_step(step: int, global_batch_size: int, skipped_ranges: Sequence[tuple[int, int]] = ()) -> np.ndarray:
    """Positions in the data order that optimizer step `step` (from 0) reads, [global_batch_size] int64."""
    return skip_ranges(np.arange(step * global_batch_size, (step + 1) * global_batch_size), skipped_ranges)


def skip_ranges(samples: np.ndarray, skipped_ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    """Positions in the data order, [n] int64, of `samples`, when some ranges of the order are skipped.

    Args:
        samples: sample numbers, counted without the skipped ranges, [n] integers from 0.
        skipped_ranges: [start, stop) positions, in any order; ranges may overlap.
    """
    places = np.asarray(samples, np.int64).copy()
    passed = 0  # ranges before this position are already skipped
    for start, stop in sorted(skipped_ranges):
        start = max(start, passed)
        if stop > start:
            places[places >= start] += stop - start
            passed = stop
    return places


class Blend:
    """Assigns samples to sources by weight: in any prefix of k samples, each source has its share of k within one.

    The pattern repeats with the least common denominator of the shares, so a table of that length gives the source of
    any position in O(1). In a period, the j-th sample of a source with share w is placed between floor(j / w) and
    ceil((j + 1) / w) - 1, earliest deadline first, which is always feasible (Pfair windows; Baruah et al.,
    Proportionate progress, 1996).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Shares are the weights divided by their sum, computed exactly from their decimal notation.

        Raises ConfigError when a weight is not above 0, or the pattern would be longer than 100,000 samples.
        """
        exact = [Fraction(str(weight)) for weight in weights]
        if not exact or min(exact) <= 0:
            raise ConfigError(f"blend weights {list(weights)}: each must be above 0. Remove a source instead.")
        shares = [weight / sum(exact) for weight in exact]
        period = math.lcm(*(share.denominator for share in shares))
        if period > _LONGEST_PERIOD:
            raise ConfigError(
                f"blend weights {list(weights)}: their pattern repeats after {period:,} samples; the limit is "
                f"{_LONGEST_PERIOD:,}. Use fewer digits."
            )
        self._counts = np.array([int(share * period) for share in shares], np.int64)  # samples per source and period
        self._source = _interleave(self._counts.tolist(), period)  # [period] source of each sample
        self._earlier = np.empty(period, np.int64)  # [period] earlier samples of that source in the period
        for source, count in enumerate(self._counts):
            self._earlier[self._source == source] = np.arange(count)

    def at(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For `samples`, [n] integers from 0: the source of each, and its index within that source, [n] int64 each."""
        periods, places = np.divmod(samples, len(self._source))
        source = self._source[places]
        return source, periods * self._counts[source] + self._earlier[places]


def _interleave(counts: Sequence[int], period: int) -> np.ndarray:
    """The source of each position in a period, [period] int64, in which source i occurs `counts[i]` times."""
    waiting = [(0, -(-period // count), source, 0) for source, count in enumerate(counts)]  # ordered by release
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []  # ordered by deadline
    pattern = np.empty(period, np.int64)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, deadline, source, done = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline, source, done))
        deadline, source, done = heapq.heappop(ready)
        assert deadline > place, "the earliest-deadline rule always finds room"
        pattern[place] = source
        done += 1
        if done < counts[source]:
            release, deadline = done * period // counts[source], -(-(done + 1) * period // counts[source])
            heapq.heappush(waiting, (release, deadline, source, done))
    return pattern


class BlendedOrder:
    """Like `Order`, for several sources interleaved by weight; each source has its own epochs.

    Sequences are numbered across all sources, one source after the other.
    """

    def __init__(self, sequences: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """Take the number of sequences and the weight of each source. Raises ConfigError like `Blend`."""
        self._blend = Blend(weights)
        self._orders = [Order(count, seed, source) for source, count in enumerate(sequences)]
        self._first = np.concatenate([[0], np.cumsum(sequences)[:-1]]).astype(np.int64)

    def take(self, samples_seen: int, count: int) -> np.ndarray:
        """Sequence numbers of samples `samples_seen` .. `samples_seen + count - 1`, [count] int64."""
        return self.at(np.arange(samples_seen, samples_seen + count))

    def at(self, samples: np.ndarray) -> np.ndarray:
        """Sequence numbers, [n] int64, of arbitrary `samples`, [n] integers from 0."""
        sources, places = self._blend.at(samples)
        taken = np.empty(len(samples), np.int64)
        for source, order in enumerate(self._orders):
            here = sources == source
            taken[here] = self._first[source] + order.at(places[here])
        return taken
