"""The manifest and the indexes of a shard folder: samples, captions, hashes, and where each member lies in its tar.

`manifest.json` is written last, so a folder that has one is complete. Each tar has a parquet index with one row per sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from runtime.errors import DataError
from runtime.files import replaced_file, write_json

if TYPE_CHECKING:
    import numpy as np

MANIFEST_NAME = "manifest.json"
FORMAT, VERSION = "ligature-shards", 1
"""Written into every manifest. A manifest of another version is refused."""
IMAGE_FORMATS, TEXT_FORMATS = ("jpg", "png", "webp"), ("json", "txt")


@dataclass(frozen=True, slots=True)
class Shard:
    """The manifest's entry for one tar of a folder."""

    name: str
    """File name of the tar, without its folder."""
    samples: int
    captions: int
    bytes: int
    """Size of the tar in bytes."""
    sha256: str
    """Hex sha256 of the tar."""
    index: str
    """File name of its member index (parquet)."""
    index_sha256: str
    """Hex sha256 of the index."""


_SHARD_KEYS = tuple(entry.name for entry in fields(Shard))
_SHARD_NUMBERS = ("samples", "captions", "bytes")


def _shard_from_row(row: Sequence[Any]) -> Shard:
    values: list[Any] = [value.decode() if isinstance(value, bytes) else value for value in row]
    return Shard(*values)


