"""Give a known share of images the captions of other images, to measure what an objective makes of noise."""

from __future__ import annotations

from pathlib import Path
from random import Random

from runtime.errors import RecipeError
from runtime.files import read_json, write_json


def swap_captions(annotation: Path, out: Path, share: float, seed: int = 0) -> int:
    """Write a COCO caption file in which a share of the images has another image's captions.

    The chosen images pass all their captions on in a ring. None keeps its own, and every caption occurs once.

    Args:
        annotation: COCO caption json to read.
        out: File to write.
        share: Share of the images, 0 to 1.
        seed: Decides which images swap.

    Returns:
        How many images have another image's captions.

    Raises:
        RecipeError: The share is not between 0 and 1, or selects a single image.
    """
    if not 0 <= share <= 1:
        raise RecipeError(f"the share of wrong captions is {share}; it must be between 0 and 1")
    source = read_json(annotation)
    ids = sorted(image["id"] for image in source["images"])
    chosen = Random(f"wrong captions {seed}").sample(ids, round(share * len(ids)))
    if len(chosen) == 1:
        raise RecipeError(f"{share} of {len(ids)} images is one image, which has none to swap captions with")
    receivers = dict(zip(chosen, chosen[1:] + chosen[:1], strict=True))
    moved = [
        record | {"image_id": receivers.get(record["image_id"], record["image_id"])} for record in source["annotations"]
    ]
    write_json(out, source | {"annotations": sorted(moved, key=lambda record: (record["image_id"], record["id"]))})
    return len(chosen)
