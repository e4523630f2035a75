"""Jobs that each rank of the indexing tests runs."""

from __future__ import annotations

from finetune.search.config import IndexRecipe
from finetune.search.indexing import build_index


def make_index(settings: dict) -> None:
    """Build an index from the settings of its recipe."""
    build_index(IndexRecipe(**settings))