class ShardTable(Sequence[Shard]):
    """The shards of a folder, kept in columns and turned into `Shard`s on demand.

    Half a million shards take 100 MB this way, and their numbers are summed at once.
    """

    __slots__ = ("columns",)

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        """Keep the columns.

        Args:
            columns: One array for each field of `Shard`: (shards,) int64, or UTF-8 bytes.
        """
        self.columns = columns

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> ShardTable:
        """Return a table of these shards."""
        return cls.from_rows([astuple(shard) for shard in shards])

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[Any]]) -> ShardTable:
        """Return a table of rows that hold the values of `Shard`, in the order of its fields.

        Raises:
            TypeError: A value has the wrong type.
            ValueError: A number cannot be stored.
        """
        import numpy as np

        columns = {}
        for column, name in enumerate(_SHARD_KEYS):
            if name in _SHARD_NUMBERS:
                columns[name] = np.fromiter((row[column] for row in rows), np.int64, len(rows))
            else:
                columns[name] = np.array([str.encode(row[column]) for row in rows], "S" if rows else "S1")
        return cls(columns)

    def __len__(self) -> int:
        return len(self.columns["samples"])

    def __getitem__(self, number: Any) -> Any:
        """Return a shard for a number, a table for a slice."""
        if isinstance(number, slice):
            return ShardTable({name: column[number] for name, column in self.columns.items()})
        return _shard_from_row([column[number].item() for column in self.columns.values()])

    def __iter__(self) -> Iterator[Shard]:
        # In slices, because all rows at once would take the memory that the columns save.
        for start in range(0, len(self), 1000):
            rows = zip(*(column[start : start + 1000].tolist() for column in self.columns.values()), strict=True)
            yield from map(_shard_from_row, rows)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def total(self, name: str) -> int:
        """Return the sum of a column of numbers."""
        return int(self.columns[name].sum())


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a complete shard folder: its shards in order, their source, and what was left out and why."""

    folder: Path
    shards: Sequence[Shard]
    """Always a `ShardTable`; other sequences are converted."""
    source: dict[str, Any] = field(default_factory=dict)
    """Free description of what the samples are and how they were written. It holds no path of this machine."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of captions or images left out, by reason."""
    ids_are_names: bool = False
    """Image ids are file names. The same name in another folder may be another picture, so several folders never share ids."""

    def __post_init__(self) -> None:
        if not isinstance(self.shards, ShardTable):
            object.__setattr__(self, "shards", ShardTable.of(self.shards))

    @property
    def table(self) -> ShardTable:
        """The shards, as the table that they are kept in."""
        assert isinstance(self.shards, ShardTable)
        return self.shards

    @property
    def samples(self) -> int:
        """Number of samples of all shards."""
        return self.table.total("samples")

    @property
    def captions(self) -> int:
        """Number of captions of all shards."""
        return self.table.total("captions")

    @property
    def bytes(self) -> int:
        """Size of all tars in bytes."""
        return self.table.total("bytes")

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over each shard's name, sample count and sha256. It does not depend on where the folder lies."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.name}\t{shard.samples}\t{shard.sha256}\n".encode())
        return digest.hexdigest()

    def find_damage(self) -> list[str]:
        """Compare names and sizes with the files, and return one phrase for each file that is missing or has another size."""
        phrases = []
        for shard in self.shards:
            tar = self.folder / shard.name
            size = tar.stat().st_size if tar.is_file() else None
            if size is None:
                phrases.append(f"{shard.name} is missing")
            elif size != shard.bytes:
                phrases.append(f"{shard.name} has {size:,} bytes, not {shard.bytes:,}")
            if not (self.folder / shard.index).is_file():
                phrases.append(f"{shard.index} is missing")
        return phrases


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.json` into its folder, atomically. Call this last: a folder with a manifest counts as complete."""
    totals = {"samples": manifest.samples, "captions": manifest.captions, "bytes": manifest.bytes}
    value = {"format": FORMAT, "version": VERSION, **totals, "source": manifest.source, "dropped": manifest.dropped}
    value["ids_are_names"] = manifest.ids_are_names
    value["shards"] = [asdict(shard) for shard in manifest.shards]
    write_json(Path(manifest.folder) / MANIFEST_NAME, value)


def read_manifest(folder: str | Path, check: bool = True) -> Manifest:
    """Read the manifest of a shard folder on a disk.

    Args:
        folder: The shard folder.
        check: Whether every tar must have its promised size, and every index must exist. `inspection.verify` checks hashes.

    Raises:
        DataError: The folder, the manifest or a shard is missing, altered or of another format.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise DataError(f"no shard folder {folder}; make one with `ligature shard`")
    if not path.is_file():
        raise DataError(
            f"{folder} has no {MANIFEST_NAME}; run `ligature shard` again to finish it, "
            "or `ligature inspect --index` for shards made elsewhere"
        )
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    manifest = parse_manifest(text, folder, str(path))
    if check and (damage := manifest.find_damage()):
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise DataError(f"{folder} is damaged: {damage[0]}{more}; run the `ligature shard` command that made it again")
    return manifest


def parse_manifest(text: bytes, folder: Path, name: str) -> Manifest:
    """Parse a manifest.

    Args:
        text: The bytes of `manifest.json`.
        folder: Folder of the shards.
        name: Path or address that the text was read from, for messages.

    Raises:
        DataError: The text is no manifest of this version, or it was altered.
    """
    rows: list[tuple] = []

    # Shards become rows as they are parsed: half a million of them are never half a million dictionaries.
    def collect_row(value: dict[str, Any]) -> Any:
        if len(value) == len(_SHARD_KEYS) and all(key in value for key in _SHARD_KEYS):
            rows.append(tuple(value[key] for key in _SHARD_KEYS))
            return None
        return value

    try:
        value = json.loads(text, object_hook=collect_row)
    except ValueError as error:
        raise DataError(f"{name} is not valid JSON ({error}); it was cut short or altered, write it again") from None
    except RecursionError:
        raise DataError(f"{name} is not a manifest: its JSON is nested too deeply; shard the source again") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DataError(f"{name} is not a manifest of {FORMAT}; run `ligature shard` into an empty folder")
    if value.get("version") != VERSION:
        raise DataError(
            f"{name} has version {value.get('version')}, but this Ligature reads version {VERSION}; shard the source again"
        )
    try:
        # `collect_row` left None for every complete entry.
        if broken := [entry for entry in value["shards"] if entry is not None]:
            raise KeyError(next((key for key in _SHARD_KEYS if key not in broken[0]), "shards"))
        ids_are_names = value.get("ids_are_names", False)  # absent from older manifests
        manifest = Manifest(folder, ShardTable.from_rows(rows), value["source"], value["dropped"], ids_are_names)
        totals = [manifest.samples, manifest.captions, manifest.bytes]
        promised = [value["samples"], value["captions"], value["bytes"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{name} is incomplete or altered ({error}); shard the source again") from None
    if totals != promised:
        raise DataError(f"{name} was altered: its shards sum to {totals}, not to {promised}; shard the source again")
    return manifest


@dataclass(slots=True)
class ShardIndex:
    """Where the members of one tar lie, with one entry per sample. `os.pread(tar, size, offset)` gives a member's bytes."""

    key: list[str]
    """Sample keys."""
    image_offset: np.ndarray
    """(samples,) int64, bytes from the start of the tar to the image's data."""
    image_size: np.ndarray
    """(samples,) int64, bytes."""
    image_format: list[str]
    """jpg, png or webp."""
    text_offset: np.ndarray
    """(samples,) int64, bytes from the start of the tar to the text's data."""
    text_size: np.ndarray
    """(samples,) int64, bytes."""
    text_format: list[str]
    """json (an object with a list `captions`) or txt (one caption)."""
    width: np.ndarray
    """(samples,) int32, pixels as stored, before an EXIF orientation is applied."""
    height: np.ndarray
    """(samples,) int32, pixels as stored."""
    captions: np.ndarray
    """(samples,) int32, number of captions of the sample."""
    image_id: np.ndarray
    """(samples,) int64, 0 or more: `hash_image_id` of the source's image id. Samples with the same number show the same
    picture. Indexes that an older Ligature wrote get the hashes of their keys, which all differ."""

    def __len__(self) -> int:
        return len(self.key)

    @classmethod
    def from_rows(cls, rows: Sequence[tuple], image_ids: Sequence[str] | None = None) -> ShardIndex:
        """Return an index of these samples.

        Args:
            rows: One tuple per sample, with the values of the fields up to `captions` in their order.
            image_ids: The source's own ids of the images. None: each key stands for an image of its own.
        """
        import numpy as np

        image_ids = image_ids if image_ids is not None else [row[0] for row in rows]
        full = [(*row, hash_image_id(image_id)) for row, image_id in zip(rows, image_ids, strict=True)]
        values = list(zip(*full, strict=True)) or [()] * len(_COLUMNS)
        columns: dict[str, Any] = {}
        for (name, kind), column in zip(_COLUMNS.items(), values, strict=True):
            columns[name] = list(column) if kind == "string" else np.array(column, kind)
        return cls(**columns)


def hash_image_id(image_id: str) -> int:
    """Return 63 bits of the BLAKE2b hash of a source's image id, the same in every shard and on every machine."""
    # 63 bits fit into an int64 without a sign.
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "big") >> 1


_COLUMNS = {
    "key": "string", "image_offset": "int64", "image_size": "int64", "image_format": "string",
    "text_offset": "int64", "text_size": "int64", "text_format": "string",
    "width": "int32", "height": "int32", "captions": "int32", "image_id": "int64",
}  # fmt: skip
_NOTE = b"ligature"
"""Key of the note in a parquet file's metadata."""


def write_index(path: Path, index: ShardIndex, note: Mapping[str, Any] | None = None) -> None:
    """Write a shard's index as parquet, atomically. `note` is stored as JSON in the file's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in _COLUMNS.items()])
    values = [getattr(index, name) for name in _COLUMNS]
    arrays = [pa.array(value, type=column.type) for value, column in zip(values, schema, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=schema.with_metadata({_NOTE: json.dumps(note or {}).encode()}))
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    with replaced_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def read_columns(source: Path | BinaryIO, columns: Sequence[str] = (), name: str = "") -> Any:
    """Return columns of a shard's index as an arrow table.

    Args:
        source: The index's path, or an open file.
        columns: Names of the columns; none: all.
        name: What messages call an open file.

    Raises:
        DataError: The index is missing, cut or of another format.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = name or str(source)
    try:
        table = pq.ParquetFile(source).read(columns=list(columns) or None, use_threads=False)
    except FileNotFoundError:
        raise DataError(f"no shard index {name}; run the `ligature shard` command that made the folder again") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name} is not a readable shard index ({reason}); run `ligature shard` again") from None
    missing = [column for column in columns or _COLUMNS if column not in table.column_names]
    if missing and not (missing == ["image_id"] and "key" in table.column_names):
        raise DataError(f"{name} is not a shard index: it has no column {missing[0]!r}; write the folder again")
    if missing:  # written before indexes had image ids
        keys = table.column("key").to_pylist()
        table = table.append_column("image_id", pa.array([hash_image_id(key) for key in keys], pa.int64()))
    return table


def read_index(path: str | Path) -> ShardIndex:
    """Return a shard's whole index. A missing, cut or foreign file is a `DataError` that names it."""
    table = read_columns(Path(path))
    columns = {}
    for name, kind in _COLUMNS.items():
        column = table.column(name)
        # Copied: parquet's buffers are read-only and would keep the whole table alive.
        columns[name] = column.to_pylist() if kind == "string" else column.to_numpy().astype(kind, copy=True)
    return ShardIndex(**columns)


def read_index_note(path: str | Path) -> dict[str, Any]:
    """Return the note that `write_index` put into the file's metadata, {} where there is none."""
    metadata = read_columns(Path(path)).schema.metadata or {}
    return json.loads(metadata.get(_NOTE, b"{}"))
