"""Verify that a finished shard folder is whole, and measure what it holds.

Tested in tests/data_tools/making/test_indexing.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.processes import run_parallel
from data_tools.shards.captions import parse_captions
from data_tools.shards.manifest import IMAGE_FORMATS, Manifest, Shard, read_index, read_manifest
from runtime.errors import DataError
from runtime.files import sha256_of
from runtime.progress import progress

if TYPE_CHECKING:
    import numpy as np

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Quantiles that a description gives."""
CAPTIONS_READ = 20_000
"""Maximum number of samples whose captions are read, spread evenly over the folder. The indexes hold everything else."""


def verify(folder: str | Path, full: bool = False, workers: int = 1) -> Manifest:
    """Compare a folder with its manifest.

    Args:
        folder: The shard folder.
        full: Whether to check every hash and every index; otherwise names and sizes are checked.
        workers: Number of processes that compute hashes, see `run_parallel`.

    Raises:
        DataError: Something is broken; the message lists all of it.
    """
    manifest = read_manifest(folder, check=False)
    damage = manifest.find_damage()
    if full:
        tasks = [(manifest.folder, shard) for shard in manifest.shards]
        by_shard: dict[str, list[str]] = {}
        with progress("verifying", sum(shard.bytes >> 20 for shard in manifest.shards), "MiB") as bar:
            for (_, shard), phrases in run_parallel(_find_damage_inside, tasks, workers):
                by_shard[shard.name] = phrases
                bar.advance(shard.bytes >> 20)
        damage += [phrase for shard in manifest.shards for phrase in by_shard[shard.name]]
    if damage:
        raise DataError(f"{folder} is damaged: {'; '.join(damage)}; {_advise_repair(manifest)}")
    return manifest


def _advise_repair(manifest: Manifest) -> str:
    if manifest.source.get("indexed"):
        return "copy what is broken again, or remove its .index.parquet and run `ligature inspect --index`"
    return "run the `ligature shard` command that made it again"


def _find_damage_inside(task: tuple[Path, Shard]) -> list[str]:
    """Return a phrase for each hash or index of a shard that differs from the manifest."""
    folder, shard = task
    phrases = []
    tar, index = folder / shard.name, folder / shard.index
    # A tar that is missing or has another size is reported by `find_damage` already.
    if tar.is_file() and tar.stat().st_size == shard.bytes and sha256_of(tar) != shard.sha256:
        phrases.append(f"{shard.name} has other bytes than when it was written")
    if not index.is_file():
        return phrases
    if sha256_of(index) != shard.index_sha256:
        phrases.append(f"{shard.index} has other bytes than when it was written")
    elif (rows := len(read_index(index))) != shard.samples:
        phrases.append(f"{shard.index} lists {rows:,} samples, the manifest {shard.samples:,}")
    return phrases


@dataclass(slots=True)
class Measured:
    """What a folder holds, in numbers."""

    caption_words: np.ndarray
    """(captions read,) words of each caption, separated by white space."""
    captions_per_image: np.ndarray
    """(samples,) number of captions."""
    width: np.ndarray
    """(samples,) pixels as stored."""
    height: np.ndarray
    """(samples,) pixels as stored."""
    image_bytes: np.ndarray
    """(samples,) size of the encoded image in bytes."""
    image_formats: dict[str, int]
    """Number of images, by format."""
    different_images: int
    """Number of distinct image ids. It is below the number of samples where several samples show one picture."""
    samples_read: int
    """Number of samples that `caption_words` covers."""


def measure(manifest: Manifest) -> Measured:
    """Measure a folder from its indexes, and from the captions of at most CAPTIONS_READ samples."""
    import numpy as np

    step = max(1, -(-manifest.samples // CAPTIONS_READ))
    columns: dict[str, list[Any]] = {name: [] for name in ("captions", "width", "height", "image_size", "image_id")}
    words: list[int] = []
    formats = dict.fromkeys(IMAGE_FORMATS, 0)
    samples = 0
    with progress("reading indexes", len(manifest.shards), "shards", silent=len(manifest.shards) < 100) as bar:
        for shard in manifest.shards:
            index = read_index(manifest.folder / shard.index)
            for name, parts in columns.items():
                parts.append(getattr(index, name))
            for name in index.image_format:
                formats[name] += 1
            # The stride goes on from the shards before, so the samples that are read are spread evenly over the
            # folder.
            rows = range(-samples % step, len(index), step)
            with open(manifest.folder / shard.name, "rb", buffering=0) as tar:
                for row in rows:
                    raw = os.pread(tar.fileno(), int(index.text_size[row]), int(index.text_offset[row]))
                    words += [len(text.split()) for text in captions_of(raw, index.text_format[row], index.key[row])]
            samples += len(index)
            bar.advance()
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Measured(
        np.array(words), joined["captions"], joined["width"], joined["height"], joined["image_size"],
        {name: count for name, count in formats.items() if count}, len(np.unique(joined["image_id"])), -(-samples // step),
    )  # fmt: skip


def captions_of(raw: bytes, text_format: str, key: str) -> list[str]:
    """Return the captions of a text member. Raises DataError, with the sample's key, where they cannot be read."""
    try:
        return parse_captions(raw, text_format)
    except DataError as error:
        raise DataError(f"sample {key}: {error}") from None


def describe(folder: str | Path, measured: Measured | None = None) -> dict[str, Any]:
    """Describe a folder: counts, and quantiles of caption length, captions per image, image sides and image sizes.

    Args:
        folder: The shard folder.
        measured: What `measure` returned for it; None: measure it now.

    Returns:
        A dictionary that is fit for JSON. `quantiles` has lengths in words, sides in pixels, and sizes in kilobytes.
    """
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
