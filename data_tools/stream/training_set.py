"""What a run trains on: one or several shard folders, filtered and mixed. Items (a sample, maybe one caption of it) by number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from data_tools.config import FilterConfig, ReadConfig
from data_tools.shards.manifest import Manifest
from data_tools.shards.reader import ShardReader
from data_tools.shards.remote import ShardCache, is_remote
from data_tools.stream.mixture import Mixture
from data_tools.stream.order import BLOCK, SampleOrder, derived_seed
from data_tools.stream.selection import Selection, select
from runtime.errors import DataError

Folder = str | Path | Manifest
RUN = 1000
"""Samples of which some, next to each other, are read for a part of all captions."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """One share of a mixture: some folders in a row."""

    name: str
    weight: float
    counts: np.ndarray
    """(shards,) items of each."""
    ends: np.ndarray
    """(shards,) their running sum."""
    first_sample: int
    """Where its samples begin among those of all folders."""
    selections: tuple[Selection, ...]
    """One a folder; none where every sample is an item."""
    first_samples: np.ndarray
    """(shards,) where each shard's samples begin among those of all folders."""

    def __len__(self) -> int:
        return int(self.ends[-1])

    def samples(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) items -> (n,) samples of the reader and (n,) captions, -1 for any."""
        if not self.selections:
            return self.first_sample + items, np.full(len(items), -1)
        shards = np.searchsorted(self.ends, items, side="right")
        rows, captions = np.empty(len(items), np.int64), np.empty(len(items), np.int64)
        start = 0
        for selection in self.selections:
            here = (items >= start) & (items < start + len(selection.items))
            found = selection.items[items[here] - start]
            rows[here], captions[here] = found["row"], found["caption"]
            start += len(selection.items)
        return self.first_samples[shards] + rows, captions


class TrainingSet:
    """The folders of a run, opened. `ShardStream` walks it."""

    def __init__(
        self,
        folders: Folder | Sequence[Folder] | Mapping[str, float],
        captions: Literal["one", "all"] = "one",
        keep: FilterConfig | None = None,
        cache: ShardCache | None = None,
    ) -> None:
        """folders: one; several, read as one; or folder -> weight. Missing shards are no error here: the stream lists what it
        cannot read. Raises DataError where a folder is none, or holds nothing."""
        self.keep, self.every_caption = keep or FilterConfig(), captions == "all"
        several: list[Folder] = [folders] if isinstance(folders, str | Path | Manifest) else list(folders)
        if not several or not str(several[0]):
            raise DataError("there is no folder to train on; set data.train")
        if len({str(folder) for folder in several}) < len(several):
            raise DataError("data.train names a folder twice; give it a larger weight instead")
        self.reader = ShardReader(dict(zip(short_names(several), several, strict=True)), cache, check=False)
        for number, root in enumerate(self.reader.roots):
            if not self.reader.manifests[number].samples:
                raise DataError(f"{root} holds no samples")
        numbers = range(len(several))
        if isinstance(folders, Mapping):
            weights = [float(weight) for weight in folders.values()]
            self.datasets = [self._open([n], self.reader.names[n] or "all", weights[n]) for n in numbers]
        else:
            self.datasets = [self._open(list(numbers), "all", 1.0)]
        self.mixture = Mixture([dataset.weight for dataset in self.datasets])
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        """Items of an epoch: all there are."""
        return sum(map(len, self.datasets))

    @property
    def remote(self) -> bool:
        return any(map(is_remote, self.reader.roots))

    def some_captions(self, limit: int) -> Iterator[str]:
        """About `limit` captions, from runs of samples spread evenly over all folders; all of them where there are no more.
        Captions that cannot be read are left to the stream."""
        samples = len(self.reader)
        wanted = samples * min(1.0, limit / max(1, sum(manifest.captions for manifest in self.reader.manifests)))
        runs = max(1, int(wanted / RUN))
        for run in range(runs):
            start = samples * run // runs
            for sample in range(start, start + int(wanted / runs + 0.5)):
                with suppress(DataError):
                    yield from self.reader.captions(sample)

    def _open(self, folders: list[int], name: str, weight: float) -> Dataset:
        reader = self.reader
        span = slice(reader.shards_of(folders[0]).start, reader.shards_of(folders[-1]).stop)
        counts = reader.counts[span]
        first_samples = reader.first_samples[span]
        selections: tuple[Selection, ...] = ()
        if self.keep.used or self.every_caption:
            home = (reader.cache or ShardCache()).folder
            selections = tuple(select(reader, folder, self.keep, self.every_caption, home) for folder in folders)
            counts = np.concatenate([selection.counts for selection in selections])
        return Dataset(name, weight, counts, np.cumsum(counts), int(first_samples[0]), selections, first_samples)

    def _fingerprint(self) -> str:
        """Hex sha256 of all that decides what an item number means; the folder's own where there is but one, unfiltered."""
        prints = [manifest.fingerprint for manifest in self.reader.manifests]
        plain = not self.keep.used and not self.every_caption
        if plain and len(prints) == 1:
            return prints[0]
        shares = [[dataset.name, dataset.weight] for dataset in self.datasets]
        rule = [prints, shares, self.every_caption, asdict(self.keep)]
        return hashlib.sha256(json.dumps(rule).encode()).hexdigest()


class Walk:
    """The endless order over a training set: position -> sample and caption. Plain arithmetic; any process may hold one."""

    def __init__(self, data: TrainingSet, seed: int, block: int, window: int) -> None:
        self.data, self.seed, self.block, self.window = data, seed, block, window
        several = len(data.datasets) > 1
        self.orders = [
            SampleOrder(dataset.counts, derived_seed(seed, number) if several else seed, block, window)
            for number, dataset in enumerate(data.datasets)
        ]

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) positions -> (n,) samples of the reader and (n,) captions, -1 for any."""
        if len(self.orders) == 1:
            return self.data.datasets[0].samples(self.orders[0].at(positions))
        owners, places = self.data.mixture.at(positions)
        samples, captions = np.empty(len(owners), np.int64), np.empty(len(owners), np.int64)
        for owner in np.unique(owners):
            here = owners == owner
            samples[here], captions[here] = self.data.datasets[owner].samples(self.orders[owner].at(places[here]))
        return samples, captions

    def stand_in(self, position: int, attempt: int) -> tuple[int, int]:
        """The sample and caption that take the place of one that cannot be read: of its own dataset, as random as any."""
        owners, _ = self.data.mixture.at(np.array([position]))
        dataset = self.data.datasets[int(owners[0])]
        samples, captions = dataset.samples(np.array([derived_seed(self.seed, position, attempt) % len(dataset)]))
        return int(samples[0]), int(captions[0])


def open_training_set(config: ReadConfig) -> TrainingSet:
    """The training set that a recipe's `data` describes."""
    cache = ShardCache(config.cache.folder, config.cache.gigabytes, config.cache.stage)
    return TrainingSet(config.train, config.captions, config.filter, cache)


def default_block(data: TrainingSet) -> int:
    return 0 if data.remote else BLOCK


def short_names(folders: Sequence[Folder]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart; one alone needs no name."""
    if len(folders) == 1:
        return [""]
    parts = [PurePosixPath(str(one.folder if isinstance(one, Manifest) else one).rstrip("/")).parts for one in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
