"""The order of samples: a pure function of (samples per shard, seed), endless, epoch after epoch, entered anywhere in O(1).

Per epoch, shards are cut into blocks of neighbours, the blocks of the whole set are shuffled, and samples are then shuffled
within a window that slides over the blocks: two passes of windows, the second shifted by half a window, so that a sample may
go anywhere in its own and half of the next. A set no larger than a window is shuffled uniformly. `docs/data.md` has what the
order is worth, measured.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

BLOCK, WINDOW = 1024, 65536
"""Samples of a block and of a window, unless a recipe says otherwise."""


class SampleOrder:
    """Position in the endless order -> sample. World size, workers and batch size are only ways to walk it."""

    def __init__(self, counts: np.ndarray, seed: int, block: int = BLOCK, window: int = WINDOW) -> None:
        """counts: (shards,) samples of each; block: samples of a shard that stay together, 0 for whole shards."""
        if block < 0 or window < 2:
            raise ValueError(f"block {block} and window {window} do not make a shuffle")
        counts = np.asarray(counts, np.int64)
        self.samples, self.seed, self.window = int(counts.sum()), seed, window
        self._edges = _block_edges(counts, block)
        """(blocks + 1,) first sample of each block."""
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __getitem__(self, position: int) -> int:
        return int(self.at(np.array([position]))[0])

    def at(self, positions: np.ndarray) -> np.ndarray:
        """(n,) positions -> (n,) int64 samples: every sample once in each run of `samples` positions that begins an epoch."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.samples)
        windows = (places + self.window // 2) // self.window
        if len(places) and epochs[0] == epochs[-1] and windows[0] == windows[-1] and (np.diff(places) > 0).all():
            return self._within(int(epochs[0]), int(windows[0]), places)  # the usual case: a batch
        found = np.empty(len(places), np.int64)
        for epoch, window in set(zip(epochs.tolist(), windows.tolist(), strict=True)):
            here = (epochs == epoch) & (windows == window)
            found[here] = self._within(epoch, window, places[here])
        return found

    def _within(self, epoch: int, window: int, places: np.ndarray) -> np.ndarray:
        samples = _kept(self._windows, (epoch, window), 3, lambda: self._shuffle_window(epoch, window))
        return samples[places - self._bounds(window, self.window // 2)[0]]

    def _bounds(self, window: int, shift: int) -> tuple[int, int]:
        start = window * self.window - shift
        return max(start, 0), min(start + self.window, self.samples)

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        """The samples of one window of the second pass, in order."""
        low, high = self._bounds(window, self.window // 2)
        places = low + permutation(high - low, self.seed, epoch, 2, window)
        for first in range(low // self.window, (high - 1) // self.window + 1):
            start, end = self._bounds(first, 0)
            inside = (places >= start) & (places < end)
            places[inside] = start + permutation(end - start, self.seed, epoch, 1, first)[places[inside] - start]
        blocks, ends = _kept(self._epochs, epoch, 2, lambda: self._shuffle_blocks(epoch))
        near = np.argsort(places)  # searched in their order: the ends of five million blocks fit no processor's cache
        slots = np.empty_like(places)
        slots[near] = np.searchsorted(ends, places[near], side="right")
        return self._edges[blocks[slots] + 1] - (ends[slots] - places)

    def _shuffle_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """-> blocks in their order of this epoch, and how many samples there are up to the end of each."""
        blocks = permutation(len(self._edges) - 1, self.seed, epoch, 0)
        return blocks, np.cumsum(self._edges[blocks + 1] - self._edges[blocks])


def _block_edges(counts: np.ndarray, block: int) -> np.ndarray:
    """Shards cut into equal blocks of at most `block` samples -> the first sample of each, and the end of the last."""
    counts = counts[counts > 0]
    parts = -(-counts // block) if block else np.ones_like(counts)
    shards = np.repeat(np.arange(len(counts)), parts)
    number = np.arange(len(shards)) - np.repeat(np.cumsum(parts) - parts, parts)
    number *= counts[shards]
    number //= parts[shards]
    number += (np.cumsum(counts) - counts)[shards]
    return np.append(number, counts.sum())


def _kept(cache: OrderedDict, key: Any, limit: int, make: Callable[[], Any]) -> Any:
    """The entry of a small cache, made where it is missing; the one used longest ago leaves."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > limit:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def permutation(count: int, *parts: int) -> np.ndarray:
    """A permutation of `count` numbers, a function of `parts` alone: (count,) int64.

    Numbers are sorted by hashes that carry them in their low bits. numpy's own `permutation` may change with its version.
    """
    numbers = np.arange(count, dtype=np.uint64)
    low = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    hashes = _mix(_mix(numbers * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(derived_seed(*parts)))
    return (np.sort((hashes & ~low) | numbers) & low).astype(np.int64)


def derived_seed(*parts: int) -> int:
    """One 63-bit seed from (seed, step, sample …): well mixed, the same on every machine, not dependent on any state."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def uniforms(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
    """Random numbers in [0, 1) that belong to samples: row i depends on `seed` and `positions[i]` alone.

    positions: (samples,) int -> (samples, count) float64. A counter-based generator (SplitMix64's finaliser, twice).
    """
    counter = positions.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15) + np.arange(count, dtype=np.uint64)[
        None
    ] * np.uint64(0xD1B54A32D192ED03)
    mixed = _mix(_mix(counter) ^ np.uint64(derived_seed(seed)))
    return (mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
