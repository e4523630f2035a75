"""Which of the collected images are written, and which shard holds them: decided before anything is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.making.shard_file import Encoding
from data_tools.sources import CaptionedImage, safe_key
from runtime.errors import DataError, Interrupted
from runtime.progress import progress

DUPLICATES = ("keep", "drop_exact", "drop_near")
EXACT, NEAR, EXCLUDED = "exact duplicates", "near duplicates", "images of an excluded dataset"
PROBES = 64
"""Images encoded to learn how much smaller re-encoding makes them, where shards have a size in bytes."""


def check_items(items: Sequence[CaptionedImage]) -> None:
    """Raise `DataError` for items that break the contract of `CaptionedImage`."""
    if not items:
        raise DataError("no images to write")
    seen = set()
    for item in items:
        if not item.key or safe_key(item.key) != (item.key, False):
            raise DataError(f"the key {item.key!r} of {item.source} is empty or has a dot, slash or blank")
        if item.key in seen:
            raise DataError(f"the key {item.key!r} of {item.source} comes twice; keys are unique in a shard folder")
        texts = item.captions if isinstance(item.captions, (list, tuple)) else []  # a string is no list of letters
        if not texts or not all(isinstance(caption, str) and caption for caption in texts):
            raise DataError(f"{item.source} has no list of captions, or one that is empty or no text")
        seen.add(item.key)


def digest_of(items: Iterable[CaptionedImage]) -> str:
    """Hex sha256 of all that the items say, sizes included; images are not read."""
    digest = hashlib.sha256()
    for item in items:
        line = [item.key, item.captions, item.image_id, item.source, item.size]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Excluded:
    """Images of other datasets that must not be written."""

    reads: list[Callable[[], bytes]]
    names: list[str]
    """What each is called in a report."""
    counts: dict[Path, int]
    """Place -> how many images it has."""


def read_excluded(places: Sequence[Path]) -> Excluded:
    found = Excluded([], [], {})
    if places:
        from data_tools.making.fingerprints import every_image

        for place in places:
            images = every_image(place)
            found.counts[place] = len(images)
            found.reads.extend(images)
            found.names.extend([place.resolve().name] * len(images))
    return found


def leave_out_copies(
    items: list[CaptionedImage],
    folder: Path,
    duplicates: str,
    excluded: Excluded,
    workers: int,
    piece: tuple[int, int],
) -> tuple[list[CaptionedImage], list[dict[str, Any]]]:
    """Items -> those that are kept, and a line for each that is not: `key`, `source`, `reason`, `copy_of`, `bits` (in which they differ).

    Fingerprints are kept in `folder` while it is being written, so that a run that was killed goes on with them. `Interrupted` where
    those of other slices are not there yet.
    """
    if duplicates == "keep" and not excluded.reads:
        return items, []
    import numpy as np

    from data_tools.making.duplicates import find_duplicates
    from data_tools.making.fingerprints import fingerprints

    theirs = fingerprints(folder, "excluded", excluded.reads, workers, piece)
    ours = fingerprints(folder, "images", [item.read for item in items], workers, piece)
    if theirs is None or ours is None:
        raise Interrupted(
            f"slice {piece[0]}/{piece[1]} has looked at its images, but other slices have not: copies are found among all of them; "
            "run it again when they have"
        )
    protected = len(theirs)
    found = find_duplicates(np.concatenate([theirs, ours]), duplicates, protected)
    kept, lines = [], []
    for number, item in enumerate(items, start=protected):
        of, bits = int(found.of[number]), int(found.distance[number])
        if of < 0:
            kept.append(item)
            continue
        reason = EXCLUDED if of < protected else EXACT if bits < 0 else NEAR
        original = excluded.names[of] if of < protected else items[of - protected].source
        lines.append({"key": item.key, "source": item.source, "reason": reason, "counted_as": reason,
                      "copy_of": original, "bits": max(bits, 0)})  # fmt: skip
    if not kept:
        raise DataError(f"every one of the {len(items):,} images is a copy of an excluded one; is --exclude right?")
    return kept, lines


def cut(items: Sequence[CaptionedImage], samples: int | None, size: int | None, encoding: Encoding) -> list[range]:
    """Item numbers of each shard: as many as `samples`, and as many as their bytes stay within `size` (at least one)."""
    sizes = _written_sizes(items, encoding) if size else None
    ranges, start, total = [], 0, 0.0
    for number in range(len(items)):
        more = sizes[number] if sizes else 0.0
        full = samples is not None and number - start == samples
        if number > start and (full or (size is not None and total + more > size)):
            ranges.append(range(start, number))
            start, total = number, 0.0
        total += more
    return [*ranges, range(start, len(items))]


def _written_sizes(items: Sequence[CaptionedImage], encoding: Encoding) -> list[float]:
    """Bytes in the tar of each item: header blocks, the image (by its size now and the mean change of PROBES spread over all), json."""
    before = after = 0
    if encoding.resize_shorter or encoding.reencode:
        probes = items[:: -(-len(items) // PROBES)]
        with progress("estimating sizes", len(probes), "images") as bar:
            for item in probes:
                try:
                    raw = item.read()
                    after += len(encoding.apply(raw)[0])
                    before += len(raw)
                except MemoryError:
                    raise
                except Exception:
                    continue  # the writer says what is wrong with it
                finally:
                    bar.advance()
    ratio = after / before if before else 1.0
    return [2048 + _known_size(item) * ratio + sum(map(len, item.captions)) for item in items]


def _known_size(item: CaptionedImage) -> int:
    return len(item.read()) if item.size is None else item.size
