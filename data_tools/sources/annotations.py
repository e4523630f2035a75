"""Caption files of the known datasets: one reader a kind, which opens no image."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.sources.items import Choice, Dropped, Entry
from data_tools.sources.reading import Place, read_object, read_text, read_value
from runtime.errors import DataError, RecipeError


def refuse_split(annotation: Path, choice: Choice) -> None:
    if choice.split is not None or choice.restval:
        raise RecipeError(f"{annotation.name} holds no splits; choose images by a list of names (--names FILE) instead")


def flickr_tokens(annotation: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    """Flickr8k's and Flickr30k's own file: `<image>#<n> TAB <caption>` a line."""
    refuse_split(annotation, choice)
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(annotation).split("\n"), start=1):
        if not line.strip():
            continue
        label, tab, caption = line.partition("\t")
        name, mark, order = label.rpartition("#")
        if not (tab and mark and name and order.isdigit()):
            raise DataError(f"{annotation}, line {number}: not `<image>#<number><TAB><caption>`; mend or remove it")
        captions.setdefault(name, []).append(caption)
    for name, found in captions.items():
        yield Entry(name, PurePosixPath(name).stem, found, stated=False)


def coco_captions(annotation: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    """COCO captions json (2014, 2017): `images` and `annotations`, joined by image id."""
    refuse_split(annotation, choice)
    value = read_object(annotation, "images", "annotations")
    captions: dict[Any, list[str]] = defaultdict(list)
    for position, note in enumerate(value["annotations"]):
        with Place(annotation, f"annotation {position}"):
            captions[note["image_id"]].append(note["caption"])
    for position, image in enumerate(value["images"]):
        with Place(annotation, f"image {position}"):
            name, image_id = image["file_name"], image["id"]
        yield Entry(name, str(image_id), captions.pop(image_id, []))
    if orphans := sum(map(len, captions.values())):
        dropped.counts["captions of unlisted images"] += orphans


def karpathy(annotation: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    """Karpathy's json (COCO, Flickr8k, Flickr30k): one split of it; `restval` joins train only where asked."""
    images = read_object(annotation, "images")["images"]
    with Place(annotation, "an image"):
        sizes = Counter(image["split"] for image in images)
    split = choice.split
    if split is None and len(sizes) == 1:
        split = next(iter(sizes))
    if split not in sizes:
        listed = ", ".join(f"{name} ({size:,})" for name, size in sizes.items())
        given = f"has no split {split!r}" if split else "holds several splits"
        raise RecipeError(f"{annotation.name} {given}; choose with --split one of: {listed}")
    if choice.restval and split != "train":
        raise RecipeError(f"--restval true adds the split `restval` to train; it does not go with --split {split}")
    for position, image in enumerate(images):
        if image["split"] != split and not (choice.restval and image["split"] == "restval"):
            continue
        with Place(annotation, f"image {position}"):
            name = str(PurePosixPath(image.get("filepath", ""), image["filename"]))
            captions = [sentence["raw"] for sentence in image["sentences"]]
            image_id = str(image["cocoid"]) if "cocoid" in image else PurePosixPath(name).stem
        yield Entry(name, image_id, captions, stated="cocoid" in image)


def albef(annotation: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    """ALBEF's and BLIP's json: a list of `image` and `caption`, which is a string or a list; lines of one image are joined."""
    refuse_split(annotation, choice)
    rows = read_value(annotation)
    if not isinstance(rows, list):
        raise DataError(f"{annotation} is no list of images: it is of another kind, give the right --kind")
    yield from joined(_albef_rows(annotation, rows))


def _albef_rows(annotation: Path, rows: list[Any]) -> Iterator[tuple[str, str | None, list[str]]]:
    for position, row in enumerate(rows):
        with Place(annotation, f"entry {position}"):
            if "image" not in row and "url" in row:
                raise DataError(
                    f"{annotation}: entry {position} has an address but no `image`; "
                    "fetch the images first (img2dataset) and shard its tars"
                )
            name, caption, image_id = row["image"], row["caption"], row.get("image_id")
        if not isinstance(name, str) or not isinstance(caption, (str, list)):
            raise DataError(
                f"{annotation}: entry {position} has no `image` (a name) and `caption` (a string or a list)"
            )
        # A string is one caption: as a list it would be one caption a letter.
        yield name, None if image_id is None else str(image_id), [caption] if isinstance(caption, str) else caption


def joined(rows: Iterable[tuple[str, str | None, list[str]]]) -> Iterator[Entry]:
    """Rows of (image name, image id, captions), of which several may name the same image -> one entry an image, in the
    order of their first rows."""
    captions: dict[str, list[str]] = {}
    ids: dict[str, str | None] = {}
    for name, image_id, more in rows:
        captions.setdefault(name, []).extend(more)
        ids.setdefault(name, image_id)
    for name, found in captions.items():
        yield Entry(name, ids[name] or PurePosixPath(name).stem, found, stated=bool(ids[name]))


def multi30k(annotation: Path, choice: Choice, dropped: Dropped) -> Iterator[Entry]:
    """Multi30K task 2's folder: line n of `raw/<split>.<1-5>.en.gz` is a caption of line n of `image_splits/<split>_images.txt`."""
    suffix = "_images.txt"
    splits = sorted(path.name.removesuffix(suffix) for path in (annotation / "image_splits").glob(f"*{suffix}"))
    if choice.split not in splits:
        given = f"has no split {choice.split!r}" if choice.split else "holds several splits"
        raise RecipeError(f"{annotation.name} {given}; choose with --split one of: {', '.join(splits)}")
    names_file = annotation / "image_splits" / f"{choice.split}{suffix}"
    names = read_text(names_file).splitlines()
    files = sorted((annotation / "raw").glob(f"{choice.split}.[0-9].en*"))
    if not files:
        raise DataError(f"{annotation / 'raw'} has no captions {choice.split}.1.en.gz …; copy the folder again")
    columns = []
    for path in files:
        # Not splitlines: a caption may hold what Unicode calls a line's end.
        lines = read_text(path).removesuffix("\n").split("\n")
        if len(lines) != len(names):
            raise DataError(
                f"{path} has {len(lines):,} lines and {names_file.name} {len(names):,}: they do not belong together"
            )
        columns.append(lines)
    for name, *captions in zip(names, *columns, strict=True):
        yield Entry(name.strip(), PurePosixPath(name.strip()).stem, captions, stated=False)
