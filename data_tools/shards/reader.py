"""Random access to the samples of shard folders: one read each, by the index. Nothing read is ever executed.

What is read is held against the tar's own headers, so a shard that is not what its index says is seen: cut short, shifted, or
overwritten in the middle. Samples that cannot be read come back as `BrokenSample`s, and the others of the shard as they are.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.pixels.decode import MAX_BYTES
from data_tools.shards.captions import parse_captions
from data_tools.shards.manifest import TEXT_FORMATS, Manifest, Shard, read_columns, read_manifest
from data_tools.shards.remote import ShardCache, is_remote, read_remote_manifest
from runtime.errors import DataError

OPEN_SHARDS = 256
"""Tars kept open by one process."""
PART_ROWS, PARTS = 1024, 1024
"""Rows of an index kept together, and how many such parts one process keeps (80 kB each)."""
RUN_BYTES = 4 << 20
"""Neighbours, and the members of one sample, are read at once where they lie within as many bytes."""
HEADER = 512
INDEX_COLUMNS = ("key", "image_offset", "image_size", "text_offset", "text_size", "image_id", "text_format")


@dataclass(slots=True)
class RawSample:
    key: str
    shard: str
    """Name of the tar; of several folders, with the folder's name before it."""
    image: bytes
    """Encoded, as the shard holds it."""
    text: bytes
    """Its captions, as the shard holds them: json (an object whose `captions` is a list) or txt (one caption)."""
    text_format: str
    image_id: int
    """Samples with the same number show the same picture; of several folders too, unless their ids are names of files."""

    @property
    def captions(self) -> list[str]:
        """Raises DataError where they cannot be read."""
        try:
            return parse_captions(self.text, self.text_format)
        except DataError as error:
            raise BrokenSample(self.shard, self.key, str(error)) from None


