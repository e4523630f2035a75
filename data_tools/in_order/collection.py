"""Captioned images read once, in order: for validation, evaluation and indexing. Nothing may be skipped: it would change the score.

A shard folder, or a caption file (COCO's, Karpathy's, …) with its images beside it or in a folder of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from data_tools.pixels.decode import decode_image
from data_tools.shards.manifest import Manifest, hash_image_id, read_manifest
from data_tools.shards.reader import RawSample, ShardReader
from data_tools.sources import Choice, clean_caption, collect, detect_kind, safe_key
from data_tools.sources.collecting import read_entries
from data_tools.sources.items import Dropped
from data_tools.workers import open_loader, raise_errors
from runtime.errors import DataError, RecipeError


class CaptionFile:
    """The images of a caption file in its own order, each with all of its captions; reads like a `ShardReader`.

    images: their folder or tar; None: the file's own folder. `captions_only` looks up no image, for scores that exist already.
    split: of a file that holds several.
    """

    def __init__(self, path: Path, images: Path | None, split: str | None, captions_only: bool = False) -> None:
        self.path = path
        kind = detect_kind(path)
        # Only a file that holds splits is asked for one; of others, the split is what the user calls the whole.
        choice = Choice(split=split if kind == "karpathy" else None)
        self.samples: list[tuple[str, list[str], Callable[[], bytes] | None]] = []
        if captions_only:
            for entry in read_entries(path, kind, choice, Dropped()):
                captions = [cleaned for caption in entry.captions if (cleaned := clean_caption(caption))]
                if not captions:
                    raise DataError(
                        f"{path}: image {entry.name} has no caption; leave it out of the file and of the scores"
                    )
                self.samples.append((safe_key(entry.name)[0], captions, None))
        else:
            found = collect(path, images, kind=kind, choice=choice)
            if dropped := found.dropped.get("images without a caption"):
                raise DataError(
                    f"{path}: {dropped:,} images have no caption; leave them out of the file, or caption them"
                )
            self.samples = [(item.key, item.captions, item.read) for item in found.items]

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, sample: int) -> str:
        return self.samples[sample][0]

    def captions(self, sample: int) -> list[str]:
        return self.samples[sample][1]

    def __getitem__(self, sample: int) -> RawSample:
        key, captions, read = self.samples[sample]
        assert read is not None, "opened for its captions only"
        text = json.dumps({"captions": captions}).encode()
        return RawSample(key, self.path.name, read(), text, "json", hash_image_id(key))


def open_collection(
    data: str | Path,
    captions_per_image: int | None,
    images: str = "",
    split: str | None = None,
    captions_only: bool = False,
) -> Collection:
    """A shard folder, or a caption file with its images (see `CaptionFile`), as a collection."""
    if not Path(data).is_file():
        return Collection(data, captions_per_image)
    place = Path(images) if images else None
    return Collection(CaptionFile(Path(data), place, split, captions_only), captions_per_image)


def validation_collection(folder: str, select_on_test: bool) -> Collection:
    """The data that a checkpoint is chosen by. A test split is refused unless insisted on: what was chosen by it cannot be
    reported on it."""
    manifest = read_manifest(folder)
    told = [str(manifest.source.get(name) or "") for name in ("split", "names", "annotation")]
    if not select_on_test and (found := next((name for name in told if _TEST.search(name)), None)):
        raise RecipeError(
            f"data.validation {folder} was made from {found!r}, a test split: the checkpoint would be chosen by what it is to be "
            "scored on; validate on another split, or insist with --data.select_on_test true"
        )
    return Collection(manifest)


_TEST = re.compile(r"(?<![a-z])test(?![a-z])|test(?=images)", re.IGNORECASE)
"""`test`, `coco_karpathy_test.json`, `Flickr_8k.testImages.txt`; not `latest`, `testimony`."""


class Collection(Dataset):
    """Images and their captions, by number. `captions_per_image`: take the first so many; None takes all."""

    def __init__(self, source: str | Path | Manifest | CaptionFile, captions_per_image: int | None = None) -> None:
        self.reader = source if isinstance(source, CaptionFile) else ShardReader(source)
        self.place = self.reader.path if isinstance(self.reader, CaptionFile) else self.reader.location
        self.transform: Callable | None = None
        lists = [self.reader.captions(sample)[:captions_per_image] for sample in range(len(self.reader))]
        self.captions = [caption for captions in lists for caption in captions]
        """All captions, image by image."""
        self.caption_image = np.repeat(np.arange(len(lists)), [len(captions) for captions in lists])
        """(captions,) the number of each caption's image."""
        if not lists:
            raise DataError(f"{self.place} holds no samples to score")

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
                f"image {self.reader.key(sample)} in {self.place} cannot be read ({error}); scores need every image, mend or fetch it"
            )
        return image if self.transform is None else self.transform(image)

    def images(self, transform: Callable, numbers: range, batch_size: int, workers: int) -> Iterator[Tensor]:
        """Batches (batch, 3, size, size) of the images with these numbers, in their order. Raises DataError at one that
        cannot be read."""
        self.transform = transform
        yield from raise_errors(open_loader(Subset(self, numbers), _collate, workers, batch_size=batch_size))


def _collate(images: list[Any]) -> Any:
    errors = [image for image in images if isinstance(image, DataError)]
    return errors[0] if errors else torch.stack(images)
