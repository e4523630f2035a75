"""Several datasets in one endless order, each in its share: a position -> which dataset, and which position of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CYCLE = 10_000
"""Positions after which the pattern of datasets repeats: shares are exact to one in so many."""


class Mixture:
    """Datasets take turns in a fixed pattern, spread as evenly as their shares allow, so that every batch holds them all.

    O(1) at any position: a turn of the pattern holds `per_cycle` positions of each dataset.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: positive, of any scale."""
        shares = np.asarray(weights, float) / np.sum(weights)
        self.per_cycle = _whole(shares * CYCLE) if len(shares) > 1 else np.array([1])
        """(datasets,) positions of each in one turn of the pattern."""
        owners = np.repeat(np.arange(len(shares)), self.per_cycle)
        number = np.concatenate([np.arange(count) for count in self.per_cycle])
        turn = np.lexsort((owners, (number + 0.5) / self.per_cycle[owners]))
        self._owner, self._number = owners[turn], number[turn]

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) positions -> (n,) datasets, and (n,) each one's own positions."""
        cycle, place = np.divmod(np.asarray(positions, np.int64), len(self._owner))
        owner = self._owner[place]
        return owner, cycle * self.per_cycle[owner] + self._number[place]

    def counts(self, consumed: int) -> np.ndarray:
        """(datasets,) how many of the first `consumed` positions are each dataset's."""
        cycle, place = divmod(consumed, len(self._owner))
        return cycle * self.per_cycle + np.bincount(self._owner[:place], minlength=len(self.per_cycle))


def _whole(exact: np.ndarray) -> np.ndarray:
    """Whole numbers with the sum of `exact`, none of them 0, by largest remainder."""
    whole = np.maximum(np.floor(exact), 1).astype(np.int64)
    left = int(round(exact.sum())) - int(whole.sum())
    if left < 0:  # shares below one in CYCLE were rounded up: the largest pays
        whole[np.argmax(whole)] += left
    else:
        whole[np.argsort(-(exact - whole), kind="stable")[:left]] += 1
    return whole
