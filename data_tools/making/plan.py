"""Decide which of the collected images are written, and which shard holds them, before anything is written.

Tested in tests/data_tools/making/test_slices.py.
"""

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
"""What to do with copies, see `ShardOptions.duplicates`."""
EXACT, NEAR, EXCLUDED = "exact duplicates", "near duplicates", "images of an excluded dataset"
PROBES = 64
"""Images to encode for an estimate of how much smaller re-encoding makes them, if shards have a size limit in bytes."""


def check_items(items: Sequence[CaptionedImage]) -> None:
    """Check that items keep the contract of `CaptionedImage`. Raises DataError for the first that does not."""
    if not items:
        raise DataError("there are no images to write; check the source and its split")
    keys = set()
    for item in items:
        if not item.key or safe_key(item.key) != (item.key, False):
            raise DataError(f"the key {item.key!r} of {item.source} is empty or has a dot, slash or blank")
        if item.key in keys:
            raise DataError(f"the key {item.key!r} of {item.source} comes twice; keys must be unique in a shard folder")
        captions = (
            item.captions if isinstance(item.captions, (list, tuple)) else []
        )  # a string is not a list of letters
        if not captions or not all(isinstance(caption, str) and caption for caption in captions):
            raise DataError(f"{item.source} has no list of captions, or an empty caption, or one that is not text")
        keys.add(item.key)


def digest_of(items: Iterable[CaptionedImage]) -> str:
    """Return the hex sha256 of the items' keys, captions, ids, names and sizes. Images are not read."""
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
    """Name of each image's dataset, for the report."""
    counts: dict[Path, int]
    """Number of images, by the dataset's path."""


def read_excluded(paths: Sequence[Path]) -> Excluded:
    """List the images of other datasets. No image is read yet."""
    excluded = Excluded([], [], {})
    if paths:
        from data_tools.making.fingerprints import list_images

        for path in paths:
            images = list_images(path)
            excluded.counts[path] = len(images)
            excluded.reads.extend(images)
            excluded.names.extend([path.resolve().name] * len(images))
    return excluded


def leave_out_copies(
    items: list[CaptionedImage],
    folder: Path,
    duplicates: str,
    excluded: Excluded,
    workers: int,
    job_slice: tuple[int, int],
) -> tuple[list[CaptionedImage], list[dict[str, Any]]]:
    """Leave out the items that are copies of earlier ones or of excluded images.

    Args:
        items: The collected samples.
        folder: Keeps the fingerprints while it is being written, so that a run that was killed does not compute them again.
        duplicates: One of DUPLICATES.
        excluded: Images of other datasets.
        workers: Processes that compute fingerprints.
        job_slice: Number of this slice, and number of slices.

    Returns:
        The items that are kept; and for each dropped one a line of the report with `key`, `source`, `reason`, `copy_of` and `bits`, the
        number of bits in which the looks differ.

    Raises:
        Interrupted: Other slices have not computed their fingerprints yet.
    """
    if duplicates == "keep" and not excluded.reads:
        return items, []
    import numpy as np

    from data_tools.making.duplicates import find_duplicates
    from data_tools.making.fingerprints import fingerprints

    # Both are computed before either is tested, so that a slice does its whole share before it waits for others.
    excluded_records = fingerprints(folder, "excluded", excluded.reads, workers, job_slice)
    item_records = fingerprints(folder, "images", [item.read for item in items], workers, job_slice)
    if excluded_records is None or item_records is None:
        raise Interrupted(
            f"slice {job_slice[0]}/{job_slice[1]} has fingerprinted its images, but other slices have not; copies are searched "
            "among the images of all slices, so run this slice again when the others are done"
        )
    protected = len(excluded_records)
    copies = find_duplicates(np.concatenate([excluded_records, item_records]), duplicates, protected)
    kept, lines = [], []
    for number, item in enumerate(items, start=protected):
        original, bits = int(copies.original[number]), int(copies.distance[number])
        if original < 0:
            kept.append(item)
            continue
        reason = EXCLUDED if original < protected else EXACT if bits < 0 else NEAR
        copy_of = excluded.names[original] if original < protected else items[original - protected].source
        lines.append({"key": item.key, "source": item.source, "reason": reason, "counted_as": reason,
                      "copy_of": copy_of, "bits": max(bits, 0)})  # fmt: skip
    if not kept:
        raise DataError(f"every one of the {len(items):,} images is a copy of an excluded one; is --exclude right?")
    return kept, lines


def cut(items: Sequence[CaptionedImage], samples: int | None, size: int | None, encoding: Encoding) -> list[range]:
    """Divide items into shards.

    Args:
        items: The samples, in order.
        samples: Maximum number of samples in a shard; None: no limit.
        size: Maximum size of a shard in bytes, estimated; None: no limit. A shard has at least one sample.
        encoding: How images will be encoded.

    Returns:
        The item numbers of each shard.
    """
    sizes = _written_sizes(items, encoding) if size else None
    ranges, start, total = [], 0, 0.0
    for number in range(len(items)):
        item_size = sizes[number] if sizes else 0.0
        full = samples is not None and number - start == samples
        if number > start and (full or (size is not None and total + item_size > size)):
            ranges.append(range(start, number))
            start, total = number, 0.0
        total += item_size
    return [*ranges, range(start, len(items))]


def _written_sizes(items: Sequence[CaptionedImage], encoding: Encoding) -> list[float]:
    """Estimate the bytes that each item takes in a tar: header blocks, image and json.

    Where images are encoded again, PROBES of them, spread over all, give the mean change of size.
    """
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
                    continue  # the writer will report what is wrong with the image
                finally:
                    bar.advance()
    ratio = after / before if before else 1.0
    return [2048 + _known_size(item) * ratio + sum(map(len, item.captions)) for item in items]


def _known_size(item: CaptionedImage) -> int:
    return len(item.read()) if item.size is None else item.size
