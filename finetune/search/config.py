"""The recipe of `ligature index`: a dataclass that imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.errors import RecipeError


@dataclass
class IndexRecipe:
    """Embed a collection of images, once, for `ligature search`; or go on where that stopped."""

    checkpoint: str = ""
    """A run's folder (its best checkpoint, else its latest), a checkpoint's, or an exported model's."""
    data: str = ""
    """Images: a shard folder, a folder of images of any nesting, or an uncompressed tar of images."""
    out: str = "index"
    """Folder to make. The same command goes on where an earlier one was stopped, and ends with the same bytes."""
    approximate: Literal["none", "ivf"] = "none"
    """`ivf` adds a faiss index (inverted lists), for sets too large to compare all of; a finished index gets it by the same
    command. Searching stays exact unless asked otherwise."""
    recall: float = 0.95
    """Of the approximate search: the share of the exact first ten that it must find; it reads as many lists as that takes."""
    queries: str = ""
    """File of queries in words, one a line, that this recall is measured with; empty: captions of the images where they have
    some, else the images themselves."""
    part_images: int = 512
    """Images committed at a time: what is lost at most when it is killed."""
    batch_size: int = 64
    workers: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "tf32"] = "fp32"
    """`tf32`: a GPU's tensor cores multiply with 10 bits of mantissa, several times faster; embeddings differ in about the third digit."""

    def __post_init__(self) -> None:
        for key in ("checkpoint", "data", "out"):
            if not getattr(self, key):
                raise RecipeError(f"{key} is not set; give --{key}")
        if self.batch_size < 1 or self.workers < 0:
            raise RecipeError(f"batch_size {self.batch_size}, workers {self.workers}: 1 or more, 0 or more")
        if self.part_images < self.batch_size or self.part_images % self.batch_size:
            raise RecipeError(
                f"part_images is {self.part_images}; it must be a multiple of batch_size, {self.batch_size}"
            )
        if self.queries and not (Path(self.queries).is_file() and _text_in(Path(self.queries))):
            raise RecipeError(f"queries: there is no text (UTF-8) in {self.queries}, or no such file")
        if not 0 < self.recall <= 1:
            raise RecipeError(f"recall is {self.recall:g}; it is a share above 0, 1 at most")


def _text_in(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:
        return False
