"""The training set of a run: one or several shard folders, filtered and mixed.

Its items have numbers. An item is a sample, or one caption of a sample.
"""

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
from data_tools.stream.caption_sentences import Reading
from data_tools.stream.mixture import Mixture
from data_tools.stream.order import BLOCK, SampleOrder, derived_seed
from data_tools.stream.selection import Selection, select
from runtime.errors import DataError

Folder = str | Path | Manifest
RUN = 1000
"""Neighbouring samples that are read together when only a part of all captions is needed."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """One share of a mixture: one or several folders, read in sequence."""

    name: str
    weight: float
    """Its share relative to the other datasets' weights."""
    counts: np.ndarray
    """(shards,) items of each shard."""
    ends: np.ndarray
    """(shards,) the running sum of `counts`."""
    first_sample: int
    """Number of its first sample among those of all folders."""
    selections: tuple[Selection, ...]
    """One per folder; none where every sample is an item."""
    first_samples: np.ndarray
    """(shards,) number of each shard's first sample among those of all folders."""

    def __len__(self) -> int:
        return int(self.ends[-1])

    def samples(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of (n,) items: (n,) numbers in the reader, and (n,) caption numbers, -1 for any."""
        if not self.selections:
            return self.first_sample + items, np.full(len(items), -1)
        shards = np.searchsorted(self.ends, items, side="right")
        rows, captions = np.empty(len(items), np.int64), np.empty(len(items), np.int64)
        start = 0
        for selection in self.selections:
            here = (items >= start) & (items < start + len(selection.items))
            selected = selection.items[items[here] - start]
            rows[here], captions[here] = selected["row"], selected["caption"]
            start += len(selection.items)
        return self.first_samples[shards] + rows, captions


class TrainingSet:
    """The opened folders of a run, through which a `ShardStream` walks."""

    def __init__(
        self,
        folders: Folder | Sequence[Folder] | Mapping[str, float],
        captions: Literal["one", "all"] = "one",
        keep: FilterConfig | None = None,
        cache: ShardCache | None = None,
        sentences: Reading = "all",
    ) -> None:
        """Open the folders. Missing shards raise no error here, because the stream lists what it cannot read.

        Args:
            folders: One folder; several, read as one; or folder -> weight.
            captions: `one`: an item is a sample; `all`: an item is one caption of a sample.
            keep: Which samples and captions to use; None: all.
            cache: Where remote shards are kept; None: the default cache.
            sentences: What an example reads of a caption (`data_tools/stream/caption_sentences.py`).

        Raises:
            DataError: A folder is not a shard folder, holds no samples, or is named twice.
        """
        self.keep, self.every_caption, self.sentences = keep or FilterConfig(), captions == "all", sentences
        folder_list: list[Folder] = [folders] if isinstance(folders, str | Path | Manifest) else list(folders)
        if not folder_list or not str(folder_list[0]):
            raise DataError("there is no folder to train on; set data.train")
        if len({str(folder) for folder in folder_list}) < len(folder_list):
            raise DataError("data.train names a folder twice; name it once, with a larger weight")
        self.reader = ShardReader(dict(zip(short_names(folder_list), folder_list, strict=True)), cache, check=False)
        for number, root in enumerate(self.reader.roots):
            if not self.reader.manifests[number].samples:
                raise DataError(f"{root} holds no samples")
        numbers = range(len(folder_list))
        if isinstance(folders, Mapping):
            weights = [float(weight) for weight in folders.values()]
            self.datasets = [self._open([n], self.reader.names[n] or "all", weights[n]) for n in numbers]
        else:
            self.datasets = [self._open(list(numbers), "all", 1.0)]
        self.mixture = Mixture([dataset.weight for dataset in self.datasets])
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        """Return the number of items in an epoch."""
        return sum(map(len, self.datasets))

    @property
    def remote(self) -> bool:
        """Whether any folder is remote."""
        return any(map(is_remote, self.reader.roots))

    def some_captions(self, limit: int) -> Iterator[str]:
        """Yield about `limit` captions, from runs of neighbouring samples spread evenly over all folders.

        If there are fewer, all of them are yielded. Unreadable ones are skipped, because the stream reports them.
        """
        samples = len(self.reader)
        needed = samples * min(1.0, limit / max(1, sum(manifest.captions for manifest in self.reader.manifests)))
        runs = max(1, int(needed / RUN))
        for run in range(runs):
            start = samples * run // runs
            for sample in range(start, start + int(needed / runs + 0.5)):
                with suppress(DataError):
                    yield from self.reader.captions(sample)

    def _open(self, folders: list[int], name: str, weight: float) -> Dataset:
        reader = self.reader
        span = slice(reader.shards_of(folders[0]).start, reader.shards_of(folders[-1]).stop)
        counts = reader.counts[span]
        first_samples = reader.first_samples[span]
        selections: tuple[Selection, ...] = ()
        if self.keep.used or self.every_caption:
            cache = (reader.cache or ShardCache()).folder
            selections = tuple(select(reader, folder, self.keep, self.every_caption, cache) for folder in folders)
            counts = np.concatenate([selection.counts for selection in selections])
        return Dataset(name, weight, counts, np.cumsum(counts), int(first_samples[0]), selections, first_samples)

    def _fingerprint(self) -> str:
        """Return a hex sha256 of everything that decides what an item number means.

        A single unfiltered folder keeps its own fingerprint.
        """
        fingerprints = [manifest.fingerprint for manifest in self.reader.manifests]
        plain = not self.keep.used and not self.every_caption
        if plain and len(fingerprints) == 1:
            return fingerprints[0]
        shares = [[dataset.name, dataset.weight] for dataset in self.datasets]
        rule = [fingerprints, shares, self.every_caption, asdict(self.keep)]
        return hashlib.sha256(json.dumps(rule).encode()).hexdigest()


class Walk:
    """The endless order over a training set: position -> sample and caption. It is plain arithmetic, for any process."""

    def __init__(self, data: TrainingSet, seed: int, block: int, window: int) -> None:
        self.data, self.seed, self.block, self.window = data, seed, block, window
        several = len(data.datasets) > 1
        self.orders = [
            SampleOrder(dataset.counts, derived_seed(seed, number) if several else seed, block, window)
            for number, dataset in enumerate(data.datasets)
        ]

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples at (n,) positions: (n,) numbers in the reader, and (n,) caption numbers, -1 for any."""
        if len(self.orders) == 1:
            return self.data.datasets[0].samples(self.orders[0].at(positions))
        owners, own_positions = self.data.mixture.at(positions)
        samples, captions = np.empty(len(owners), np.int64), np.empty(len(owners), np.int64)
        for owner in np.unique(owners):
            here = owners == owner
            samples[here], captions[here] = self.data.datasets[owner].samples(
                self.orders[owner].at(own_positions[here])
            )
        return samples, captions

    def stand_in(self, position: int, attempt: int) -> tuple[int, int]:
        """Return the sample and caption that replace an unreadable one: a random item of the same dataset."""
        owners, _ = self.data.mixture.at(np.array([position]))
        dataset = self.data.datasets[int(owners[0])]
        samples, captions = dataset.samples(np.array([derived_seed(self.seed, position, attempt) % len(dataset)]))
        return int(samples[0]), int(captions[0])


def open_training_set(config: ReadConfig) -> TrainingSet:
    """Open the training set that a recipe's `data` describes."""
    cache = ShardCache(config.cache.folder, config.cache.gigabytes, config.cache.stage)
    return TrainingSet(config.train, config.captions, config.filter, cache, config.sentences)


def default_block(data: TrainingSet) -> int:
    """Return the default block size: whole shards (0) where a folder is remote, so that an epoch fetches each once."""
    return 0 if data.remote else BLOCK


def short_names(folders: Sequence[Folder]) -> list[str]:
    """Return the shortest ends of the paths that tell the folders apart; a single folder needs no name."""
    if len(folders) == 1:
        return [""]
    paths = [str(folder.folder if isinstance(folder, Manifest) else folder) for folder in folders]
    parts = [PurePosixPath(path.rstrip("/")).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
