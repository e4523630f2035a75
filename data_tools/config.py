"""Configure what data a run reads, and how a sample becomes a training example.

Tested in tests/data_tools/stream/test_training_set.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from runtime.checks import check_range
from runtime.errors import RecipeError
from runtime.recipe import free


@dataclass
class AugmentConfig:
    """How one image becomes a training view (Section 4 of ALBEF). No operation changes colours, since captions name them."""

    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    """Smallest and largest area of the random crop, as shares of the image. [1, 1] keeps all of it."""
    flip: bool = True
    """Mirror half of the images. Turn it off where captions tell left from right."""
    operations: int = 2
    """Number of RandAugment operations per view. 0 turns them off."""
    magnitude: int = 7
    """Strength of the operations, 0 to 10."""
    where: Literal["workers", "device"] = "workers"
    """Where images are cropped, mirrored, resized and operated on: in the loader's workers, or on the device, while the workers
    only decode. The random draws are the same; pixels agree except for rounding."""

    def __post_init__(self) -> None:
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise RecipeError(
                f"augment.crop_scale is {self.crop_scale}; it must be two shares of the area, 0 < low <= high <= 1"
            )
        if self.operations < 0:
            raise RecipeError(f"augment.operations is {self.operations}; it must be 0 or more")
        if not 0 <= self.magnitude <= 10:
            raise RecipeError(f"augment.magnitude is {self.magnitude}; it must be 0 to 10")

    @property
    def used(self) -> bool:
        """Whether a view can differ from the whole image."""
        return self.crop_scale[0] < 1 or self.flip or self.operations > 0


@dataclass
class FeaturesConfig:
    """Features of a frozen image tower that are computed once and cached on a disk (docs/towers.md)."""

    kind: Literal["live", "tokens", "pooled"] = "live"
    """`live`: the tower encodes each batch. `tokens`: its tokens are cached. `pooled`: only its global state is, which is much
    smaller and serves where no fusion encoder learns."""
    views: int = 4
    """Augmented views of each image in the cache; a step draws among them. Without augmentation there is one."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Number format of the cache."""
    folder: str = free("")
    """Folder of the cache. Default: the first training or validation folder itself."""

    def __post_init__(self) -> None:
        check_range(self, "data.features.", 1, None, "views")


@dataclass
class FilterConfig:
    """Which samples are trained on. An index of them is computed once, and kept with the shards."""

    min_words: int = 0
    """Leave out captions with fewer words, and samples that have no captions left."""
    max_words: int | None = None
    """Leave out captions with more words. Default: no limit."""
    min_side: int = 0
    """Leave out images with fewer pixels on their shorter side."""
    max_aspect: float | None = None
    """Leave out images whose longer side is more than this many times the shorter. Default: no limit."""

    def __post_init__(self) -> None:
        if self.min_words < 0 or self.min_side < 0 or (self.max_words is not None and self.max_words < self.min_words):
            raise RecipeError(
                f"data.filter keeps captions of {self.min_words} to {self.max_words} words and sides from {self.min_side} "
                "pixels, which no sample has; use 0 or more, and a maximum that is not below the minimum"
            )
        if self.max_aspect is not None and self.max_aspect < 1:
            raise RecipeError(
                f"data.filter.max_aspect is {self.max_aspect}; it must be 1 or more, the longer side divided by the shorter"
            )

    @property
    def counts_words(self) -> bool:
        """Whether captions are filtered by their number of words."""
        return self.min_words > 0 or self.max_words is not None

    @property
    def used(self) -> bool:
        """Whether anything is filtered."""
        return self != FilterConfig()

    def allows(self, caption: str) -> bool:
        """Return whether a caption has an allowed number of words."""
        words = len(caption.split())
        return words >= self.min_words and (self.max_words is None or words <= self.max_words)


