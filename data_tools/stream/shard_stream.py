"""ShardStream: a shard folder as an endless, shuffled, exactly resumable sequence of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.config import ReadConfig
from data_tools.stream.examples import ExampleReader, Preparation, collate_examples
from data_tools.stream.order import WINDOW
from data_tools.stream.quarantine import Quarantine, sample_id
from data_tools.stream.training_set import Folder, TrainingSet, Walk, default_block
from data_tools.tokenizer import CaptionTokenizer
from data_tools.workers import open_loader, raise_errors
from runtime.errors import DataError
from runtime.ranks import Ranks

CURSOR_VERSION = 2
"""Version of the order that a cursor belongs to. A change of the order raises it."""


class ShardStream:
    """The endless batches of one rank. Every rank has the same number of batches, whatever the shards.

    A batch is a dictionary:

    - `keys`: the sample keys.
    - `positions`, `image_ids`: (batch,) int64. Samples with the same image id show the same picture.
    - `captions`: the texts.
    - `images`: (views, batch, 3, size, size) uint8; a list of PIL images without a transform; `PackedImages` where the
      device augments them. `render_views` turns the first and the last into views.
    - With a tokenizer, `ids` (batch, words) int64 and `mask` (batch, words) bool.

    The cursor counts the samples that all ranks have consumed. `state_dict()` may be taken after any batch, prefetching
    workers or not. It may be loaded with another world size, number of workers or batch size.
    """

    def __init__(
        self,
        folder: Folder | Sequence[Folder] | Mapping[str, float] | TrainingSet,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        seed: int = 0,
        transform: Callable | None = None,
        tokenizer: CaptionTokenizer | None = None,
        quarantine: Path | None = None,
        max_bad_share: float = 0.01,
        block: int | None = None,
        window: int = WINDOW,
        pinned: bool = False,
    ) -> None:
        """Open a stream at the beginning of its order.

        Args:
            folder: A shard folder, several read as one, folder -> weight, or a `TrainingSet` (filters, all captions, a
                cache).
            batch_size: Samples per rank and training step.
            rank: This rank's number.
            world_size: Number of ranks.
            workers: Loader processes; 0 decodes in this process.
            seed: Decides the order, the views and the choice of captions.
            transform: (pixels (height, width, 3) uint8, seed) -> (views, 3, size, size) uint8; None keeps PIL images.
            tokenizer: Turns captions into token ids; None leaves them as text.
            quarantine: A file that lists each unreadable sample once, shared by all ranks.
            max_bad_share: Iterating raises `DataError` when a larger share of the samples cannot be read.
            block: Samples of a shard that stay together, see `SampleOrder`; None: that of a loaded cursor, or else the
                default.
            window: Samples that are shuffled among themselves, see `SampleOrder`.
            pinned: Whether batches lie in memory that a GPU copies from while the host goes on.

        Raises:
            ValueError: The batch size is below 1, or the rank is not one of the world's.
            DataError: The folder cannot be opened, or holds nothing.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; with world_size {world_size} it must be 0 or more and less than that")
        self.data = folder if isinstance(folder, TrainingSet) else TrainingSet(folder)
        self.reader = self.data.reader
        self.reader.read_ahead = True
        self.batch_size, self.rank, self.world_size, self.workers = batch_size, rank, world_size, workers
        self.quarantine, self.max_bad_share = Quarantine(quarantine) if quarantine else None, max_bad_share
        self._block, self._pinned = block, pinned
        walk = Walk(self.data, seed, default_block(self.data) if block is None else block, window)
        self.examples = ExampleReader(walk, Preparation(transform, tokenizer))
        self.consumed = 0
        """Samples that all ranks have consumed: the cursor."""
        self.bad: set[str] = set()
        """Samples that could not be read, as `shard/key`."""
        self._iteration = 0

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return len(self.data)

    @property
    def epoch(self) -> float:
        """Epochs consumed, with fraction."""
        return self.consumed / len(self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield batches from the cursor on.

        There is one cursor. An iterator raises RuntimeError once another has begun or a state was loaded.
        """
        self._iteration += 1
        return self._batches(self._iteration)

    def _batches(self, iteration: int) -> Iterator[dict[str, Any]]:
        # Set before workers are forked, so that they pass over the samples that are known to be bad.
        self.examples.bad = frozenset(self.bad)
        # The order has no end, so 2^62 only stands for never.
        starts = range(self.consumed + self.rank * self.batch_size, 1 << 62, self.batch_size * self.world_size)
        # Fill the order's caches before workers are forked, so that they share them.
        self.examples.walk.at(np.arange(starts[0], starts[0] + self.batch_size))
        loader = open_loader(
            self.examples,
            partial(collate_examples, length=tokenizer.length if (tokenizer := self.examples.tokenizer) else None),
            self.workers,
            batch_sampler=(list(range(start, start + self.batch_size)) for start in starts),
            # torch refuses this option where there are no workers.
            prefetch_factor=2 if self.workers else None,
            pin_memory=self._pinned,
        )
        for batch in raise_errors(loader):
            if iteration != self._iteration:
                raise RuntimeError("the stream's cursor has moved under this iterator; take a new one")
            self._record_failures(batch.pop("failures"))
            # Counted before the yield, so that a cursor taken while the caller trains on the batch includes it.
            self.consumed += self.batch_size * self.world_size
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor as a JSON value.

        It holds the samples consumed by all ranks, in all and per dataset. It also holds what the order is a function of
        (fingerprint, seed, block, window), and the samples known to be bad.
        """
        walk, counts = self.examples.walk, self.data.mixture.counts(self.consumed).tolist()
        return {
            "version": CURSOR_VERSION,
            "samples": self.consumed,
            "datasets": {dataset.name: count for dataset, count in zip(self.data.datasets, counts, strict=True)},
            "fingerprint": self.data.fingerprint,
            "seed": walk.seed,
            "block": walk.block,
            "window": walk.window,
            "bad": sorted(self.bad),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a cursor.

        Raises:
            DataError: The cursor belongs to other data or to another order.
        """
        if state.get("version") != CURSOR_VERSION:
            raise DataError(
                f"this run's cursor has version {state.get('version', 1)}, but this Ligature walks the data in the order of "
                f"version {CURSOR_VERSION}; go on with the version that began the run, or begin it anew under another --name"
            )
        if state["fingerprint"] != self.data.fingerprint:
            raise DataError(
                f"{self.reader.location} is not the data this run was reading (its manifest, filter, captions or weights differ); "
                "set `data` back to what it was"
            )
        walk = self.examples.walk
        # A block that the recipe leaves open is the cursor's, so a run may move from a bucket to a copy on a disk.
        block = state["block"] if self._block is None else walk.block
        for name, before, now, key in (
            ("seed", state["seed"], walk.seed, "training.seed"),
            ("block", state["block"], block, "data.shuffle.block"),
            ("window", state["window"], walk.window, "data.shuffle.window"),
        ):
            if before != now:
                raise DataError(
                    f"this run was reading with {name} {before}, not {now}, so its order differs; set {key} back"
                )
        if block != walk.block:
            self.examples.walk = Walk(self.data, walk.seed, block, walk.window)
        self.consumed, self.bad = state["samples"], set(state["bad"])
        self._iteration += 1

    def count_bad(self) -> int:
        """Return how many samples are known to be bad, including those that other ranks met."""
        if self.quarantine:
            self.bad |= self.quarantine.add([])
        return len(self.bad)

    def _record_failures(self, failures: list[dict[str, str]]) -> None:
        new = {sample_id(failure): failure for failure in failures if sample_id(failure) not in self.bad}
        if not new:
            return
        if self.quarantine:
            self.bad |= self.quarantine.add(list(new.values()))
        self.bad |= new.keys()
        samples = len(self.reader)
        if len(self.bad) > self.max_bad_share * samples:
            where = f", listed in {self.quarantine.path}" if self.quarantine else ""
            raise DataError(
                f"{len(self.bad):,} of {samples:,} samples of {self.reader.location} cannot be read, more than "
                f"max_bad_share {self.max_bad_share:.2%}{where}; shard them again, or raise the share"
            )


def open_stream(
    config: ReadConfig,
    data: TrainingSet,
    batch_size: int,
    ranks: Ranks,
    seed: int,
    preparation: Preparation,
    quarantine: Path,
    device: torch.device,
) -> ShardStream:
    """Open one rank's stream of a run, as the recipe's `data` describes it.

    Args:
        config: The recipe's `data`.
        data: The training set that it names.
        batch_size: Samples per rank and training step.
        ranks: This rank and the world size.
        seed: The recipe's seed.
        preparation: The transform and the tokenizer.
        quarantine: The run's list of unreadable samples.
        device: Batches for a CUDA device lie in pinned memory.
    """
    return ShardStream(
        data,
        batch_size,
        ranks.rank,
        ranks.world,
        config.workers,
        seed,
        preparation.transform,
        preparation.tokenizer,
        quarantine,
        config.max_bad_share,
        config.shuffle.block,
        config.shuffle.window,
        pinned=device.type == "cuda",
    )
