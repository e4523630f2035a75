"""Which samples and captions of a folder a run uses: an index derived from the folder's own, written once beside it.

`selections/<hash of rule and folder>/` holds `counts.npy`, how many items each shard gives, and `items.bin`, the row and (where
every caption is an item) the caption of each. Both are mapped into memory, so a run starts as fast as without a filter.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_tools.config import FilterConfig
from data_tools.shards.reader import ShardReader
from data_tools.shards.remote import is_remote
from runtime.errors import DataError
from runtime.files import sync_file, write_json
from runtime.progress import progress

ITEM = np.dtype([("row", "<i4"), ("caption", "<i2")])
VERSION = 1
ALONE = 50_000
"""Samples up to which one process does it all."""


@dataclass(frozen=True, slots=True)
class Selection:
    counts: np.ndarray
    """(shards,) items of each."""
    items: np.ndarray
    """(items,) of ITEM, shard by shard; caption -1: any of those that the filter allows."""


def select(reader: ShardReader, folder: int, rule: FilterConfig, every_caption: bool, cache: Path) -> Selection:
    """The selection of a folder by a rule: read where it exists, else made and written into the folder, or, where that is
    remote or cannot be written, into `cache`. Raises DataError where nothing is left."""
    wanted = {"version": VERSION, "fingerprint": reader.manifests[folder].fingerprint, **asdict(rule)}
    wanted["every_caption"] = every_caption
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    homes = [cache / "selections"]
    if not is_remote(reader.roots[folder]):
        homes.insert(0, Path(reader.roots[folder]) / "selections")
    found = next((home / digest for home in homes if (home / digest).is_dir()), None)
    if found is None:
        home = _writable(homes)
        with open(home / f".{digest}.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of the node wait for the first
            found = home / digest
            if not found.is_dir():
                _write(found, reader, folder, rule, every_caption, wanted)
    counts = np.load(found / "counts.npy")
    total = int(counts.sum())
    if not total:
        raise DataError(f"the filter leaves nothing of {reader.roots[folder]}; loosen data.filter")
    if (found / "items.bin").stat().st_size != total * ITEM.itemsize:
        raise DataError(f"{found} was cut short; remove that folder, it is made again")
    return Selection(counts, np.memmap(found / "items.bin", ITEM, "r", shape=(total,)))


def _writable(homes: list[Path]) -> Path:
    for home in homes:
        with suppress(OSError):
            home.mkdir(parents=True, exist_ok=True)
            if os.access(home, os.W_OK):
                return home
    raise DataError(
        f"cannot write the filter's index into {homes[0]}; set data.cache.folder to a folder that can be written"
    )


def _write(path: Path, reader: ShardReader, folder: int, rule: FilterConfig, every_caption: bool, about: dict) -> None:
    shards = reader.shards_of(folder)
    samples = reader.manifests[folder].samples
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    counts = []
    try:
        with open(temporary / "items.bin", "wb") as file, progress("filtering", samples, "samples") as bar:
            jobs = [(shard, rule, every_caption) for shard in range(shards.start, shards.stop)]
            for (shard, *_), items in zip(jobs, _over_processes(reader, jobs, samples), strict=True):
                items.tofile(file)
                counts.append(len(items))
                bar.advance(int(reader.counts[shard]))
        np.save(temporary / "counts.npy", np.array(counts, np.int64))
        write_json(temporary / "about.json", {**about, "items": sum(counts), "of_samples": samples})
        for name in ("items.bin", "counts.npy"):
            sync_file(temporary / name)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():  # else another node was faster
                raise
    except OSError as error:
        raise DataError(f"cannot write the filter's index {path}: {error.strerror}; free some space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _over_processes(reader: ShardReader, jobs: list[tuple], samples: int) -> Iterator[np.ndarray]:
    global _reader
    _reader = reader
    processes = min(len(os.sched_getaffinity(0)), len(jobs))
    if samples <= ALONE or processes == 1:
        yield from map(_select_shard, jobs)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(_select_shard, jobs, chunksize=4)


_reader: ShardReader
"""What forked processes read from."""


def _select_shard(job: tuple[int, FilterConfig, bool]) -> np.ndarray:
    """-> (items,) of ITEM. A sample whose captions cannot be read stays: the stream finds it, and lists it."""
    shard, rule, every_caption = job
    index = _reader.columns(shard, ("width", "height", "captions"))
    width, height = index.column("width").to_numpy(), index.column("height").to_numpy()
    captions = index.column("captions").to_numpy()
    short, long = np.minimum(width, height), np.maximum(width, height)
    kept = short >= rule.min_side
    if rule.max_aspect is not None:
        kept &= long <= rule.max_aspect * short
    items: list[tuple[int, int]] = []
    first = int(_reader.first_samples[shard])
    for row in np.flatnonzero(kept).tolist():
        allowed: Sequence[int] = range(int(captions[row]))
        if rule.counts_words:
            try:
                allowed = [n for n, words in enumerate(_reader.captions(first + row)) if rule.allows(words)]
            except DataError:
                allowed = range(1)
        if every_caption:
            items += [(row, number) for number in allowed]
        elif allowed:
            items.append((row, -1))
    return np.array(items, ITEM)