@dataclass
class ShuffleConfig:
    """How samples are shuffled: blocks of neighbours over the whole set, then single samples within a window of blocks."""

    block: int | None = None
    """Samples of a shard that stay together; 0 means whole shards. Default: 1,024, or whole shards where a folder is remote."""
    window: int = 65536
    """Number of samples that are shuffled together. The remote shards that one window touches must fit into the cache."""

    def __post_init__(self) -> None:
        if (self.block or 0) < 0 or self.window < 2:
            raise RecipeError(
                f"data.shuffle has blocks of {self.block} and windows of {self.window} samples; use at least 0 and 2"
            )


@dataclass
class CacheConfig:
    """Where copies of remote shards are kept. The processes of a node share them."""

    folder: str = ""
    """Folder on a disk of the node; variables are expanded ($TMPDIR/shards). Default: $LIGATURE_CACHE, or ~/.cache/ligature/shards."""
    gigabytes: float = 100.0
    """Size limit of the cache, in gigabytes (10^9 bytes). The least recently used shards are removed first."""
    stage: bool = False
    """Copy shards of local folders too, from a slow shared disk to the node's own, and check their hashes."""

    def __post_init__(self) -> None:
        if self.gigabytes <= 0:
            raise RecipeError(
                f"data.cache.gigabytes is {self.gigabytes}; it must be more than 0, enough to hold some shards"
            )


@dataclass
class ReadConfig:
    """Which shards a run reads, and how."""

    train: str | list[str] | dict[str, float] = ""
    """Shard folder to train on (`ligature shard` writes one), on a disk or remote (s3://…, gs://…, https://…). A list of folders is
    read as one dataset. A mapping of folders to weights mixes them in proportion to the weights."""
    validation: str | None = None
    """Shard folder that R@K is measured on during the run. Default: no validation, and no best checkpoint beside `latest`."""
    select_on_test: bool = False
    """Allow a validation folder that was made from a test split."""
    workers: int = free(2)
    """Loader processes of each rank. 0 decodes in the training process."""
    captions: Literal["one", "all"] = "one"
    """`one`: an epoch has each image once, with one of its captions. `all`: an epoch has each image once with each caption."""
    max_bad_share: float = free(0.01)
    """Stop the run when more than this share of the samples cannot be decoded."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    shuffle: ShuffleConfig = field(default_factory=ShuffleConfig)
    cache: CacheConfig = free(default_factory=CacheConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    sentences: Literal["all", "one", "run"] = "all"
    """What a training example reads of a long caption: all of it, `one` sentence, or a `run` of neighbouring sentences, drawn anew in each
    epoch. Texts of one image are positives of each other."""

    def __post_init__(self) -> None:
        check_range(self, "data.", 0, None, "workers")
        check_range(self, "data.", 0, 1, "max_bad_share")
        if self.train in ([], {}) or (isinstance(self.train, str) and self.train.startswith(("[", "{"))):
            raise RecipeError(
                f"data.train is {self.train!r}; it must be a folder, a list of folders, or a mapping of folders to weights"
            )
        if isinstance(self.train, dict) and (
            refused := [name for name, weight in self.train.items() if not weight > 0]
        ):
            raise RecipeError(
                f"data.train gives {refused[0]} the weight {self.train[refused[0]]}; a weight must be more than 0"
            )


@dataclass
class DataConfig(ReadConfig):
    """Which shards a pretraining run reads, and how their captions become tokens."""

    tokenizer: str = "train"
    """`train` learns a WordPiece vocabulary from the training captions. Otherwise give a tokenizer's folder, or its name on the
    Hugging Face hub."""
    vocabulary: int = 30522
    """Maximum number of words and word pieces to learn, when the tokenizer is trained."""
    punctuation: bool = True
    """Keep punctuation. `false` drops it and splits words at hyphens, as ALBEF prepares captions. The tokenizer of an imported
    ALBEF drops it in either case."""
    caption_tokens: int = 32
    """Maximum number of tokens in a caption, [CLS] and [SEP] included. Longer captions are cut."""

    def __post_init__(self) -> None:
        ReadConfig.__post_init__(self)
        check_range(self, "data.", 1, None, "vocabulary")
        if self.caption_tokens < 3:
            raise RecipeError(
                f"data.caption_tokens is {self.caption_tokens}; it must leave room for [CLS], one word and [SEP]: 3 or more"
            )
