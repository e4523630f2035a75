"""Read any sample of shard folders by its number, with one read at the place that the index names.

Each read is checked against the tar's own headers. A shard that differs from its index is therefore noticed: cut short, shifted,
or overwritten in the middle. A sample that cannot be read comes back as a `BrokenSample`; the others of its shard are still read.
Nothing that is read is ever executed.
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
"""Rows of an index that one part holds, and parts that one process keeps (80 kB each)."""
RUN_BYTES = 4 << 20
"""Neighbouring samples are read in one go where they lie within this many bytes."""
HEADER = 512
"""Bytes of a tar header, which lies directly before its member."""
INDEX_COLUMNS = ("key", "image_offset", "image_size", "text_offset", "text_size", "image_id", "text_format")


@dataclass(slots=True)
class RawSample:
    """One sample as its shard holds it, nothing decoded."""

    key: str
    """Sample key."""
    shard: str
    """Name of the tar. Where several folders are read, the folder's name comes before it."""
    image: bytes
    """The encoded image."""
    text: bytes
    """The text member, see `data_tools.shards.captions`."""
    text_format: str
    """json or txt."""
    image_id: int
    """Samples with the same number show the same picture. Across folders this holds unless image ids are file names."""

    @property
    def captions(self) -> list[str]:
        """The captions. Raises BrokenSample where they cannot be read."""
        try:
            return parse_captions(self.text, self.text_format)
        except DataError as error:
            raise BrokenSample(self.shard, self.key, str(error)) from None


class BrokenSample(DataError):
    """A sample that cannot be read, with the shard, key and reason that a quarantine lists."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"sample {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, " ".join(reason.split())

    def __reduce__(self) -> tuple:
        # Exceptions are pickled by their message alone, which `__init__` would not accept. Workers send these back.
        return BrokenSample, (self.shard, self.key, self.reason)


@dataclass(slots=True)
class _Tar:
    """An open tar."""

    name: str
    descriptor: int = -1
    reason: str = ""
    """Why it could not be opened; empty where it is open."""


@dataclass(slots=True)
class _Part:
    """PART_ROWS rows of one shard's index. Columns are memoryviews, since indexing them gives plain Python numbers."""

    keys: list[str]
    image: memoryview
    image_size: memoryview
    text: memoryview
    text_size: memoryview
    image_id: memoryview
    first: memoryview
    """Offset of a sample's first byte, headers included."""
    end: memoryview
    """Offset after a sample's last byte."""
    text_format: list[str]
    reason: str = ""
    """Why the index could not be read; empty where it could."""


