"""Random access to the samples of a shard folder: one seek each, by the index. Nothing read is ever executed."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.images import MAX_BYTES
from data_tools.manifest import Manifest, ShardIndex, read_index, read_manifest
from runtime.errors import DataError

OPEN_SHARDS = 64
"""Shards whose file and index are kept open by one process."""


@dataclass(frozen=True, slots=True)
class RawSample:
    key: str
    shard: str
    image: bytes
    """Encoded, as the shard holds it."""
    captions: list[str]


class ShardReader:
    """`reader[i]` is the i-th sample of a folder, shards in the manifest's order."""

    def __init__(self, folder: str | Path | Manifest) -> None:
        self.manifest = folder if isinstance(folder, Manifest) else read_manifest(Path(folder))
        self._ends = np.cumsum([shard.samples for shard in self.manifest.shards])
        self._open: OrderedDict[int, tuple[int, ShardIndex]] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.samples

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # a worker process opens its own files

    def place(self, sample: int) -> tuple[int, int]:
        """(shard number, row in the shard)."""
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, sample - (int(self._ends[shard - 1]) if shard else 0)

    def key(self, sample: int) -> str:
        shard, row = self.place(sample)
        return self._shard(shard)[1].key[row]

    def captions(self, sample: int) -> list[str]:
        """A sample's captions, without reading its image."""
        shard, row = self.place(sample)
        return self._captions(shard, row)

    def __getitem__(self, sample: int) -> RawSample:
        shard, row = self.place(sample)
        descriptor, index = self._shard(shard)
        image = _read(descriptor, int(index.image_offset[row]), int(index.image_size[row]), index.key[row])
        return RawSample(index.key[row], self.manifest.shards[shard].name, image, self._captions(shard, row))

    def _captions(self, shard: int, row: int) -> list[str]:
        descriptor, index = self._shard(shard)
        key = index.key[row]
        try:
            text = _read(descriptor, int(index.text_offset[row]), int(index.text_size[row]), key).decode("utf-8")
            captions = json.loads(text)["captions"] if index.text_format[row] == "json" else [text.strip()]
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError) as error:
            raise DataError(f"sample {key}: its captions cannot be read ({error})") from error
        if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
            raise DataError(f"sample {key}: `captions` is not a list of strings")
        return captions

    def _shard(self, number: int) -> tuple[int, ShardIndex]:
        if number not in self._open:
            shard = self.manifest.shards[number]
            index = read_index(self.manifest.folder / shard.index)  # first: it may raise, and a file would stay open
            try:
                opened = os.open(self.manifest.folder / shard.name, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"cannot open shard {self.manifest.folder / shard.name}: {error.strerror}") from error
            self._open[number] = (opened, index)
            if len(self._open) > OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1][0])
        self._open.move_to_end(number)
        return self._open[number]

    def close(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _read(descriptor: int, offset: int, size: int, key: str) -> bytes:
    if size > MAX_BYTES:
        raise DataError(f"sample {key}: a member of {size:,} bytes is more than {MAX_BYTES:,}")
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise DataError(f"sample {key}: the shard ends before it ({len(data)} of {size} bytes); it was cut short")
    return data
