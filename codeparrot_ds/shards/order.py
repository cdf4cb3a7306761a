"""The order of training data: a stateless, seeded permutation of sequence numbers.

The position in the data is one integer, `samples_seen`. World size, micro-batch and accumulation cannot change
what a step sees: a step takes the next `global_batch_size` sequences, and each rank its slice of them.
"""

from dataclasses import dataclass

import numpy as np

_ROUNDS = 6
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's multipliers


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every output bit depends on every input bit. [n] uint64 to [n] uint64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random permutation of 0 .. n - 1 in O(1) memory: a Feistel network with cycle walking.

    The network permutes the smallest 2^(2k) >= n numbers, fewer than 4 n; a number that lands outside is
    permuted again until it lands inside, fewer than four times on average (Black and Rogaway, 2002).
    """

    n: int
    seed: int
    epoch: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Where `positions`, [k] integers in 0 .. n - 1, are sent: [k] int64, all different."""
        half = max(1, ((self.n - 1).bit_length() + 1) // 2)
        keys = np.random.default_rng([self.seed, self.epoch]).integers(0, 2**64, _ROUNDS, dtype=np.uint64)
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
    """Which sequence is read when: endless epochs, each a permutation of all sequences.

    Attributes:
        sequences: in the training split.
        seed: of the permutations; epoch e uses (seed, e).
    """

    sequences: int
    seed: int

    def take(self, samples_seen: int, count: int) -> np.ndarray:
        """Sequence numbers of samples `samples_seen` .. `samples_seen + count - 1`, [count] int64."""
        samples = np.arange(samples_seen, samples_seen + count)
        epochs, positions = np.divmod(samples, self.sequences)
        taken = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            taken[here] = Permutation(self.sequences, self.seed, int(epoch))(positions[here])
        return taken
