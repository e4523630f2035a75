"""Describe an image's bytes and looks in 49 bytes, from which duplicates are found (data_tools/making/duplicates.py).

Tested in tests/data_tools/making/test_duplicates.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np

from data_tools.processes import run_parallel
from data_tools.shards.manifest import MANIFEST_NAME, read_index, read_manifest
from data_tools.shards.tars import IMAGE_FORMATS, walk_tar
from data_tools.sources.items import StoredBytes
from data_tools.sources.webdataset import find_tars
from runtime.errors import DataError
from runtime.files import replaced_file
from runtime.progress import progress

RECORD = np.dtype([("content", "<u8", 2), ("look", "<u8", 4), ("state", "u1")])
"""`content`: the first 16 bytes of the file's sha256. `look`: 255 bits of a perceptual hash, the 63 of lowest frequency in the
first word. `state`: one of the three below."""
HASHED, FLAT, UNREADABLE = 0, 1, 2
"""A HASHED image is compared by bytes and look, a FLAT one by bytes alone, an UNREADABLE one not at all."""
FLAT_BELOW = 4.0
"""Standard deviation of grey values (of 255) below which an image is too flat for its look to identify it."""
CHUNK = 2048
"""Number of images whose fingerprints share a file."""
SIDE, FREQUENCIES = 64, 16
"""Pixels a side of the grey image that is transformed, and frequencies that are used along each axis."""


@cache
def _cosines() -> np.ndarray:
    """Return (FREQUENCIES, SIDE): rows of the type-II discrete cosine transform."""
    steps = (2 * np.arange(SIDE) + 1) * np.pi / (2 * SIDE)
    return np.cos(np.arange(FREQUENCIES)[:, None] * steps)


@cache
def _order() -> np.ndarray:
    """Return the coefficients' numbers without the mean, those of the lowest 8 x 8 frequencies first."""
    row, column = np.divmod(np.arange(FREQUENCIES**2), FREQUENCIES)
    return np.argsort(np.maximum(row, column) >= 8, kind="stable")[1:]


def look_of(grey: np.ndarray) -> np.ndarray:
    """Return which cosine coefficients of an image are above their median.

    This is pHash (Zauner 2010, section 3.2) with 16 x 16 frequencies instead of 8 x 8.

    Args:
        grey: (64, 64) grey values.

    Returns:
        (4,) uint64.
    """
    coefficients = (_cosines() @ grey.astype(np.float64) @ _cosines().T).ravel()[_order()]
    above = coefficients > np.median(coefficients)
    # A bit of padding makes the 63 lowest frequencies a word of their own, which the search begins with.
    bits = np.concatenate([above[:63], [False], above[63:]])
    return np.packbits(bits, bitorder="little").view("<u8")


def fingerprint(raw: bytes) -> np.ndarray:
    """Return the RECORD of an encoded image, of shape ()."""
    from PIL import Image

    from data_tools.pixels.decode import SOURCE_FORMATS, open_image, upright

    record = np.zeros((), RECORD)
    record["content"] = np.frombuffer(hashlib.sha256(raw).digest()[:16], "<u8")
    try:
        # A look needs 64 pixels a side, so a large JPEG is decoded at a fraction of its size.
        image = upright(open_image(raw, SOURCE_FORMATS, least=2 * SIDE))
    except ValueError:  # the writer will report what is wrong with the image
        record["state"] = UNREADABLE
        return record
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))
    record["look"] = look_of(grey)
    record["state"] = FLAT if grey.std() < FLAT_BELOW else HASHED
    return record


@dataclass(frozen=True, slots=True)
class _Chunk:
    path: Path
    reads: Sequence[Callable[[], bytes]]


def fingerprints(
    folder: Path, name: str, reads: Sequence[Callable[[], bytes]], workers: int, job_slice: tuple[int, int] = (0, 1)
) -> np.ndarray | None:
    """Compute the fingerprints of many images. A run that was killed does not compute them again.

    Args:
        folder: Keeps the results, as `.<name>-<chunk>.npy`.
        name: Middle part of the files' names, and what the progress bar calls the images.
        reads: Functions that read the encoded images.
        workers: Number of processes, see `run_parallel`.
        job_slice: Number of this slice, and number of slices; each computes its own chunks.

    Returns:
        (images,) RECORD, or None where chunks of other slices are missing.
    """
    starts = range(0, len(reads), CHUNK)
    chunks = [
        _Chunk(folder / f".{name}-{number:06d}.npy", reads[start : start + CHUNK])
        for number, start in enumerate(starts)
    ]
    mine = chunks[job_slice[0] :: job_slice[1]]
    todo = [chunk for chunk in mine if not chunk.path.is_file()]
    total, remaining = (sum(len(chunk.reads) for chunk in part) for part in (mine, todo))
    with progress(f"fingerprinting ({name})", total, "images", done=total - remaining) as bar:
        for chunk, _ in run_parallel(_write_chunk, todo, workers):
            bar.advance(len(chunk.reads))
    if not all(chunk.path.is_file() for chunk in chunks):
        return None
    return np.concatenate([np.load(chunk.path) for chunk in chunks] or [np.empty(0, RECORD)])


def _write_chunk(chunk: _Chunk) -> None:
    records = np.empty(len(chunk.reads), RECORD)
    for number, read in enumerate(chunk.reads):
        try:
            records[number] = fingerprint(read())
        except OSError:  # the writer will report it
            records[number] = ((0, 0), (0, 0, 0, 0), UNREADABLE)
    # numpy appends .npy to a name that lacks it, but not to an open file.
    with replaced_file(chunk.path) as temporary, open(temporary, "wb") as file:
        np.save(file, records)


def list_images(path: Path) -> list[StoredBytes]:
    """List the images of a shard folder, a folder of images or of tars, or a tar. Raises DataError where there are none."""
    if (path / MANIFEST_NAME).is_file():
        manifest = read_manifest(path)
        images = []
        for shard in manifest.shards:
            index, tar = read_index(path / shard.index), str((path / shard.name).resolve())
            offsets = zip(index.image_offset.tolist(), index.image_size.tolist(), strict=True)
            images += [StoredBytes(tar, offset, size) for offset, size in offsets]
    elif path.is_dir() and not any(path.glob("*.tar")):
        files = sorted(file for file in path.rglob("*") if file.suffix[1:].lower() in IMAGE_FORMATS and file.is_file())
        images = [StoredBytes(str(file.resolve()), 0, file.stat().st_size) for file in files]
    else:
        images = [
            StoredBytes(str(tar.resolve()), member.offset, member.size)
            for tar in find_tars(path)
            for member in walk_tar(tar).members
            if PurePosixPath(member.name).suffix[1:].lower() in IMAGE_FORMATS
        ]
    if not images:
        raise DataError(f"no images in {path}; --exclude takes a shard folder, a folder of images or of tars, or a tar")
    return images
