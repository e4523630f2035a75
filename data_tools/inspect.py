"""Looks at a finished shard folder: is everything there, and what is in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from data_tools.manifest import IMAGE_FORMATS, Manifest, Shard, read_index, read_manifest
from runtime.errors import DataError
from runtime.files import sha256_of
from runtime.progress import progress

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def verify(folder: str | Path, full: bool = False) -> Manifest:
    """Hold a folder against its manifest: names and sizes, or (`full`) every hash and every index.

    Raises `DataError` with all that is broken, in one line.
    """
    manifest = read_manifest(folder, check=False)
    broken = manifest.damaged()
    if full:
        with progress("verifying", len(manifest.shards), "shards") as bar:
            for shard in manifest.shards:
                broken += _broken_inside(manifest.folder, shard)
                bar.advance()
    if broken:
        raise DataError(f"{folder} is damaged: {'; '.join(broken)}; run the `ligature shard` that made it again")
    return manifest


def _broken_inside(folder: Path, shard: Shard) -> list[str]:
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


def describe(folder: str | Path) -> dict[str, Any]:
    """Counts, and quantiles over the folder of caption length (words), captions an image and image sides (pixels)."""
    import numpy as np

    manifest = read_manifest(folder)
    words: list[int] = []
    indexes = [read_index(manifest.folder / shard.index) for shard in manifest.shards]
    for shard, index in zip(manifest.shards, indexes, strict=True):
        with open(manifest.folder / shard.name, "rb", buffering=0) as tar:
            for offset, size, form in zip(index.text_offset, index.text_size, index.text_format, strict=True):
                text = os.pread(tar.fileno(), int(size), int(offset)).decode()
                captions = json.loads(text)["captions"] if form == "json" else [text]
                words += [len(caption.split()) for caption in captions]
    width = np.concatenate([index.width for index in indexes])
    height = np.concatenate([index.height for index in indexes])
    formats = [name for index in indexes for name in index.image_format]
    measured = {
        "caption_words": np.array(words),
        "captions_per_image": np.concatenate([index.captions for index in indexes]),
        "width": width,
        "height": height,
        "shorter_side": np.minimum(width, height),
    }
    return {
        "folder": str(manifest.folder), "shards": len(manifest.shards), "samples": manifest.samples,
        "captions": manifest.captions, "bytes": manifest.bytes, "fingerprint": manifest.fingerprint,
        "source": manifest.source, "dropped": manifest.dropped,
        "image_formats": {name: formats.count(name) for name in IMAGE_FORMATS if name in formats},
        "quantiles": {
            name: {f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}
            for name, values in measured.items()
        },
    }  # fmt: skip
