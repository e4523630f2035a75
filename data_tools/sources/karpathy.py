"""Karpathy's json of COCO, Flickr8k or Flickr30k, of which one split is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_tools.sources.items import Choice, Dropped, Entry, Source
from data_tools.sources.reading import FieldCheck, read_object
from runtime.errors import RecipeError


def _matches(path: Path, head: str) -> bool:
    return head.startswith("{") and '"sentences"' in head


def _read(path: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    """Yield the images of the chosen split; `restval` joins train only where `choice` says so."""
    images = read_object(path, "images")["images"]
    with FieldCheck(path, "an image"):
        sizes = Counter(image["split"] for image in images)
    split = choice.split
    if split is None and len(sizes) == 1:
        split = next(iter(sizes))
    if split not in sizes:
        listed = ", ".join(f"{name} ({size:,})" for name, size in sizes.items())
        problem = f"has no split {split!r}" if split else "holds several splits"
        raise RecipeError(f"{path.name} {problem}; choose with --split one of: {listed}")
    if choice.restval and split != "train":
        raise RecipeError(f"--restval true adds the split `restval` to train; it does not go with --split {split}")
    for position, image in enumerate(images):
        if image["split"] != split and not (choice.restval and image["split"] == "restval"):
            continue
        with FieldCheck(path, f"image {position}"):
            name = str(PurePosixPath(image.get("filepath", ""), image["filename"]))
            captions = [sentence["raw"] for sentence in image["sentences"]]
            image_id = str(image["cocoid"]) if "cocoid" in image else PurePosixPath(name).stem
        yield Entry(name, image_id, captions, states_id="cocoid" in image)


KARPATHY = Source(_read, _matches, has_splits=True, published=True)
