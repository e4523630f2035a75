"""Captions given to the wrong images: a known share of noise, to see what an objective makes of it."""

from __future__ import annotations

from pathlib import Path
from random import Random

from runtime.errors import RecipeError
from runtime.files import read_json, write_json


def swap_captions(annotation: Path, out: Path, share: float, seed: int = 0) -> int:
    """COCO captions in which a `share` of the images have all the captions of another of them. -> how many images.

    The chosen images pass their captions on in a ring, so none keeps its own, and every caption is still said once.
    """
    if not 0 <= share <= 1:
        raise RecipeError(f"a share of wrong captions of {share} is not between 0 and 1")
    source = read_json(annotation)
    ids = sorted(image["id"] for image in source["images"])
    chosen = Random(f"wrong captions {seed}").sample(ids, round(share * len(ids)))
    if len(chosen) == 1:
        raise RecipeError(f"{share} of {len(ids)} images is one image, which has none to swap captions with")
    gives = dict(zip(chosen, chosen[1:] + chosen[:1], strict=True))
    moved = [one | {"image_id": gives.get(one["image_id"], one["image_id"])} for one in source["annotations"]]
    write_json(out, source | {"annotations": sorted(moved, key=lambda one: (one["image_id"], one["id"]))})
    return len(chosen)
