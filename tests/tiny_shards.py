"""Small shard folders for tests."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from data_tools.making.writer import Origin, WriteOptions
from data_tools.making.writer import write_shards as write
from data_tools.shards.manifest import Manifest
from data_tools.sources import CaptionedImage


def write_shards(
    items: Iterable[CaptionedImage], out: str | Path, *, source: dict[str, Any] | None = None, **options: Any
) -> Manifest | None:
    """`data_tools.making.writer.write_shards` with its options as keywords; `dropped` goes to the origin."""
    return write(items, out, origin=Origin(source or {}, options.pop("dropped", {})), options=WriteOptions(**options))


def make(folder: Path, letter: str, samples: int, shard_samples: int = 4) -> Path:
    """Image n is (10 + n) x 12 pixels and has 1 + n % 3 captions; caption c of it has n % 5 + c + 1 words."""

    def item(number: int) -> CaptionedImage:
        buffer = io.BytesIO()
        Image.new("RGB", (10 + number, 12), (number, 0, 0)).save(buffer, "PNG")
        captions = [f"{letter}{number}c{c}" + " word" * (number % 5 + c) for c in range(1 + number % 3)]
        return CaptionedImage(f"{letter}{number:02}", captions, f"{letter}{number}", buffer.getvalue, f"{number}.png")

    write_shards([item(number) for number in range(samples)], folder, shard_samples=shard_samples, workers=1)
    return folder
