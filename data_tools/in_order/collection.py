"""Read captioned images once and in order, for validation, evaluation and indexing.

Nothing is skipped, because that would change the score. The images come from a shard folder, or from the folder of a caption
file (COCO's, Karpathy's, …), or from a folder or tar that is named besides the caption file.
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
from data_tools.pixels.feature_blocks import FeatureBlocks
from data_tools.shards.manifest import Manifest, hash_image_id, read_manifest
from data_tools.shards.reader import RawSample, ShardReader
from data_tools.sources import Choice, clean_caption, collect, detect_kind, safe_key
from data_tools.sources.collecting import read_entries
from data_tools.sources.items import Dropped
from data_tools.workers import open_loader, raise_errors
from runtime.errors import DataError, RecipeError


class CaptionFile:
    """The images of a caption file in its own order, each with all of its captions. It reads like a `ShardReader`."""

    def __init__(self, path: Path, images: Path | None, split: str | None, captions_only: bool = False) -> None:
        """Read the captions.

        Args:
            path: The caption file.
            images: Folder or tar of the images; None: the file's own folder.
            split: Split of a file that holds several.
            captions_only: Whether to skip looking up the images. Scores that exist already need captions alone.

        Raises:
            DataError: An image has no caption, or is missing.
        """
        self.path = path
        kind = detect_kind(path)
        # Only a file that holds splits is read by split. For others, `split` is the user's name for the whole file.
        choice = Choice(split=split if kind == "karpathy" else None)
        self.samples: list[tuple[str, list[str], Callable[[], bytes] | None]] = []
        """Key, captions, and a function that reads the encoded image."""
        if captions_only:
            for entry in read_entries(path, kind, choice, Dropped()):
                captions = [cleaned for caption in entry.captions if (cleaned := clean_caption(caption))]
                if not captions:
                    raise DataError(
                        f"{path}: image {entry.name} has no caption; leave it out of the file and of the scores"
                    )
                self.samples.append((safe_key(entry.name)[0], captions, None))
        else:
            collected = collect(path, images, kind=kind, choice=choice)
            if dropped := collected.dropped.get("images without a caption"):
                raise DataError(
                    f"{path}: {dropped:,} images have no caption; leave them out of the file, or caption them"
                )
            self.samples = [(item.key, item.captions, item.read) for item in collected.items]

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, sample: int) -> str:
        """Return the key of an image."""
        return self.samples[sample][0]

    def captions(self, sample: int) -> list[str]:
        """Return the captions of an image."""
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
    """Open a shard folder or a caption file as a collection.

    Args:
        data: The shard folder or the caption file.
        captions_per_image: Number of captions to take of each image; None: all.
        images: Folder or tar of a caption file's images; empty: the file's own folder.
        split: Split of a caption file that holds several.
        captions_only: Whether to skip looking up the images of a caption file.
    """
    if not Path(data).is_file():
        return Collection(data, captions_per_image)
    image_path = Path(images) if images else None
    return Collection(CaptionFile(Path(data), image_path, split, captions_only), captions_per_image)


def validation_collection(folder: str, select_on_test: bool) -> Collection:
    """Open the data that a checkpoint is chosen by.

    A test split is refused unless `select_on_test` allows it. The score of a checkpoint on the split that chose it is biased.

    Raises:
        RecipeError: The folder was made from a test split.
    """
    manifest = read_manifest(folder)
    names = [str(manifest.source.get(key) or "") for key in ("split", "names", "annotation")]
    if not select_on_test and (test := next((name for name in names if _TEST.search(name)), None)):
        raise RecipeError(
            f"data.validation {folder} was made from {test!r}, a test split, and the checkpoint would be chosen by the data it is "
            "scored on; validate on another split, or insist with --data.select_on_test true"
        )
    return Collection(manifest)


_TEST = re.compile(r"(?<![a-z])test(?![a-z])|test(?=images)", re.IGNORECASE)
"""Matches `test`, `coco_karpathy_test.json`, `Flickr_8k.testImages.txt`, but not `latest` or `testimony`."""


class Collection(Dataset):
    """Images and their captions, by number."""

    def __init__(self, source: str | Path | Manifest | CaptionFile, captions_per_image: int | None = None) -> None:
        """Open the source and read all captions.

        Args:
            source: A shard folder, its manifest, or a caption file.
            captions_per_image: Number of captions to take of each image, the first ones; None: all.

        Raises:
            DataError: The source holds no sample, or one whose captions cannot be read.
        """
        self.reader = source if isinstance(source, CaptionFile) else ShardReader(source)
        self.location = self.reader.path if isinstance(self.reader, CaptionFile) else self.reader.location
        self.transform: Callable | None = None
        self.features: FeatureBlocks | None = None
        """Cached features of the images, which a run's validation reads in their place."""
        lists = [self.reader.captions(sample)[:captions_per_image] for sample in range(len(self.reader))]
        self.captions = [caption for captions in lists for caption in captions]
        """All captions, those of the first image first."""
        self.caption_image = np.repeat(np.arange(len(lists)), [len(captions) for captions in lists])
        """(captions,) number of each caption's image."""
        if not lists:
            raise DataError(f"{self.location} holds no samples to score; give another folder or file")

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def keys(self) -> list[str]:
        """The images' keys, in order."""
        return [self.reader.key(sample) for sample in range(len(self))]

    def __getitem__(self, sample: int) -> Any:
        """Return an image, or the DataError of one that cannot be read.

        The error is not raised, because torch wraps what a loader worker raises in a traceback of its own.
        """
        try:
            image = decode_image(self.reader[sample].image)
        except (OSError, ValueError, DataError) as error:
            return DataError(
                f"image {self.reader.key(sample)} in {self.location} cannot be read ({error}); scores need every image, so mend or fetch it"
            )
        return image if self.transform is None else self.transform(image)

    def images(self, transform: Callable, numbers: range, batch_size: int, workers: int) -> Iterator[Tensor]:
        """Yield batches of images in order.

        Args:
            transform: Turns a decoded image into (3, size, size).
            numbers: Numbers of the images.
            batch_size: Images per batch; the last batch may have fewer.
            workers: Loader processes; 0: this process reads.

        Yields:
            (batch, 3, size, size).

        Raises:
            DataError: An image cannot be read.
        """
        self.transform = transform
        yield from raise_errors(open_loader(Subset(self, numbers), _collate, workers, batch_size=batch_size))


def _collate(images: list[Any]) -> Any:
    errors = [image for image in images if isinstance(image, DataError)]
    return errors[0] if errors else torch.stack(images)