class BrokenSample(DataError):
    """A sample that cannot be read, with what a quarantine lists."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"sample {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, " ".join(reason.split())

    def __reduce__(self) -> tuple:
        return BrokenSample, (self.shard, self.key, self.reason)


@dataclass(slots=True)
class _Tar:
    name: str
    descriptor: int = -1
    reason: str = ""
    """Why it could not be opened."""


@dataclass(slots=True)
class _Part:
    """Some rows of one shard's index; memoryviews, since their items are Python's own numbers."""

    keys: list[str]
    image: memoryview
    image_size: memoryview
    text: memoryview
    text_size: memoryview
    image_id: memoryview
    first: memoryview
    """Where the bytes of a sample begin, headers included."""
    end: memoryview
    text_format: list[str]
    reason: str = ""
    """Why the index could not be read."""


class ShardReader:
    """`reader[i]` is the i-th sample of a folder, or of several folders one after the other, shards in manifest order."""

    def __init__(
        self,
        folders: str | Path | Manifest | Mapping[str, str | Path | Manifest],
        cache: ShardCache | None = None,
        check: bool = True,
    ) -> None:
        """folders: one, or several by name, on a disk or remote (s3://…, gs://…, https://…; through `cache`).

        check: look whether every shard of a folder on a disk is there with its size; else this shows when it is read.
        """
        named = folders if isinstance(folders, Mapping) else {"": folders}
        self.cache = cache
        self.names = list(named)
        self.manifests: list[Manifest] = []
        self.roots: list[str] = []
        """Where the folders lie, as they were given."""
        for folder in named.values():
            if isinstance(folder, Manifest):
                self.manifests.append(folder)
            elif is_remote(folder):
                self.manifests.append(read_remote_manifest(str(folder)))
            else:
                self.manifests.append(read_manifest(folder, check))
            self.roots.append(str(folder.folder if isinstance(folder, Manifest) else folder).rstrip("/"))
        if any(map(is_remote, self.roots)):
            self.cache = cache or ShardCache()
        self.counts = np.concatenate([manifest.table.columns["samples"] for manifest in self.manifests])
        """(shards,) samples of each shard of all folders."""
        self._ends = np.cumsum(self.counts)
        self.first_samples = self._ends - self.counts
        """(shards,) the first sample of each shard."""
        self._first_shards = np.cumsum([0, *(len(manifest.shards) for manifest in self.manifests)])
        # The same name in another folder is another picture, the same folder elsewhere is not.
        self._salts = [
            int(manifest.fingerprint[:16], 16) >> 1 if manifest.ids_are_names and len(self.manifests) > 1 else 0
            for manifest in self.manifests
        ]
        self.read_ahead = False
        """Ask the disk for the whole part that a sample belongs to: its neighbours in the shard will be asked for soon."""
        self._tars: OrderedDict[int, _Tar] = OrderedDict()
        self._parts: OrderedDict[tuple[int, int], _Part] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict:
        # A worker process opens its own files.
        return {**self.__dict__, "_tars": OrderedDict(), "_parts": OrderedDict()}

    @property
    def location(self) -> str:
        """The folders, for messages."""
        return " + ".join(self.roots)

    def shards_of(self, folder: int) -> slice:
        """The shards of a folder, among those of all."""
        return slice(int(self._first_shards[folder]), int(self._first_shards[folder + 1]))

    def shard(self, number: int) -> tuple[int, Shard]:
        """-> its folder, and what that folder's manifest says of it."""
        folder = int(np.searchsorted(self._first_shards, number, side="right")) - 1
        return folder, self.manifests[folder].shards[number - int(self._first_shards[folder])]

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard number, row in the shard)."""
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, sample - int(self.first_samples[shard])

    def key(self, sample: int) -> str:
        shard, row = self.locate(sample)
        part = self._part(shard, row // PART_ROWS)
        if part.reason:
            raise DataError(part.reason)
        return part.keys[row % PART_ROWS]

    def captions(self, sample: int) -> list[str]:
        """A sample's captions, without reading its image."""
        found = self._read(*self.locate(sample), with_image=False)
        if isinstance(found, BrokenSample):
            raise found
        return found.captions

    def __getitem__(self, sample: int) -> RawSample:
        """Raises BrokenSample."""
        found = self._read(*self.locate(sample))
        if isinstance(found, BrokenSample):
            raise found
        return found

    def read(self, samples: Sequence[int] | np.ndarray) -> list[RawSample | BrokenSample]:
        """Many samples, undecoded, each as it can be read. Neighbours in a shard are read at once."""
        numbers = np.asarray(samples, np.int64)
        if not len(numbers):
            return []
        shards = np.searchsorted(self._ends, numbers, side="right")
        rows = numbers - self.first_samples[shards]
        parts = shards << 32 | rows // PART_ROWS
        ends = np.append(np.flatnonzero((np.diff(numbers) != 1) | (np.diff(parts) != 0)) + 1, len(numbers)).tolist()
        found: list[RawSample | BrokenSample | None] = []
        headers: list[bytes] = []
        sizes: list[int] = []
        start = 0
        for end in ends:
            shard, place, row = int(shards[start]), int(rows[start]) // PART_ROWS, int(rows[start]) % PART_ROWS
            while start < end:  # once, unless neighbours are more than RUN_BYTES
                part, tar = self._part(shard, place), self._tar(shard)
                start += self._read_run(part, tar, row, end - start, found, headers, sizes)
                row = int(rows[start - 1]) % PART_ROWS + 1
        right = _headers_right(headers, sizes).tolist()
        checked = iter(right)
        for place, sample in enumerate(found):
            # What is not as usual is looked at again, alone: it may be fine, or why it is not is told.
            if sample is None or not (next(checked) & next(checked)):
                found[place] = self._read(int(shards[place]), int(rows[place]))
        return found  # type: ignore[return-value]

    def _read_run(
        self, part: _Part, tar: _Tar, row: int, count: int, found: list, headers: list[bytes], sizes: list[int]
    ) -> int:
        """Read up to `count` samples from `row` on in one go -> how many. None stands for one that is not as usual."""
        if part.reason or tar.reason:
            found.append(None)
            return 1
        begin = part.first[row]
        while count > 1 and part.end[row + count - 1] - begin > RUN_BYTES:
            count //= 2
        length = part.end[row + count - 1] - begin
        try:
            data = os.pread(tar.descriptor, length, begin) if begin >= 0 and 0 < length <= RUN_BYTES else b""
        except OSError:  # a bad sector, a file replaced under us: each is read again alone, and what is broken told
            data = b""
        if len(data) != length:
            found += [None] * count
            return count
        keys, image_ids, name = part.keys, part.image_id, tar.name
        for number in range(row, row + count):
            image_at, text_at = part.image[number] - begin, part.text[number] - begin
            image_size, text_size = part.image_size[number], part.text_size[number]
            headers.append(data[image_at - HEADER : image_at])
            headers.append(data[text_at - HEADER : text_at])
            sizes.append(image_size)
            sizes.append(text_size)
            image, text = data[image_at : image_at + image_size], data[text_at : text_at + text_size]
            found.append(RawSample(keys[number], name, image, text, part.text_format[number], image_ids[number]))
        return count

    def columns(self, number: int, names: Sequence[str]) -> Any:
        """Columns of one shard's index, as an arrow table. Raises DataError."""
        folder, shard = self.shard(number)
        try:
            with os.fdopen(self._open(folder, shard.index, shard.index_sha256, None), "rb") as file:
                return read_columns(file, names, f"{self.roots[folder]}/{shard.index}")
        except OSError as error:
            raise DataError(f"cannot read {self.roots[folder]}/{shard.index}: {error.strerror}") from error

    def _read(self, shard: int, row: int, with_image: bool = True) -> RawSample | BrokenSample:
        part, tar = self._part(shard, row // PART_ROWS), self._tar(shard)
        if part.reason:
            return BrokenSample(tar.name, f"#{row}", part.reason)
        row %= PART_ROWS
        key = part.keys[row]
        if tar.reason:
            return BrokenSample(tar.name, key, tar.reason)
        image_at, image_size, text_at, text_size = (
            part.image[row],
            part.image_size[row],
            part.text[row],
            part.text_size[row],
        )
        for size in (image_size, text_size):
            if size > MAX_BYTES:
                return BrokenSample(tar.name, key, f"a member of {size:,} bytes is more than {MAX_BYTES:,}")
        try:
            image = b""
            if with_image:
                image = _member(_pread(tar.descriptor, HEADER + image_size, image_at - HEADER), image_size)
            text = _member(_pread(tar.descriptor, HEADER + text_size, text_at - HEADER), text_size)
        except (OSError, ValueError) as error:
            return BrokenSample(tar.name, key, str(error))
        return RawSample(key, tar.name, image, text, part.text_format[row], part.image_id[row])

    def _tar(self, number: int) -> _Tar:
        tar = self._tars.get(number)
        if tar is None:
            folder, shard = self.shard(number)
            tar = self._tars[number] = _Tar(f"{self.names[folder]}/{shard.name}" if self.names[folder] else shard.name)
            try:
                tar.descriptor = self._open(folder, shard.name, shard.sha256, shard.bytes)
            except FileNotFoundError:
                tar.reason = "the shard is missing"
            except (OSError, DataError) as error:
                tar.reason = f"the shard cannot be opened: {getattr(error, 'strerror', None) or error}"
            if len(self._tars) > OPEN_SHARDS:
                _close(self._tars.popitem(last=False)[1])
        return tar

    def _part(self, number: int, place: int) -> _Part:
        part = self._parts.get((number, place))
        if part is None:
            folder, shard = self.shard(number)
            try:
                with os.fdopen(self._open(folder, shard.index, shard.index_sha256, None), "rb") as file:
                    part = _read_part(file.read(), shard, place * PART_ROWS, self._salts[folder])
            except (OSError, DataError) as error:
                nothing = memoryview(b"")
                reason = f"its index {shard.index} cannot be read: {getattr(error, 'strerror', None) or error}"
                part = _Part([], nothing, nothing, nothing, nothing, nothing, nothing, nothing, [], reason)
            self._parts[number, place] = part
            if len(self._parts) > PARTS:
                self._parts.popitem(last=False)
            if self.read_ahead and part.keys and not (tar := self._tar(number)).reason:
                start, end = part.image[0] - HEADER, part.image[-1] + part.image_size[-1]
                os.posix_fadvise(tar.descriptor, start, max(end - start, 0), os.POSIX_FADV_WILLNEED)
        return part

    def _open(self, folder: int, name: str, sha256: str, size: int | None) -> int:
        """A descriptor of a file of a folder, by way of the cache where it is remote."""
        root = self.roots[folder]
        if self.cache is None or not (is_remote(root) or self.cache.stage):
            return os.open(f"{root}/{name}", os.O_RDONLY)
        descriptor = self.cache.open(f"{root}/{name}", sha256, size)
        for number, tar in list(self._tars.items()):  # what has left the cache shall leave the disk
            if tar.descriptor >= 0 and not os.fstat(tar.descriptor).st_nlink:
                _close(self._tars.pop(number))
        return descriptor

    def close(self) -> None:
        for tar in self._tars.values():
            _close(tar)
        self._tars.clear()
        self._parts.clear()


def _close(tar: _Tar) -> None:
    if tar.descriptor >= 0:
        os.close(tar.descriptor)


def _read_part(data: bytes, shard: Shard, start: int, salt: int) -> _Part:
    """Rows `start` to `start + PART_ROWS` of an index, given as the bytes of its file; `salt` (63 bits) changes image ids.
    Raises DataError."""
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DataError("it is not the one that the manifest was made with")
    columns = read_columns(io.BytesIO(data), INDEX_COLUMNS, shard.index)
    if columns.num_rows != shard.samples:
        raise DataError(f"it has {columns.num_rows} rows, the manifest says {shard.samples}")
    rows = columns.slice(start, PART_ROWS)
    image, image_size, text, text_size, image_id = (
        np.ascontiguousarray(rows.column(name).to_numpy()) for name in INDEX_COLUMNS[1:6]
    )
    image_id = image_id ^ salt
    first = np.minimum(image, text) - HEADER
    end = np.maximum(image + image_size, text + text_size)
    keys, formats = rows.column("key").to_pylist(), rows.column("text_format").to_pylist()
    if wrong := [name for name in set(formats) if name not in TEXT_FORMATS]:
        raise DataError(f"it has captions in the format {wrong[0]!r}")
    return _Part(
        keys, image.data, image_size.data, text.data, text_size.data, image_id.data, first.data, end.data, formats
    )


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise ValueError(f"the shard ends before it ({len(data):,} of {size:,} bytes); it was cut short")
    return data


def _member(data: bytes, size: int) -> bytes:
    """The member after its header, which is checked. Raises ValueError."""
    header = data[:HEADER]
    stored = header[148:156]
    try:
        # A header's checksum is the sum of its bytes, with eight blanks for the sum itself.
        right = int(stored.split(b"\0", 1)[0], 8) == sum(header) - sum(stored) + 8 * 32
        right = right and int(header[124:136].split(b"\0", 1)[0], 8) == size
    except ValueError:
        right = False
    if not right:
        raise ValueError("the tar's header there is not the one that the index was made from; the shard was altered")
    return data[HEADER:]


_EIGHTS = 8 ** np.arange(10, -1, -1)


def _headers_right(headers: list[bytes], sizes: list[int]) -> np.ndarray:
    """What `_member` checks, of many headers at once: (n,) bool. False as well for numbers that are written in another way."""
    # Size, time and checksum lie in a row; the lower half of Adler-32 is the sum of all bytes and 1, modulo 65,521.
    sums = np.array([zlib.adler32(header) & 0xFFFF for header in headers], np.int64)
    fields = np.frombuffer(b"".join([header[124:156] for header in headers]), np.uint8).reshape(-1, 32).astype(np.int64)
    digits = fields - ord("0")
    stored = fields[:, 24:]
    expected = digits[:, 24:30] @ _EIGHTS[-6:] + stored.sum(1) - 8 * 32 + 1
    return (sums == expected % 65521) & (digits[:, :11] @ _EIGHTS == sizes)
