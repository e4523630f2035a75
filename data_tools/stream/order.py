"""The order of samples: a pure function of (samples per shard, seed), endless, epoch after epoch, entered anywhere in O(1).

In each epoch, shards are cut into blocks of neighbours, and the blocks of the whole set are shuffled. Samples are then
shuffled within windows of the blocks, in two passes. The second pass is shifted by half a window, so a sample may move
anywhere in its own window and half of the next. A set no larger than a window is shuffled uniformly. `docs/data.md` reports
how good the order is, measured.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

BLOCK, WINDOW = 1024, 65536
"""Samples of a block and of a window by default."""


class SampleOrder:
    """Position in the endless order -> sample. World size, workers and batch size only decide who walks which part."""

    def __init__(self, counts: np.ndarray, seed: int, block: int = BLOCK, window: int = WINDOW) -> None:
        """Prepare the order; nothing is shuffled yet.

        Args:
            counts: (shards,) samples of each shard.
            seed: Decides the order.
            block: Samples of a shard that stay together; 0 keeps whole shards together.
            window: Samples that are shuffled among themselves.
        """
        if block < 0 or window < 2:
            raise ValueError(f"block is {block} and window is {window}; they must be at least 0 and 2")
        counts = np.asarray(counts, np.int64)
        self.samples, self.seed, self.window = int(counts.sum()), seed, window
        self._edges = _block_edges(counts, block)
        """(blocks + 1,) first sample of each block."""
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __getitem__(self, position: int) -> int:
        return int(self.at(np.array([position]))[0])

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the samples at these positions. Each epoch of `samples` positions holds every sample once.

        Args:
            positions: (n,) int.

        Returns:
            (n,) int64.
        """
        # Offsets count from the beginning of their epoch.
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.samples)
        windows = (offsets + self.window // 2) // self.window
        if len(offsets) and epochs[0] == epochs[-1] and windows[0] == windows[-1] and (np.diff(offsets) > 0).all():
            return self._within(int(epochs[0]), int(windows[0]), offsets)  # usual for a batch
        samples = np.empty(len(offsets), np.int64)
        for epoch, window in set(zip(epochs.tolist(), windows.tolist(), strict=True)):
            here = (epochs == epoch) & (windows == window)
            samples[here] = self._within(epoch, window, offsets[here])
        return samples

    def _within(self, epoch: int, window: int, offsets: np.ndarray) -> np.ndarray:
        samples = _cached(self._windows, (epoch, window), 3, lambda: self._shuffle_window(epoch, window))
        return samples[offsets - self._bounds(window, self.window // 2)[0]]

    def _bounds(self, window: int, shift: int) -> tuple[int, int]:
        """Return the first offset of a window in its epoch, and the offset after its last."""
        start = window * self.window - shift
        return max(start, 0), min(start + self.window, self.samples)

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        """Return the samples of one window of the second pass, in order."""
        low, high = self._bounds(window, self.window // 2)
        # Trace the samples back: second pass, then the one or two windows of the first pass, then the shuffled blocks.
        offsets = low + permutation(high - low, self.seed, epoch, 2, window)
        for first_pass_window in range(low // self.window, (high - 1) // self.window + 1):
            start, end = self._bounds(first_pass_window, 0)
            inside = (offsets >= start) & (offsets < end)
            shuffled = permutation(end - start, self.seed, epoch, 1, first_pass_window)
            offsets[inside] = start + shuffled[offsets[inside] - start]
        blocks, ends = _cached(self._epochs, epoch, 2, lambda: self._shuffle_blocks(epoch))
        # Searched in ascending order, because the ends of five million blocks fit no processor's cache.
        ascending = np.argsort(offsets)
        slots = np.empty_like(offsets)
        slots[ascending] = np.searchsorted(ends, offsets[ascending], side="right")
        return self._edges[blocks[slots] + 1] - (ends[slots] - offsets)

    def _shuffle_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the blocks in this epoch's order, and the number of samples up to the end of each."""
        blocks = permutation(len(self._edges) - 1, self.seed, epoch, 0)
        return blocks, np.cumsum(self._edges[blocks + 1] - self._edges[blocks])


def _block_edges(counts: np.ndarray, block: int) -> np.ndarray:
    """Cut shards into equal blocks of at most `block` samples. Return the first sample of each, and the end of the last."""
    counts = counts[counts > 0]
    parts = -(-counts // block) if block else np.ones_like(counts)
    shards = np.repeat(np.arange(len(counts)), parts)
    # In place, because a set may have five million blocks: the number of a block in its shard becomes its first sample.
    edges = np.arange(len(shards)) - np.repeat(np.cumsum(parts) - parts, parts)
    edges *= counts[shards]
    edges //= parts[shards]
    edges += (np.cumsum(counts) - counts)[shards]
    return np.append(edges, counts.sum())


def _cached(cache: OrderedDict, key: Any, limit: int, make: Callable[[], Any]) -> Any:
    """Return an entry of a small cache. A missing one is made, and the least recently used one leaves."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > limit:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def permutation(count: int, *parts: int) -> np.ndarray:
    """Return a permutation of `count` numbers, (count,) int64, which is a function of `parts` alone.

    The numbers are sorted by hashes that carry them in their low bits. numpy's own `permutation` may change with its
    version.
    """
    numbers = np.arange(count, dtype=np.uint64)
    low = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    hashes = _mix(_mix(numbers * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(derived_seed(*parts)))
    return (np.sort((hashes & ~low) | numbers) & low).astype(np.int64)


def derived_seed(*parts: int) -> int:
    """Return a 63-bit seed of several numbers (seed, step, sample …). It is well mixed and the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def uniforms(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
    """Return random numbers in [0, 1) for samples. Row i depends on `seed` and `positions[i]` alone.

    The generator is counter-based: SplitMix64's finaliser, applied twice.

    Args:
        seed: Decides the numbers.
        positions: (samples,) int.
        count: Numbers per sample.

    Returns:
        (samples, count) float64.
    """
    counter = positions.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15) + np.arange(count, dtype=np.uint64)[
        None
    ] * np.uint64(0xD1B54A32D192ED03)
    mixed = _mix(_mix(counter) ^ np.uint64(derived_seed(seed)))
    # A float64 holds integers of 53 bits exactly.
    return (mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def _mix(value: np.ndarray) -> np.ndarray:
    # SplitMix64's finaliser (Steele, Lea and Flood 2014). uint64 products wrap around, as it needs.
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
