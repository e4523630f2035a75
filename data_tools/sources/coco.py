"""COCO's caption json (2014, 2017): `images` and `annotations`, joined by image id."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.sources.items import Choice, Dropped, Entry, Source
from data_tools.sources.reading import FieldCheck, read_object


def _matches(path: Path, head: str) -> bool:
    return head.startswith("{") and ('"file_name"' in head or '"annotations"' in head)


def _read(path: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    value = read_object(path, "images", "annotations")
    captions: dict[Any, list[str]] = defaultdict(list)
    for position, annotation in enumerate(value["annotations"]):
        with FieldCheck(path, f"annotation {position}"):
            captions[annotation["image_id"]].append(annotation["caption"])
    for position, image in enumerate(value["images"]):
        with FieldCheck(path, f"image {position}"):
            name, image_id = image["file_name"], image["id"]
        yield Entry(name, str(image_id), captions.pop(image_id, []))
    if orphans := sum(map(len, captions.values())):
        dropped.counts["captions of unlisted images"] += orphans


COCO = Source(_read, _matches)
