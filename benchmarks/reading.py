"""Reading alone, nothing decoded: the shipped order and reader against the webdataset library, on the same tars from the page cache.

`python -m benchmarks.reading SHARDS` (any shard folder; without one, noise is written). One process, both ways
warmed by a whole pass first. Prints each ratio beside its aim, and exits 1 where one falls short.
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
"""Seconds to the first batch at the end of a large epoch."""
BATCH = 64


def write_folder(folder: Path, shards: int, samples: int, size: int) -> None:
    """Shards whose images are noise of about `size` bytes: what is in them makes no difference to reading."""
    random = np.random.default_rng(0)
    entries = []
    for number in range(shards):
        path, rows = folder / f"shard-{number:06d}.tar", []
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for row in range(samples):
                key, places = f"{number:04d}{row:05d}", []
                text = b'{"captions": ["a caption of some ten words or so, as usual"]}'
                for extension, data in (("jpg", random.bytes(int(size * random.uniform(0.6, 1.4)))), ("json", text)):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    places += [tar.offset + tarfile.BLOCKSIZE, len(data)]
                    tar.addfile(member, io.BytesIO(data))
                rows.append((key, *places[:2], "jpg", *places[2:], "json", 224, 224, 1))
        index = path.with_suffix(".parquet")
        write_index(index, ShardIndex.from_rows(rows))
        sizes = samples, samples, path.stat().st_size
        entries.append(Shard(path.name, *sizes, sha256_of(path), index.name, sha256_of(index)))
    write_manifest(Manifest(folder, entries))


def ours(folder: Path, shuffled: bool) -> Iterator[tuple]:
    """Key, image and captions of each sample of an epoch, in batches' order: what a loader's worker does before it decodes."""
    data = TrainingSet(str(folder))
    walk = Walk(data, 0, 1024, 65536) if shuffled else None
    for start in range(0, len(data), BATCH):
        positions = np.arange(start, min(start + BATCH, len(data)))
        samples = walk.at(positions)[0] if walk else positions
        for sample in data.reader.read(samples):
            yield sample.key, sample.image, sample.text
    data.reader.close()


def theirs(folder: Path, shuffled: bool) -> Iterator[tuple]:
    """The library's own pipeline, undecoded, with a shuffle buffer of 1,000 samples where shuffled."""
    tars = [str(folder / shard.name) for shard in read_manifest(folder).shards]
    dataset = webdataset.WebDataset(tars, shardshuffle=100 if shuffled else False, seed=0, empty_check=False)
    for sample in dataset.shuffle(1000) if shuffled else dataset:
        yield sample["__key__"], next(sample[kind] for kind in ("jpg", "png", "webp") if kind in sample), sample["json"]


def rate(
    read: Callable[[Path, bool], Iterator[tuple]], folder: Path, shuffled: bool, seconds: float
) -> tuple[float, int]:
    """-> samples a second of this process's own time, other work on the machine left out; and how many keys were seen."""
    keys, count, began = set(), 0, time.process_time()
    while time.process_time() - began < seconds:
        for key, image, text in read(folder, shuffled):
            keys.add(key)
            count += bool(image and text)
    return count / (time.process_time() - began), len(keys)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a shard folder; left out: noise of 12 kB an image")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each way")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--samples", type=int, default=1000, help="of each shard of noise")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if options.folder is None:
            write_folder(folder, options.shards, options.samples, 12_000)
        manifest, told = read_manifest(folder), Ratios()
        mean = manifest.bytes / manifest.samples
        print(f"{manifest.samples:,} samples of {mean / 1000:.1f} kB in {len(manifest.shards)} shards, one process")
        for shuffled in (False, True):
            rates = {}
            for name, read in (("ligature", ours), ("webdataset", theirs)):
                read_once = sum(1 for _ in read(folder, shuffled))  # from here on from the page cache
                rates[name], seen = rate(read, folder, shuffled, options.seconds)
                assert read_once == seen == manifest.samples, f"{name} saw {seen} of {manifest.samples} samples"
            how = "shuffled" if shuffled else "in order"
            print(f"{how}: ligature {rates['ligature']:,.0f}/s, webdataset {rates['webdataset']:,.0f}/s")
            told.record(f"{how}: ligature / webdataset", rates["ligature"] / rates["webdataset"], at_least=AIM)
        resume_at_the_end(folder, told)
        print(f"the disk's own: {copy_rate(folder, manifest, options.seconds) / mean:,.0f} samples/s by pread alone")
    return told.close()


def resume_at_the_end(folder: Path, told: Ratios) -> None:
    """From nothing to the first batch at the end of the 1,000th epoch: webdataset would read all that comes before it."""
    began = time.process_time()
    data = TrainingSet(str(folder))
    walk = Walk(data, 0, 1024, 65536)
    samples, _ = walk.at(np.arange(1000 * len(data) - BATCH, 1000 * len(data)))
    read = data.reader.read(samples)
    taken = time.process_time() - began
    assert all(isinstance(sample, RawSample) for sample in read)
    told.record("opened, and the last batch of epoch 1,000 read, s", taken, at_most=RESUME_AIM)


def copy_rate(folder: Path, manifest: Manifest, seconds: float) -> float:
    """Bytes a second that one process gets out of the page cache in pieces of a sample's size."""
    piece, read, began = manifest.bytes // manifest.samples, 0, time.process_time()
    descriptors = [os.open(folder / shard.name, os.O_RDONLY) for shard in manifest.shards]
    places = itertools.cycle(
        (descriptor, at)
        for descriptor, shard in zip(descriptors, manifest.shards, strict=True)
        for at in range(0, shard.bytes - piece, piece)
    )
    while time.process_time() - began < seconds / 5:
        for descriptor, at in itertools.islice(places, 1000):
            read += len(os.pread(descriptor, piece, at))
    rate = read / (time.process_time() - began)
    for descriptor in descriptors:
        os.close(descriptor)
    return rate


if __name__ == "__main__":
    sys.exit(main())
