"""Reading without decoding: the product's order and reader against the webdataset library, on the same tars in the page cache.

    python -m benchmarks.reading [SHARDS]

SHARDS is any shard folder; without one, shards of noise are written. One process; each side reads everything once to warm up.
The benchmark prints each ratio beside its aim, and exits with 1 where one falls short.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import webdataset

from benchmarks.ratios import Ratios
from data_tools.shards.manifest import Manifest, Shard, ShardIndex, read_manifest, write_index, write_manifest
from data_tools.shards.reader import RawSample
from data_tools.stream.training_set import TrainingSet, Walk
from runtime.files import sha256_of

AIM = 20.0
RESUME_AIM = 1.0
"""Seconds to the first batch at the end of a late epoch."""
BATCH = 64


def write_folder(folder: Path, shards: int, samples: int, size: int) -> None:
    """Write shards whose images are noise of about `size` bytes. What is in them makes no difference to reading."""
    random = np.random.default_rng(0)
    entries = []
    for number in range(shards):
        path, rows = folder / f"shard-{number:06d}.tar", []
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for row in range(samples):
                key, extents = f"{number:04d}{row:05d}", []
                text = b'{"captions": ["a caption of some ten words or so, as usual"]}'
                for extension, data in (("jpg", random.bytes(int(size * random.uniform(0.6, 1.4)))), ("json", text)):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    extents += [tar.offset + tarfile.BLOCKSIZE, len(data)]
                    tar.addfile(member, io.BytesIO(data))
                rows.append((key, *extents[:2], "jpg", *extents[2:], "json", 224, 224, 1))
        index = path.with_suffix(".parquet")
        write_index(index, ShardIndex.from_rows(rows))
        counts = samples, samples, path.stat().st_size  # samples, captions, bytes
        entries.append(Shard(path.name, *counts, sha256_of(path), index.name, sha256_of(index)))
    write_manifest(Manifest(folder, entries))


def read_ligature(folder: Path, shuffled: bool) -> Iterator[tuple]:
    """Yield key, image and captions of each sample of an epoch, in batches: what a loader's worker does before it decodes."""
    data = TrainingSet(str(folder))
    walk = Walk(data, 0, 1024, 65536) if shuffled else None
    for start in range(0, len(data), BATCH):
        positions = np.arange(start, min(start + BATCH, len(data)))
        samples = walk.at(positions)[0] if walk else positions
        for sample in data.reader.read(samples):
            yield sample.key, sample.image, sample.text
    data.reader.close()


def read_webdataset(folder: Path, shuffled: bool) -> Iterator[tuple]:
    """Yield the same by the library's own pipeline, with a shuffle buffer of 1,000 samples where shuffled."""
    tars = [str(folder / shard.name) for shard in read_manifest(folder).shards]
    dataset = webdataset.WebDataset(tars, shardshuffle=100 if shuffled else False, seed=0, empty_check=False)
    for sample in dataset.shuffle(1000) if shuffled else dataset:
        yield sample["__key__"], next(sample[kind] for kind in ("jpg", "png", "webp") if kind in sample), sample["json"]


def rate(
    read: Callable[[Path, bool], Iterator[tuple]], folder: Path, shuffled: bool, seconds: float
) -> tuple[float, int]:
    """Return samples a second of this process's own time, and the number of different keys read."""
    keys, count, start = set(), 0, time.process_time()
    while time.process_time() - start < seconds:
        for key, image, text in read(folder, shuffled):
            keys.add(key)
            count += bool(image and text)
    return count / (time.process_time() - start), len(keys)


def main(arguments: list[str] | None = None) -> int:
    """Measure both sides; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, help="a shard folder (default: shards of noise, 12 kB an image)"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="seconds of reading for each side and order (default 5)"
    )
    parser.add_argument("--shards", type=int, default=6, help="shards of noise (default 6)")
    parser.add_argument("--samples", type=int, default=1000, help="samples of each shard of noise (default 1000)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if options.folder is None:
            write_folder(folder, options.shards, options.samples, 12_000)
        manifest, ratios = read_manifest(folder), Ratios()
        mean = manifest.bytes / manifest.samples
        print(f"{manifest.samples:,} samples of {mean / 1000:.1f} kB in {len(manifest.shards)} shards, one process")
        for shuffled in (False, True):
            rates = {}
            for name, read in (("ligature", read_ligature), ("webdataset", read_webdataset)):
                read_once = sum(1 for _ in read(folder, shuffled))  # fills the page cache
                rates[name], keys = rate(read, folder, shuffled, options.seconds)
                assert read_once == keys == manifest.samples, f"{name} read {keys} of {manifest.samples} samples"
            order = "shuffled" if shuffled else "in order"
            print(f"{order}: ligature {rates['ligature']:,.0f}/s, webdataset {rates['webdataset']:,.0f}/s")
            ratios.record(f"{order}: ligature / webdataset", rates["ligature"] / rates["webdataset"], at_least=AIM)
        resume_at_the_end(folder, ratios)
        print(f"the disk's own: {copy_rate(folder, manifest, options.seconds) / mean:,.0f} samples/s by pread alone")
    return ratios.close()


def resume_at_the_end(folder: Path, ratios: Ratios) -> None:
    """Record the seconds from nothing to the last batch of the 1,000th epoch; webdataset would read all that comes before it."""
    start = time.process_time()
    data = TrainingSet(str(folder))
    walk = Walk(data, 0, 1024, 65536)
    samples, _ = walk.at(np.arange(1000 * len(data) - BATCH, 1000 * len(data)))
    read = data.reader.read(samples)
    elapsed = time.process_time() - start
    assert all(isinstance(sample, RawSample) for sample in read)
    ratios.record("opened, and the last batch of epoch 1,000 read, s", elapsed, at_most=RESUME_AIM)


def copy_rate(folder: Path, manifest: Manifest, seconds: float) -> float:
    """Return the bytes a second that one process copies from the page cache, in pieces of a sample's size."""
    piece, read, start = manifest.bytes // manifest.samples, 0, time.process_time()
    descriptors = [os.open(folder / shard.name, os.O_RDONLY) for shard in manifest.shards]
    pieces = itertools.cycle(
        (descriptor, offset)
        for descriptor, shard in zip(descriptors, manifest.shards, strict=True)
        for offset in range(0, shard.bytes - piece, piece)
    )
    while time.process_time() - start < seconds / 5:
        for descriptor, offset in itertools.islice(pieces, 1000):
            read += len(os.pread(descriptor, piece, offset))
    rate = read / (time.process_time() - start)
    for descriptor in descriptors:
        os.close(descriptor)
    return rate


if __name__ == "__main__":
    sys.exit(main())
