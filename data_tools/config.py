"""What data a run reads, and how a sample becomes a training example."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from runtime.errors import RecipeError


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
class ReadConfig:
    """The shards of a run, and how they are read."""

    train: str = ""
    """Shard folder to train on (`ligature shard` makes one)."""
    validation: str | None = None
    """Shard folder that R@K is measured on during the run; none: no validation, and `latest` is all there is."""
    select_on_test: bool = False
    """Insist on a validation folder that was made from a test split."""
    workers: int = 2
    """Loader processes of each rank; 0 decodes in the training process."""
    max_bad_share: float = 0.01
    """The run stops when more than this share of the samples could not be decoded."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise RecipeError(f"data.workers is {self.workers}; it is a number of processes, 0 or more")


@dataclass
class DataConfig(ReadConfig):
    """The shards of a pretraining run, and its words."""

    tokenizer: str = "train"
    """`train` learns a WordPiece vocabulary from the training captions; else a tokenizer's folder, or its name on a hub."""
    vocabulary: int = 30522
    """Words and pieces to learn at most, where the tokenizer is trained."""
    caption_tokens: int = 32
    """Tokens a caption is cut to, [CLS] and [SEP] included."""

    def __post_init__(self) -> None:
        ReadConfig.__post_init__(self)
        if self.caption_tokens < 3:
            raise RecipeError(
                f"data.caption_tokens is {self.caption_tokens}; it must leave room for [CLS], one word and [SEP]: 3 or more"
            )
