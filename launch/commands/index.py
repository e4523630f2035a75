"""`ligature index`: embed shards or a folder of images, so that `ligature search` can search them.

Tested in tests/finetune/search/test_query.py.
"""

from __future__ import annotations

from launch.stages import read_stage


def run(arguments: list[str]) -> None:
    """Read the recipe, then embed the collection."""
    recipe = read_stage("index", arguments)
    from finetune.search.indexing import build_index

    build_index(recipe)
