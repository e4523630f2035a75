"""Cached features of images: rows in blocks on a disk, read through memory maps. `pretrain/feature_cache.py` writes them.

A block is one `.npy` file, (samples, views, …), of neighbouring samples. A file of reasons stands beside it where images of the
block could not be read.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.errors import DataError
from runtime.files import read_json, replaced_file, write_json

BLOCK = 256
"""Samples of a block: what a killed run loses at most, for each rank."""


class FeatureBlocks:
    """The features of all samples of a `ShardReader`, by sample number."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples = folder, samples
        self._open: dict[int, tuple[np.ndarray, dict[str, str]]] = {}

    def __len__(self) -> int:
        return self.samples

    def missing(self) -> list[int]:
        """Return the numbers of the blocks that are not written yet."""
        return [number for number in range(-(-self.samples // BLOCK)) if not self._path(number).exists()]

    def members(self, block: int) -> range:
        """Return the samples of a block."""
        return range(block * BLOCK, min((block + 1) * BLOCK, self.samples))

    def write(self, block: int, rows: np.ndarray, broken: dict[int, str]) -> None:
        """Write a block, whole or not at all.

        Args:
            block: its number.
            rows: (samples of the block, views, …).
            broken: reasons of the samples that could not be read, by sample number.
        """
        if broken:  # before the rows, because they are what counts as written
            write_json(self._path(block).with_suffix(".json"), {str(sample): why for sample, why in broken.items()})
        with replaced_file(self._path(block)) as temporary, temporary.open("wb") as file:
            np.save(file, rows)

    def views(self, sample: int) -> np.ndarray:
        """Return the views of a sample, (views, …), in the cache's number format.

        Raises:
            ValueError: its image could not be read; the message says why.
        """
        rows, reasons = self._block(sample // BLOCK)
        if why := reasons.get(str(sample)):
            raise ValueError(why)
        return rows[sample % BLOCK]

    def first_views(self, samples: range) -> Tensor:
        """Return the first view of each sample, (samples, …). Raises DataError where an image could not be read."""
        try:
            return torch.from_numpy(np.stack([self.views(sample)[0] for sample in samples]))
        except ValueError as error:
            raise DataError(
                f"an image of {self.folder.parent} cannot be read ({error}); scores need every image"
            ) from error

    def _block(self, number: int) -> tuple[np.ndarray, dict[str, str]]:
        if number not in self._open:
            path = self._path(number)
            reasons = path.with_suffix(".json")
            self._open[number] = np.load(path, mmap_mode="r"), read_json(reasons) if reasons.exists() else {}
        return self._open[number]

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:06d}.npy"


class CachedViews:
    """Draws an example's views from the cache, in the place of a transform."""

    def __init__(self, blocks: FeatureBlocks, views: int) -> None:
        """Draw `views` of each sample's cached views, different ones as far as there are enough."""
        self.blocks, self.count = blocks, views

    def check(self, sample: int) -> int:
        """Return the sample's number. Raises ValueError where its image could not be read."""
        self.blocks.views(sample)
        return sample

    def __call__(self, sample: int, seed: int) -> Tensor:
        """Return the views that `seed` draws of a sample, (views, …)."""
        rows = self.blocks.views(sample)
        # Python promises the same numbers of `random()` in every version, and of nothing else.
        draw = random.Random(seed)
        order = sorted(range(len(rows)), key=lambda _: draw.random())
        return torch.from_numpy(rows[[order[view % len(rows)] for view in range(self.count)]])
