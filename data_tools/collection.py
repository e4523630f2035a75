"""A shard folder read once, in order: for validation, evaluation and indexing. Nothing may be skipped: it would change the score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_tools.images import decode_image
from data_tools.manifest import Manifest
from data_tools.reader import ShardReader
from data_tools.stream import begin_worker, raised
from runtime.errors import DataError


class Collection(Dataset):
    """Images and their captions, by number. `captions_per_image`: take the first so many; None takes all."""

    def __init__(self, folder: str | Path | Manifest, captions_per_image: int | None = None) -> None:
        self.reader = ShardReader(folder)
        self.transform: Callable | None = None
        lists = [self.reader.captions(sample)[:captions_per_image] for sample in range(len(self.reader))]
        self.captions = [caption for captions in lists for caption in captions]
        """All captions, image by image."""
        self.caption_image = np.repeat(np.arange(len(lists)), [len(captions) for captions in lists])
        """(captions,) the number of each caption's image."""
        if not lists:
            raise DataError(f"{self.reader.manifest.folder} holds no samples to score")

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def keys(self) -> list[str]:
        return [self.reader.key(sample) for sample in range(len(self))]

    def __getitem__(self, sample: int) -> Any:
        """An image, or the DataError of one that cannot be read: raised in a loader worker, torch would wrap it in a
        traceback of its own."""
        try:
            image = decode_image(self.reader[sample].image)
        except (OSError, ValueError, DataError) as error:
            return DataError(
                f"image {self.reader.key(sample)} in {self.reader.manifest.folder} cannot be read ({error}); scores need every image, shard it again"
            )
        return image if self.transform is None else self.transform(image)

    def images(self, transform: Callable, numbers: range, batch_size: int, workers: int) -> Iterator[Tensor]:
        """Batches (batch, 3, size, size) of the images with these numbers, in their order. Raises DataError at one that
        cannot be read."""
        self.transform = transform
        loader = DataLoader(
            torch.utils.data.Subset(self, numbers),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=begin_worker,
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # else it would draw from the global one
        )
        yield from raised(loader)


def _collate(images: list[Any]) -> Any:
    errors = [image for image in images if isinstance(image, DataError)]
    return errors[0] if errors else torch.stack(images)
