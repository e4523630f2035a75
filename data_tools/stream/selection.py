"""Which samples and captions of a folder a run uses: an index derived from the folder's own, written once beside it.

`selections/<hash of rule and folder>/` holds `counts.npy` and `items.bin`: the number of items of each shard, and the row and
caption of each item. The items are mapped into memory, so a run starts as fast as without a filter.
Tested in tests/data_tools/stream/test_training_set.py.
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
ONE_PROCESS = 50_000
"""Largest number of samples that one process filters alone. More are spread over several processes."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The items of one folder: samples, or captions of samples."""

    counts: np.ndarray
    """(shards,) items of each shard."""
    items: np.ndarray
    """(items,) of ITEM, shard by shard. Caption -1 stands for any caption that the filter allows."""


def select(reader: ShardReader, folder: int, rule: FilterConfig, every_caption: bool, cache: Path) -> Selection:
    """Read the selection of a folder by a rule, or make it if it does not exist yet.

    A new selection is written into the folder, or into the cache where the folder is remote or cannot be written.

    Args:
        reader: The reader of all folders of the run.
        folder: The folder's number in the reader.
        rule: Which samples and captions to keep.
        every_caption: Whether each caption is an item; if not, each sample is one.
        cache: Folder of the node's cache.

    Raises:
        DataError: Nothing is left, or the selection cannot be written or read.
    """
    about = {"version": VERSION, "fingerprint": reader.manifests[folder].fingerprint, **asdict(rule)}
    about["every_caption"] = every_caption
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    parents = [cache / "selections"]
    if not is_remote(reader.roots[folder]):
        parents.insert(0, Path(reader.roots[folder]) / "selections")
    path = next((parent / digest for parent in parents if (parent / digest).is_dir()), None)
    if path is None:
        parent = _first_writable(parents)
        with open(parent / f".{digest}.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of the node wait for the first
            path = parent / digest
            # Another process may have made it while this one waited for the lock.
            if not path.is_dir():
                _write(path, reader, folder, rule, every_caption, about)
    counts = np.load(path / "counts.npy")
    total = int(counts.sum())
    if not total:
        raise DataError(f"the filter leaves nothing of {reader.roots[folder]}; loosen data.filter")
    if (path / "items.bin").stat().st_size != total * ITEM.itemsize:
        raise DataError(f"{path} was cut short; remove that folder, and it is made again")
    return Selection(counts, np.memmap(path / "items.bin", ITEM, "r", shape=(total,)))


def _first_writable(folders: list[Path]) -> Path:
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise DataError(
        f"cannot write the filter's index into {folders[0]}; set data.cache.folder to a folder that can be written"
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
        # mkdtemp's folder is its owner's alone, but others who may read the shards need it too.
        temporary.chmod(0o755)
        try:
            os.rename(temporary, path)
        except OSError:
            # Another node may have been faster, and its selection is the same.
            if not path.is_dir():
                raise
    except OSError as error:
        raise DataError(f"cannot write the filter's index {path}: {error.strerror}; free some space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _over_processes(reader: ShardReader, jobs: list[tuple], samples: int) -> Iterator[np.ndarray]:
    global _reader
    _reader = reader
    processes = min(len(os.sched_getaffinity(0)), len(jobs))
    if samples <= ONE_PROCESS or processes == 1:
        yield from map(_select_shard, jobs)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(_select_shard, jobs, chunksize=4)


_reader: ShardReader
"""What forked processes read from. It is global so that they inherit it instead of receiving a copy."""


def _select_shard(job: tuple[int, FilterConfig, bool]) -> np.ndarray:
    """Return a shard's items, (items,) of ITEM. Samples with unreadable captions stay, so that the stream lists them."""
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
