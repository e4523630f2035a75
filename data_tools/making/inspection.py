"""Looks at a finished shard folder: is everything there, and what is in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.making.processes import run_parallel
from data_tools.shards.captions import parse_captions
from data_tools.shards.manifest import IMAGE_FORMATS, Manifest, Shard, read_index, read_manifest
from runtime.errors import DataError
from runtime.files import sha256_of
from runtime.progress import progress

if TYPE_CHECKING:
    import numpy as np

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
CAPTIONS_READ = 20_000
"""Samples whose captions are read to measure them, spread evenly; the rest is known from the indexes."""


def verify(folder: str | Path, full: bool = False, workers: int = 1) -> Manifest:
    """Hold a folder against its manifest: names and sizes, or (`full`) every hash and every index.

    Raises `DataError` with all that is broken, in one line.
    """
    manifest = read_manifest(folder, check=False)
    broken = manifest.damaged()
    if full:
        tasks = [(manifest.folder, shard) for shard in manifest.shards]
        found: dict[str, list[str]] = {}
        with progress("verifying", sum(shard.bytes >> 20 for shard in manifest.shards), "MiB") as bar:
            for (_, shard), wrong in run_parallel(_broken_inside, tasks, workers):
                found[shard.name] = wrong
                bar.advance(shard.bytes >> 20)
        broken += [phrase for shard in manifest.shards for phrase in found[shard.name]]
    if broken:
        raise DataError(f"{folder} is damaged: {'; '.join(broken)}; {mend(manifest)}")
    return manifest


def mend(manifest: Manifest) -> str:
    """What to do about a damaged folder."""
    if manifest.source.get("indexed"):
        return "copy what is broken again, or remove its .index.parquet and run `ligature inspect --index`"
    return "run the `ligature shard` that made it again"


def _broken_inside(task: tuple[Path, Shard]) -> list[str]:
    folder, shard = task
    found = []
    tar, index = folder / shard.name, folder / shard.index
    if tar.is_file() and tar.stat().st_size == shard.bytes and sha256_of(tar) != shard.sha256:
        found.append(f"{shard.name} has other bytes than when it was written")
    if not index.is_file():
        return found
    if sha256_of(index) != shard.index_sha256:
        found.append(f"{shard.index} has other bytes than when it was written")
    elif (rows := len(read_index(index))) != shard.samples:
        found.append(f"{shard.index} lists {rows:,} samples, the manifest {shard.samples:,}")
    return found


@dataclass(slots=True)
class Measured:
    """What a folder holds, in numbers."""

    caption_words: np.ndarray
    """(captions read,) white-space separated words."""
    captions_per_image: np.ndarray
    """(samples,)"""
    width: np.ndarray
    """(samples,) pixels as stored."""
    height: np.ndarray
    image_bytes: np.ndarray
    """(samples,)"""
    image_formats: dict[str, int]
    different_images: int
    """Distinct image ids: fewer than samples where several samples show one picture."""
    samples_read: int
    """Samples that `caption_words` are of."""


def measure(manifest: Manifest) -> Measured:
    """Read every index, and the captions of at most CAPTIONS_READ samples."""
    import numpy as np

    step = max(1, -(-manifest.samples // CAPTIONS_READ))
    columns: dict[str, list[Any]] = {name: [] for name in ("captions", "width", "height", "image_size", "image_id")}
    words: list[int] = []
    formats = dict.fromkeys(IMAGE_FORMATS, 0)
    seen = 0
    with progress("reading indexes", len(manifest.shards), "shards", silent=len(manifest.shards) < 100) as bar:
        for shard in manifest.shards:
            index = read_index(manifest.folder / shard.index)
            for name, parts in columns.items():
                parts.append(getattr(index, name))
            for name in index.image_format:
                formats[name] += 1
            rows = range(-seen % step, len(index), step)
            with open(manifest.folder / shard.name, "rb", buffering=0) as tar:
                for row in rows:
                    raw = os.pread(tar.fileno(), int(index.text_size[row]), int(index.text_offset[row]))
                    words += [len(text.split()) for text in captions_of(raw, index.text_format[row], index.key[row])]
            seen += len(index)
            bar.advance()
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Measured(
        np.array(words), whole["captions"], whole["width"], whole["height"], whole["image_size"],
        {name: count for name, count in formats.items() if count}, len(np.unique(whole["image_id"])), -(-seen // step),
    )  # fmt: skip


def captions_of(raw: bytes, text_format: str, key: str) -> list[str]:
    """The captions in a text member. `DataError` where they cannot be read."""
    try:
        return parse_captions(raw, text_format)
    except DataError as error:
        raise DataError(f"sample {key}: {error}") from None


def describe(folder: str | Path, measured: Measured | None = None) -> dict[str, Any]:
    """Counts, and quantiles over the folder of caption length (words), captions an image and image sides (pixels)."""
    import numpy as np

    manifest = read_manifest(folder)
    measured = measured or measure(manifest)
    values = {
        "caption_words": measured.caption_words,
        "captions_per_image": measured.captions_per_image,
        "width": measured.width,
        "height": measured.height,
        "shorter_side": np.minimum(measured.width, measured.height),
        "image_kilobytes": measured.image_bytes / 1000,
    }
    return {
        "folder": str(manifest.folder), "shards": len(manifest.shards), "samples": manifest.samples,
        "images": measured.different_images, "captions": manifest.captions, "bytes": manifest.bytes,
        "fingerprint": manifest.fingerprint, "source": manifest.source, "dropped": manifest.dropped,
        "image_formats": measured.image_formats, "captions_read_of": measured.samples_read,
        "quantiles": {
            name: {f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(column, QUANTILES), strict=True)}
            for name, column in values.items()
        },
    }  # fmt: skip
