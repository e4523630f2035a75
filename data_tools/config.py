"""What data a run reads, and how a sample becomes a training example."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from runtime.errors import RecipeError
from runtime.recipe import free


@dataclass
class AugmentConfig:
    """How one image becomes a training view (Section 4 of ALBEF; the operations leave colours alone, which captions name)."""

    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    """Area of the random crop, as a share of the image; [1, 1] keeps all of it."""
    flip: bool = True
    """Mirror half of the images. Off where captions tell left from right."""
    operations: int = 2
    """RandAugment operations per view; 0 turns it off."""
    magnitude: int = 7
    """Strength of the operations, 0 to 10."""
    where: Literal["workers", "device"] = "workers"
    """Who crops, mirrors, resizes and operates: the loader's workers, or the device, where workers only decode. What is
    drawn is the same; pixels agree but for rounding."""

    def __post_init__(self) -> None:
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise RecipeError(
                f"augment.crop_scale is {self.crop_scale}; it is two shares of the area, 0 < low <= high <= 1"
            )
        if self.operations < 0:
            raise RecipeError(f"augment.operations is {self.operations}; it is a number of operations, 0 or more")
        if not 0 <= self.magnitude <= 10:
            raise RecipeError(f"augment.magnitude is {self.magnitude}; it goes from 0 to 10")


@dataclass
class FilterConfig:
    """Which samples are trained on. An index of them is made once, and kept with the shards."""

    min_words: int = 0
    """Captions with fewer words are left out; a sample without captions left is, too."""
    max_words: int | None = None
    """Captions with more words are left out."""
    min_side: int = 0
    """Images whose shorter side has fewer pixels are left out."""
    max_aspect: float | None = None
    """Images are left out whose longer side is more than this many times the shorter."""

    def __post_init__(self) -> None:
        if self.min_words < 0 or self.min_side < 0 or (self.max_words is not None and self.max_words < self.min_words):
            raise RecipeError(
                f"data.filter keeps captions of {self.min_words} to {self.max_words} words and sides from {self.min_side} "
                "pixels; no sample is like that"
            )
        if self.max_aspect is not None and self.max_aspect < 1:
            raise RecipeError(f"data.filter.max_aspect is {self.max_aspect}; it is longer side by shorter, 1 or more")

    @property
    def counts_words(self) -> bool:
        return self.min_words > 0 or self.max_words is not None

    @property
    def used(self) -> bool:
        return self != FilterConfig()

    def allows(self, caption: str) -> bool:
        words = len(caption.split())
        return words >= self.min_words and (self.max_words is None or words <= self.max_words)


@dataclass
class ShuffleConfig:
    """How samples are shuffled: blocks of neighbours over the whole set, then samples within a window of blocks."""

    block: int | None = None
    """Samples of a shard that stay together; 0: whole shards; none: 1,024, or whole shards where a folder is remote."""
    window: int = 65536
    """Samples that are shuffled among themselves. Remote shards: as many as it touches must fit into the cache."""

    def __post_init__(self) -> None:
        if (self.block or 0) < 0 or self.window < 2:
            raise RecipeError(
                f"data.shuffle has blocks of {self.block} and windows of {self.window} samples; use 0 and 2 at least"
            )


@dataclass
class CacheConfig:
    """Where shards are kept that are read from elsewhere. Shared by the processes of a node."""

    folder: str = ""
    """A folder on a disk of the node, variables allowed ($TMPDIR/shards); empty: $LIGATURE_CACHE, else ~/.cache/ligature/shards."""
    gigabytes: float = 100.0
    """What it may hold (10^9 bytes): shards used longest ago leave first."""
    stage: bool = False
    """Take shards of local folders through it as well: from a slow shared disk to the node's own, hashes checked."""

    def __post_init__(self) -> None:
        if self.gigabytes <= 0:
            raise RecipeError(f"data.cache.gigabytes is {self.gigabytes}; it must hold some shards")


@dataclass
class ReadConfig:
    """The shards of a run, and how they are read."""

    train: str | list[str] | dict[str, float] = ""
    """Shard folder to train on (`ligature shard` makes one), on a disk or remote (s3://…, gs://…, https://…); a list of
    folders, read as one; or a mapping of folders to weights, mixed in these shares."""
    validation: str | None = None
    """Shard folder that R@K is measured on during the run; none: no validation, and `latest` is all there is."""
    select_on_test: bool = False
    """Insist on a validation folder that was made from a test split."""
    workers: int = free(2)
    """Loader processes of each rank; 0 decodes in the training process."""
    captions: Literal["one", "all"] = "one"
    """`one`: an epoch has each image once, with one of its captions; `all`: once with each caption."""
    max_bad_share: float = free(0.01)
    """The run stops when more than this share of the samples could not be decoded."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    shuffle: ShuffleConfig = field(default_factory=ShuffleConfig)
    cache: CacheConfig = free(default_factory=CacheConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise RecipeError(f"data.workers is {self.workers}; it is a number of processes, 0 or more")
        if self.train in ([], {}) or (isinstance(self.train, str) and self.train.startswith(("[", "{"))):
            raise RecipeError(
                f"data.train is {self.train!r}; it is a folder, a list of folders, or folders with weights"
            )
        if isinstance(self.train, dict) and (wrong := [name for name, weight in self.train.items() if not weight > 0]):
            raise RecipeError(f"data.train gives {wrong[0]} the weight {self.train[wrong[0]]}; a weight is more than 0")


@dataclass
class DataConfig(ReadConfig):
    """The shards of a pretraining run, and its words."""

    tokenizer: str = "train"
    """`train` learns a WordPiece vocabulary from the training captions; else a tokenizer's folder, or its name on a hub."""
    vocabulary: int = 30522
    """Words and pieces to learn at most, where the tokenizer is trained."""
    punctuation: bool = True
    """Off: captions are read without it, and hyphens part words, as ALBEF prepares them. On: as the tokenizer reads them (an imported
    ALBEF's leaves it out)."""
    caption_tokens: int = 32
    """Tokens a caption is cut to, [CLS] and [SEP] included."""

    def __post_init__(self) -> None:
        ReadConfig.__post_init__(self)
        if self.caption_tokens < 3:
            raise RecipeError(
                f"data.caption_tokens is {self.caption_tokens}; it must leave room for [CLS], one word and [SEP]: 3 or more"
            )
