"""The recipe of `ligature index`: a dataclass that imports nothing heavy.

Tested in tests/finetune/search/test_query.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.checks import check_given, check_range
from runtime.errors import RecipeError


@dataclass
class IndexRecipe:
    """Encode a collection of images once for `ligature search`, or resume an index that was interrupted."""

    checkpoint: str = ""
    """Folder of a run (its best checkpoint, else its latest), of a checkpoint, or of an exported model."""
    data: str = ""
    """Images: a shard folder, a folder of images at any depth, or an uncompressed tar of images."""
    out: str = "index"
    """Folder to write. The same command resumes an interrupted index and ends with the same bytes."""
    approximate: Literal["none", "ivf"] = "none"
    """`ivf` adds inverted lists (faiss), for collections too large to compare every image. The same command adds them to a
    finished index. Searches stay exact unless they ask for the lists."""
    recall: float = 0.95
    """Share of the exact first ten images that a search of the inverted lists must find, above 0 and at most 1. It decides how many
    lists a search reads."""
    queries: str = ""
    """File of queries in words, one a line, to measure that recall with. Empty: the captions of the images, or the images
    themselves where they have no captions."""
    part_images: int = 512
    """Images committed at a time, a multiple of batch_size. A killed command loses at most one part on each rank."""
    batch_size: int = 64
    """Images encoded at once."""
    workers: int = 2
    """Loader processes of each rank; 0 loads in the rank's own process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that encodes. `auto` takes a GPU where there is one."""
    precision: Literal["fp32", "tf32"] = "fp32"
    """`tf32` multiplies on a GPU's tensor cores with 10 bits of mantissa. It is several times faster; embeddings differ in about
    the third digit."""

    def __post_init__(self) -> None:
        check_given(self, "checkpoint", "data", "out")
        check_range(self, "", 1, None, "batch_size")
        check_range(self, "", 0, None, "workers")
        if self.part_images < self.batch_size or self.part_images % self.batch_size:
            raise RecipeError(
                f"part_images is {self.part_images}; it must be a multiple of batch_size, {self.batch_size}"
            )
        if self.queries and not (Path(self.queries).is_file() and _holds_text(Path(self.queries))):
            raise RecipeError(
                f"queries is {self.queries}, which holds no text (UTF-8); name a file with one query a line"
            )
        if not 0 < self.recall <= 1:
            raise RecipeError(f"recall is {self.recall:g}; it must be above 0 and at most 1")


def _holds_text(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:
        return False
