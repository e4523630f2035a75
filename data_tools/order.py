"""The order of samples: a pure function of (number of samples, seed), endless, epoch after epoch."""

from __future__ import annotations

import numpy as np


class SampleOrder:
    """Position in the endless order -> sample. World size, workers and batch size are only ways to walk it."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        """The sample at a position: every sample once in each run of `samples` positions."""
        epoch, place = divmod(position, self.samples)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
        return int(self._permutation[place])


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
