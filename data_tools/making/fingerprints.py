"""What an image's bytes and looks are, in 49 bytes: the ground on which duplicates are found (data_tools/making/duplicates.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np

from data_tools.making.processes import run_parallel
from data_tools.shards.manifest import MANIFEST_NAME, read_index, read_manifest
from data_tools.shards.tars import IMAGE_FORMATS, walk_tar
from data_tools.sources.items import StoredBytes
from data_tools.sources.webdataset import find_tars
from runtime.errors import DataError
from runtime.files import replaced_file
from runtime.progress import progress

RECORD = np.dtype([("content", "<u8", 2), ("look", "<u8", 4), ("state", "u1")])
"""`content`: the first 16 bytes of the file's sha256. `look`: 255 bits of its perceptual hash, the 63 of lowest frequency in
the first word. `state`: one of the three below; what is FLAT has no look, what is UNREADABLE takes no part."""
SEEN, FLAT, UNREADABLE = 0, 1, 2
FLAT_BELOW = 4.0
"""Standard deviation of grey values (of 255) below which an image is too flat to be told by its looks."""
CHUNK = 2048
"""Images a file of fingerprints."""
SIDE, FREQUENCIES = 64, 16


@cache
def _cosines() -> np.ndarray:
    """(FREQUENCIES, SIDE): rows of the type-II discrete cosine transform."""
    steps = (2 * np.arange(SIDE) + 1) * np.pi / (2 * SIDE)
    return np.cos(np.arange(FREQUENCIES)[:, None] * steps)


@cache
def _order() -> np.ndarray:
    """The coefficients without the mean, those of the lowest 8 x 8 frequencies first."""
    row, column = np.divmod(np.arange(FREQUENCIES**2), FREQUENCIES)
    return np.argsort(np.maximum(row, column) >= 8, kind="stable")[1:]


def look_of(grey: np.ndarray) -> np.ndarray:
    """(64, 64) grey values -> (4,) uint64: which cosine coefficients are above their median (pHash, Zauner 2010, section 3.2,
    with 16 x 16 frequencies for 8 x 8)."""
    coefficients = (_cosines() @ grey.astype(np.float64) @ _cosines().T).ravel()[_order()]
    above = coefficients > np.median(coefficients)
    bits = np.concatenate([above[:63], [False], above[63:]])
    return np.packbits(bits, bitorder="little").view("<u8")


def fingerprint(raw: bytes) -> np.ndarray:
    """An encoded image -> one RECORD, of shape ()."""
    from PIL import Image

    from data_tools.pixels.decode import SOURCE_FORMATS, open_image, upright

    record = np.zeros((), RECORD)
    record["content"] = np.frombuffer(hashlib.sha256(raw).digest()[:16], "<u8")
    try:
        image = upright(open_image(raw, SOURCE_FORMATS, least=2 * SIDE))
    except ValueError:  # the writer will say what is wrong with it
        record["state"] = UNREADABLE
        return record
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))
    record["look"] = look_of(grey)
    record["state"] = FLAT if grey.std() < FLAT_BELOW else SEEN
    return record


@dataclass(frozen=True, slots=True)
class _Chunk:
    path: Path
    reads: Sequence[Callable[[], bytes]]


def fingerprints(
    folder: Path, name: str, reads: Sequence[Callable[[], bytes]], workers: int, piece: tuple[int, int] = (0, 1)
) -> np.ndarray | None:
    """The records of many images, (images,) RECORD, kept in `folder` as `.<name>-<number>.npy`.

    Only the chunks of this piece (number, of how many) are computed; None where others are not there yet. Killed and called again
    with the same images it goes on.
    """
    slices = range(0, len(reads), CHUNK)
    chunks = [_Chunk(folder / f".{name}-{k:06d}.npy", reads[at : at + CHUNK]) for k, at in enumerate(slices)]
    mine = [chunk for number, chunk in enumerate(chunks) if number % piece[1] == piece[0]]
    todo = [chunk for chunk in mine if not chunk.path.is_file()]
    done = sum(len(chunk.reads) for chunk in mine) - sum(len(chunk.reads) for chunk in todo)
    with progress(f"looking ({name})", sum(len(chunk.reads) for chunk in mine), "images", done=done) as bar:
        for chunk, _ in run_parallel(_look, todo, workers):
            bar.advance(len(chunk.reads))
    if not all(chunk.path.is_file() for chunk in chunks):
        return None
    return np.concatenate([np.load(chunk.path) for chunk in chunks] or [np.empty(0, RECORD)])


def _look(chunk: _Chunk) -> None:
    records = np.empty(len(chunk.reads), RECORD)
    for place, read in enumerate(chunk.reads):
        try:
            records[place] = fingerprint(read())
        except OSError:  # the writer will say so
            records[place] = ((0, 0), (0, 0, 0, 0), UNREADABLE)
    with replaced_file(chunk.path) as temporary, open(temporary, "wb") as file:
        np.save(file, records)


def every_image(place: Path) -> list[StoredBytes]:
    """Each image of a shard folder, a folder of images or of tars, or a tar: what a source is held against."""
    if (place / MANIFEST_NAME).is_file():
        manifest = read_manifest(place)
        found = []
        for shard in manifest.shards:
            index, path = read_index(place / shard.index), str((place / shard.name).resolve())
            offsets = zip(index.image_offset.tolist(), index.image_size.tolist(), strict=True)
            found += [StoredBytes(path, offset, size) for offset, size in offsets]
    elif place.is_dir() and not any(place.glob("*.tar")):
        paths = sorted(path for path in place.rglob("*") if path.suffix[1:].lower() in IMAGE_FORMATS and path.is_file())
        found = [StoredBytes(str(path.resolve()), 0, path.stat().st_size) for path in paths]
    else:
        found = [
            StoredBytes(str(tar.resolve()), member.offset, member.size)
            for tar in find_tars(place)
            for member in walk_tar(tar).members
            if PurePosixPath(member.name).suffix[1:].lower() in IMAGE_FORMATS
        ]
    if not found:
        raise DataError(
            f"no images in {place}; --exclude takes a shard folder, a folder of images or of tars, or a tar"
        )
    return found
