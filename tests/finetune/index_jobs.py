"""What ranks do in the tests of indexing."""

from __future__ import annotations

from finetune.embed import index
from finetune.search_config import IndexRecipe


def make_index(settings: dict) -> None:
    index(IndexRecipe(**settings))