class ShardReader:
    """The samples of one shard folder, or of several one after the other, shards in manifest order: `reader[i]` is the i-th."""

    def __init__(
        self,
        folders: str | Path | Manifest | Mapping[str, str | Path | Manifest],
        cache: ShardCache | None = None,
        check: bool = True,
    ) -> None:
        """Read the manifests.

        Args:
            folders: One folder, or several by name, on a disk or remote (s3://…, gs://…, https://…).
            cache: Where remote shards are kept; None: the default cache.
            check: Whether every shard of a folder on a disk must be there with its size. Otherwise damage shows when a shard is
                read.
        """
        folders = folders if isinstance(folders, Mapping) else {"": folders}
        self.cache = cache
        self.names = list(folders)
        self.manifests: list[Manifest] = []
        self.roots: list[str] = []
        """Path or address of each folder, as the caller gave it."""
        for folder in folders.values():
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
        """(shards,) number of samples of each shard, over all folders."""
        self._ends = np.cumsum(self.counts)
        self.first_samples = self._ends - self.counts
        """(shards,) number of each shard's first sample."""
        self._first_shards = np.cumsum([0, *(len(manifest.shards) for manifest in self.manifests)])
        # A file name in another folder is another picture, but a copy of the same folder holds the same pictures.
        self._salts = [
            int(manifest.fingerprint[:16], 16) >> 1 if manifest.ids_are_names and len(self.manifests) > 1 else 0
            for manifest in self.manifests
        ]
        self.read_ahead = False
        """Whether the disk is asked for a sample's whole part at once, because its neighbours will be read soon."""
        self._tars: OrderedDict[int, _Tar] = OrderedDict()
        self._parts: OrderedDict[tuple[int, int], _Part] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict:
        # A worker process opens its own files.
        return {**self.__dict__, "_tars": OrderedDict(), "_parts": OrderedDict()}

    @property
    def location(self) -> str:
        """The folders' paths or addresses, for messages."""
        return " + ".join(self.roots)

    def shards_of(self, folder: int) -> slice:
        """Return the range of shard numbers that belong to a folder."""
        return slice(int(self._first_shards[folder]), int(self._first_shards[folder + 1]))

    def shard(self, number: int) -> tuple[int, Shard]:
        """Return the number of a shard's folder, and its entry in that folder's manifest."""
        folder = int(np.searchsorted(self._first_shards, number, side="right")) - 1
        return folder, self.manifests[folder].shards[number - int(self._first_shards[folder])]

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the shard number of a sample, and its row in that shard."""
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, sample - int(self.first_samples[shard])

    def key(self, sample: int) -> str:
        """Return a sample's key. Raises DataError where its index cannot be read."""
        shard, row = self.locate(sample)
        part = self._part(shard, row // PART_ROWS)
        if part.reason:
            raise DataError(part.reason)
        return part.keys[row % PART_ROWS]

    def captions(self, sample: int) -> list[str]:
        """Return a sample's captions without reading its image. Raises BrokenSample where they cannot be read."""
        raw = self._read(*self.locate(sample), with_image=False)
        if isinstance(raw, BrokenSample):
            raise raw
        return raw.captions

    def __getitem__(self, sample: int) -> RawSample:
        """Return a sample. Raises BrokenSample where it cannot be read."""
        raw = self._read(*self.locate(sample))
        if isinstance(raw, BrokenSample):
            raise raw
        return raw

    def read(self, samples: Sequence[int] | np.ndarray) -> list[RawSample | BrokenSample]:
        """Read many samples, neighbours in a shard in one go.

        Args:
            samples: Sample numbers, in any order.

        Returns:
            One entry for each number: the undecoded sample, or why it cannot be read.
        """
        numbers = np.asarray(samples, np.int64)
        if not len(numbers):
            return []
        shards = np.searchsorted(self._ends, numbers, side="right")
        rows = numbers - self.first_samples[shards]
        # Shard and part in one number, so that a single difference finds where either changes.
        parts = shards << 32 | rows // PART_ROWS
        ends = np.append(np.flatnonzero((np.diff(numbers) != 1) | (np.diff(parts) != 0)) + 1, len(numbers)).tolist()
        read: list[RawSample | BrokenSample | None] = []
        headers: list[bytes] = []
        sizes: list[int] = []
        start = 0
        for end in ends:
            shard, part_number, row = int(shards[start]), int(rows[start]) // PART_ROWS, int(rows[start]) % PART_ROWS
            while start < end:  # once, unless the neighbours have more than RUN_BYTES
                part, tar = self._part(shard, part_number), self._tar(shard)
                start += self._read_run(part, tar, row, end - start, read, headers, sizes)
                row = int(rows[start - 1]) % PART_ROWS + 1
        verdicts = iter(_check_headers(headers, sizes).tolist())  # two for each sample that was read
        for position, sample in enumerate(read):
            # An unusual sample is read again alone: it may be fine, and if not, the slow path names the reason.
            if sample is None or not (next(verdicts) & next(verdicts)):
                read[position] = self._read(int(shards[position]), int(rows[position]))
        return read  # type: ignore[return-value]

    def _read_run(
        self, part: _Part, tar: _Tar, row: int, count: int, read: list, headers: list[bytes], sizes: list[int]
    ) -> int:
        """Read up to `count` neighbouring samples from `row` on with one call.

        Args:
            part: The index rows.
            tar: The tar.
            row: The first sample's row in the part.
            count: Maximum number of samples to read.
            read: Receives each sample, or None for one that is unusual.
            headers: Receives the tar headers of each sample's image and text.
            sizes: Receives the sizes that these headers must state.

        Returns:
            How many samples were read.
        """
        if part.reason or tar.reason:
            read.append(None)
            return 1
        begin = part.first[row]
        while count > 1 and part.end[row + count - 1] - begin > RUN_BYTES:
            count //= 2
        length = part.end[row + count - 1] - begin
        try:
            # An index that does not fit its tar may name any offsets. Then nothing is read in one go.
            data = os.pread(tar.descriptor, length, begin) if begin >= 0 and 0 < length <= RUN_BYTES else b""
        except OSError:  # a bad sector, or a file replaced under us: each sample is read again alone
            data = b""
        if len(data) != length:
            read += [None] * count
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
            read.append(RawSample(keys[number], name, image, text, part.text_format[number], image_ids[number]))
        return count

    def columns(self, number: int, names: Sequence[str]) -> Any:
        """Return columns of one shard's index as an arrow table. Raises DataError where it cannot be read."""
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
        # Checked before the read, because a wrong index could ask for any amount of memory.
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
            # A failure is kept as well, so that a missing shard is not looked for again at each of its samples.
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

    def _part(self, number: int, part_number: int) -> _Part:
        part = self._parts.get((number, part_number))
        if part is None:
            folder, shard = self.shard(number)
            try:
                with os.fdopen(self._open(folder, shard.index, shard.index_sha256, None), "rb") as file:
                    part = _read_part(file.read(), shard, part_number * PART_ROWS, self._salts[folder])
            except (OSError, DataError) as error:
                nothing = memoryview(b"")
                reason = f"its index {shard.index} cannot be read: {getattr(error, 'strerror', None) or error}"
                part = _Part([], nothing, nothing, nothing, nothing, nothing, nothing, nothing, [], reason)
            self._parts[number, part_number] = part
            if len(self._parts) > PARTS:
                self._parts.popitem(last=False)
            if self.read_ahead and part.keys and not (tar := self._tar(number)).reason:
                start, end = part.image[0] - HEADER, part.image[-1] + part.image_size[-1]
                os.posix_fadvise(tar.descriptor, start, max(end - start, 0), os.POSIX_FADV_WILLNEED)
        return part

    def _open(self, folder: int, name: str, sha256: str, size: int | None) -> int:
        """Return a descriptor of a folder's file, through the cache where the folder is remote."""
        root = self.roots[folder]
        if self.cache is None or not (is_remote(root) or self.cache.stage):
            return os.open(f"{root}/{name}", os.O_RDONLY)
        descriptor = self.cache.open(f"{root}/{name}", sha256, size)
        # A file that was removed from the cache frees its space only when it is closed.
        for number, tar in list(self._tars.items()):
            if tar.descriptor >= 0 and not os.fstat(tar.descriptor).st_nlink:
                _close(self._tars.pop(number))
        return descriptor

    def close(self) -> None:
        """Close all files. The reader opens them again when it is used."""
        for tar in self._tars.values():
            _close(tar)
        self._tars.clear()
        self._parts.clear()


def _close(tar: _Tar) -> None:
    if tar.descriptor >= 0:
        os.close(tar.descriptor)


def _read_part(data: bytes, shard: Shard, start: int, salt: int) -> _Part:
    """Return rows `start` to `start + PART_ROWS` of an index file's bytes. `salt` (63 bits) is mixed into the image ids."""
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DataError("its sha256 is not the one that the manifest states")
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
    if unknown := [name for name in set(formats) if name not in TEXT_FORMATS]:
        raise DataError(f"it has captions in the format {unknown[0]!r}")
    return _Part(
        keys, image.data, image_size.data, text.data, text_size.data, image_id.data, first.data, end.data, formats
    )


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise ValueError(f"the shard ends before it ({len(data):,} of {size:,} bytes); it was cut short")
    return data


def _member(data: bytes, size: int) -> bytes:
    """Check a member's header and return the member after it. Raises ValueError where they do not fit the index."""
    header = data[:HEADER]
    stored = header[148:156]
    try:
        # A header's checksum is the sum of its bytes, with eight blanks in the place of the checksum.
        fits = int(stored.split(b"\0", 1)[0], 8) == sum(header) - sum(stored) + 8 * 32
        fits = fits and int(header[124:136].split(b"\0", 1)[0], 8) == size
    except ValueError:
        fits = False
    if not fits:
        raise ValueError("the tar's header there is not the one that the index was made from; the shard was altered")
    return data[HEADER:]


_POWERS_OF_8 = 8 ** np.arange(10, -1, -1)


def _check_headers(headers: list[bytes], sizes: list[int]) -> np.ndarray:
    """Check many headers at once as `_member` does.

    Returns:
        (headers,) bool. It is False as well for a good header that writes its numbers in an unusual way.
    """
    # Size, time and checksum are neighbouring fields. The lower half of Adler-32 is 1 plus the sum of all bytes, modulo 65,521.
    sums = np.array([zlib.adler32(header) & 0xFFFF for header in headers], np.int64)
    fields = np.frombuffer(b"".join([header[124:156] for header in headers]), np.uint8).reshape(-1, 32).astype(np.int64)
    digits = fields - ord("0")
    stored = fields[:, 24:]
    # A tar's checksum counts its own field as eight blanks, and Adler-32 begins at 1.
    expected = digits[:, 24:30] @ _POWERS_OF_8[-6:] + stored.sum(1) - 8 * 32 + 1
    return (sums == expected % 65521) & (digits[:, :11] @ _POWERS_OF_8 == sizes)
