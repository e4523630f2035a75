"""Mix datasets in one endless order, each in its share: position -> dataset, and position in that dataset.

Tested in tests/data_tools/stream/test_training_set.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CYCLE = 10_000
"""Positions after which the pattern of datasets repeats. Shares are exact to one part in `CYCLE`."""


class Mixture:
    """A fixed pattern in which datasets take turns, spread so evenly that every batch holds them all.

    It is O(1) at any position: each cycle of the pattern holds `per_cycle` positions of each dataset.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Make the pattern for these weights, which are positive and of any scale."""
        shares = np.asarray(weights, float) / np.sum(weights)
        self.per_cycle = _round_shares(shares * CYCLE) if len(shares) > 1 else np.array([1])
        """(datasets,) positions of each dataset in one cycle."""
        owners = np.repeat(np.arange(len(shares)), self.per_cycle)
        number = np.concatenate([np.arange(count) for count in self.per_cycle])
        # The n-th position of a dataset belongs at (n + 1/2) / count of the cycle: all are spread evenly.
        turn = np.lexsort((owners, (number + 0.5) / self.per_cycle[owners]))
        self._owner, self._number = owners[turn], number[turn]

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the dataset at each position, and the position within that dataset: (n,) positions -> twice (n,)."""
        cycle, offset = np.divmod(np.asarray(positions, np.int64), len(self._owner))
        owner = self._owner[offset]
        return owner, cycle * self.per_cycle[owner] + self._number[offset]

    def counts(self, consumed: int) -> np.ndarray:
        """Return (datasets,) how many of the first `consumed` positions belong to each dataset."""
        cycle, offset = divmod(consumed, len(self._owner))
        return cycle * self.per_cycle + np.bincount(self._owner[:offset], minlength=len(self.per_cycle))


def _round_shares(exact: np.ndarray) -> np.ndarray:
    """Round to whole numbers with the same sum, none of them 0, by largest remainder."""
    whole = np.maximum(np.floor(exact), 1).astype(np.int64)
    left = int(round(exact.sum())) - int(whole.sum())
    if left < 0:
        # Shares below one in CYCLE were rounded up, at the cost of the largest.
        whole[np.argmax(whole)] += left
    else:
        whole[np.argsort(-(exact - whole), kind="stable")[:left]] += 1
    return whole
