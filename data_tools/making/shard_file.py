"""Write one shard: a plain WebDataset tar and its index. Under its final name each file is complete or absent.

Tested in tests/data_tools/making/test_writer.py.
"""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.shards.manifest import Shard, ShardIndex, read_index, read_index_note, write_index
from data_tools.sources.items import CaptionedImage
from runtime.errors import DataError
from runtime.files import replaced_file, sha256_of

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""File extension by Pillow's format, for formats that are kept as they are. An MPO is a JPEG with more pictures after it. Other
formats become JPEG."""
WRITTEN = {"jpg": "JPEG", "webp": "WEBP"}
"""Pillow's format, by the name that `reencode` may have."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How an image's bytes are stored. The default keeps them as they are."""

    resize_shorter: int | None = None
    """Images with a longer shorter side are reduced until it has this many pixels; None: no image is resized."""
    reencode: str | None = None
    """jpg or webp: every image is encoded in it; None: only images that must be, as JPEG."""
    quality: int = 90
    """Quality of JPEG or WebP, 1 to 100."""

    def apply(self, raw: bytes) -> tuple[bytes, str, int, int]:
        """Decode an image whole, and return what to store. An image that is encoded again becomes RGB and upright.

        Returns:
            Bytes, file extension, and width and height in pixels.

        Raises:
            ValueError: The image is broken, of no known format, or has too many pixels.
        """
        from PIL import Image

        from data_tools.pixels.decode import SOURCE_FORMATS, open_image, upright

        stored = open_image(raw, SOURCE_FORMATS)
        scale = min(1.0, (self.resize_shorter or math.inf) / min(stored.size))
        if stored.format in EXTENSIONS and scale == 1 and self.reencode is None:
            return raw, EXTENSIONS[stored.format], *stored.size
        image = upright(stored)
        if scale < 1:
            width, height = (max(1, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        extension = self.reencode or "jpg"
        image.save(buffer, WRITTEN[extension], quality=self.quality)
        return buffer.getvalue(), extension, *image.size


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to write. It is sent to a worker process."""

    folder: Path
    number: int
    items: Sequence[CaptionedImage]
    encoding: Encoding

    @property
    def tar(self) -> Path:
        """Path of the tar."""
        return self.folder / f"shard-{self.number:06d}.tar"

    @property
    def index(self) -> Path:
        """Path of the index."""
        return self.folder / f"shard-{self.number:06d}.parquet"


@dataclass(frozen=True, slots=True)
class Written:
    """The result of writing one shard."""

    shard: Shard
    unreadable: list[dict[str, Any]]
    """Key, source and reason of each image that was left out because it does not decode."""


def write_shard(task: ShardTask) -> Written:
    """Write a shard's tar, then its index."""
    rows: list[tuple] = []
    image_ids: list[str] = []
    unreadable: list[dict[str, Any]] = []
    with replaced_file(task.tar) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
            for item in task.items:
                try:
                    data, extension, width, height = task.encoding.apply(item.read())
                # The machine is at fault, not the image, so the image must not be left out.
                except MemoryError:
                    raise
                except Exception as error:  # Pillow's decoders raise nearly anything on broken bytes
                    unreadable.append({"key": item.key, "source": item.source, "reason": one_line(error)})
                    continue
                record = {"captions": item.captions, "image_id": item.image_id, "source": item.source}
                text = json.dumps(record, ensure_ascii=False).encode()
                image_offset = _add_member(tar, f"{item.key}.{extension}", data)
                text_offset = _add_member(tar, f"{item.key}.json", text)
                rows.append((item.key, image_offset, len(data), extension, text_offset, len(text), "json",
                             width, height, len(item.captions)))  # fmt: skip
                image_ids.append(item.image_id)
        size, digest = temporary.stat().st_size, sha256_of(temporary)
    # The index follows its tar, so its presence marks a complete shard. Its note keeps what a later run needs to know.
    note = {"bytes": size, "sha256": digest, "unreadable": unreadable}
    write_index(task.index, ShardIndex.from_rows(rows, image_ids), note)
    return _as_written(task, len(rows), sum(row[-1] for row in rows), note)


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member whose header names no time, user or machine, and return the offset of its data."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    # `offset` lies behind the member, whose data is padded to whole blocks.
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def one_line(error: Exception) -> str:
    """Return an error as one line without paths and memory addresses, so that it is the same on every run."""
    text = getattr(error, "strerror", None) or re.sub(r" <\S+ object at 0x[0-9a-f]+>", "", str(error))
    return " ".join(f"{type(error).__name__}: {text}".split())


def finished_shard(task: ShardTask) -> Written | None:
    """Return the shard that an earlier run wrote, or None where its tar or index is absent or cut."""
    if not (task.index.is_file() and task.tar.is_file()):
        return None
    try:
        rows, note = read_index(task.index), read_index_note(task.index)
    except DataError:
        return None  # cut by a crash of the machine; the shard is written again
    if task.tar.stat().st_size != note.get("bytes") or "unreadable" not in note:
        return None
    return _as_written(task, len(rows), int(rows.captions.sum()), note)


def _as_written(task: ShardTask, samples: int, captions: int, note: dict[str, Any]) -> Written:
    entry = Shard(
        task.tar.name, samples, captions, note["bytes"], note["sha256"], task.index.name, sha256_of(task.index)
    )
    return Written(entry, note["unreadable"])
