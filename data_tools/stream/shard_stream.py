"""ShardStream: a shard folder as an endless, shuffled, exactly resumable sequence of batches."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_tools.config import ReadConfig
from data_tools.pixels.decode import decode_image, decode_pixels
from data_tools.pixels.packed import join_images
from data_tools.shards.reader import BrokenSample, RawSample
from data_tools.stream.order import WINDOW, derived_seed
from data_tools.stream.quarantine import Quarantine, sample_id
from data_tools.stream.training_set import Folder, TrainingSet, Walk, default_block
from data_tools.tokenizer import CaptionTokenizer, pad_tokens
from runtime.errors import DataError
from runtime.ranks import Ranks

STAND_INS = 100
"""Tries to find a readable stand-in before the data is given up as broken."""


CURSOR_VERSION = 2


@dataclass(slots=True)
class Example:
    """One position of the order, decoded."""

    position: int
    image_id: int
    key: str
    image: Any
    caption: str
    tokens: list[int] | None
    failures: list[dict[str, str]]


class ExampleReader(Dataset):
    """Position -> Example, a pure function of (training set, seed, position) and of the samples known to be bad: workers and
    ranks may call it in any order."""

    def __init__(self, walk: Walk, transform: Callable | None, tokenizer: CaptionTokenizer | None) -> None:
        self.walk, self.transform, self.tokenizer = walk, transform, tokenizer
        self.reader, self.keep = walk.data.reader, walk.data.keep
        self.bad: frozenset[str] = frozenset()

    def __getitems__(self, positions: list[int]) -> list[Example | DataError]:
        """An error is returned, not raised: a loader worker would wrap it in a traceback of its own (see `raised`)."""
        try:
            samples, captions = self.walk.at(np.array(positions))
            read = self.reader.read(samples)
            return [self._example(*one) for one in zip(positions, read, captions.tolist(), strict=True)]
        except DataError as error:
            return [error]

    def _example(self, position: int, raw: RawSample | BrokenSample, chosen: int) -> Example:
        failures: list[dict[str, str]] = []
        for attempt in range(STAND_INS):
            if attempt:
                # A sample that cannot be read is replaced by one that is itself a function of (seed, position).
                sample, chosen = self.walk.stand_in(position, attempt)
                (raw,) = self.reader.read([sample])
            failure = {"shard": raw.shard, "key": raw.key, "reason": "it could not be read before"}
            if self.bad and sample_id(failure) in self.bad:
                failures.append(failure)
                continue
            draw = derived_seed(self.walk.seed, position)
            try:
                if isinstance(raw, BrokenSample):
                    raise raw
                caption = self._caption(raw, chosen, draw)
                image: Any = decode_image(raw.image) if self.transform is None else decode_pixels(raw.image)
            except BrokenSample as error:
                failures.append({**failure, "reason": error.reason})
                continue
            except (OSError, ValueError) as error:
                failures.append({**failure, "reason": " ".join(str(error).split())})
                continue
            image = image if self.transform is None else self.transform(image, draw)
            tokens = self.tokenizer.encode([caption])[0] if self.tokenizer else None
            return Example(position, raw.image_id, raw.key, image, caption, tokens, failures)
        raise DataError(
            f"{STAND_INS} samples in a row cannot be read, the last one {failures[-1]['key']}: {failures[-1]['reason']}"
        )

    def _caption(self, raw: RawSample, chosen: int, draw: int) -> str:
        captions = raw.captions
        if chosen >= 0:
            if chosen >= len(captions):
                raise BrokenSample(raw.shard, raw.key, f"it has {len(captions)} captions, its index says more")
            return captions[chosen]
        if self.keep.counts_words:
            captions = [caption for caption in captions if self.keep.allows(caption)] or captions
        return captions[draw % len(captions)]


class ShardStream:
    """Iterating yields this rank's batches, for ever. Every rank has the same number of batches, whatever the shards.

    A batch is a dictionary: `keys` (list of str), `positions` and `image_ids` (batch,) int64, `captions` (list of str),
    `images` (views, batch, 3, size, size) uint8 (a list of PIL images without a transform; PackedImages where the device
    augments them: `render_views` turns either into views), and with a tokenizer `ids` (batch, words) int64 and `mask` (batch, words)
    bool. Samples with the same `image_ids` show the same picture.

    The cursor counts samples consumed by all ranks; `state_dict()` may be taken after any batch, prefetching workers or not, and
    loaded with another world size, worker count or batch size.
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
        """folder: a shard folder, several read as one, folder -> weight, or a `TrainingSet` (filters, all captions, a cache);
        batch_size: samples per rank and step; transform: (pixels (height, width, 3) uint8, seed) -> (views, 3, size, size);
        quarantine: a file that lists samples that cannot be read, each once. Raises DataError when they are more than
        `max_bad_share` of all. block, window: how the order is shuffled, see `SampleOrder`; a block left out is the cursor's, where
        one is loaded. pinned: into memory that a GPU copies from while the host goes on."""
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size} and rank {rank} of world_size {world_size} do not make a stream")
        self.data = folder if isinstance(folder, TrainingSet) else TrainingSet(folder)
        self.reader = self.data.reader
        self.reader.read_ahead = True
        self.batch_size, self.rank, self.world_size, self.workers = batch_size, rank, world_size, workers
        self.quarantine, self.max_bad_share = Quarantine(quarantine) if quarantine else None, max_bad_share
        self._block, self._pinned = block, pinned
        walk = Walk(self.data, seed, default_block(self.data) if block is None else block, window)
        self.examples = ExampleReader(walk, transform, tokenizer)
        self.consumed = 0
        self.bad: set[str] = set()
        """Samples that could not be read, as `shard/key`."""
        self._iteration = 0

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self.data)

    @property
    def epoch(self) -> float:
        """Epochs consumed, with fraction."""
        return self.consumed / len(self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """From the cursor on. There is one cursor: an iterator ends in an error where another has been begun, or a state loaded."""
        self._iteration += 1
        return self._batches(self._iteration)

    def _batches(self, iteration: int) -> Iterator[dict[str, Any]]:
        self.examples.bad = frozenset(self.bad)
        starts = range(self.consumed + self.rank * self.batch_size, 1 << 62, self.batch_size * self.world_size)
        self.examples.walk.at(np.arange(starts[0], starts[0] + self.batch_size))  # made once, before workers are forked
        loader = DataLoader(
            self.examples,
            batch_sampler=(list(range(start, start + self.batch_size)) for start in starts),
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=begin_worker,
            multiprocessing_context="fork" if self.workers else None,
            prefetch_factor=2 if self.workers else None,
            pin_memory=self._pinned,
            generator=torch.Generator(),  # else it would draw from the global one
        )
        for batch in raised(loader):
            if iteration != self._iteration:
                raise RuntimeError("the stream's cursor has moved under this iterator; take a new one")
            self._note_failures(batch.pop("failures"))
            self.consumed += self.batch_size * self.world_size
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: samples consumed by all ranks, in all and of each dataset, what the order is a function of (fingerprint,
        seed, block, window), and the samples known to be bad."""
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
        """Go on from a cursor. Raises DataError where it belongs to other data or another order."""
        if state.get("version") != CURSOR_VERSION:
            raise DataError(
                f"this run's cursor has version {state.get('version', 1)}, this Ligature walks the data in the order of version "
                f"{CURSOR_VERSION}: go on with the version that began the run, or begin it anew under another --name"
            )
        if state["fingerprint"] != self.data.fingerprint:
            raise DataError(
                f"{self.reader.location} is not the data this run was reading (its manifest, filter, captions or weights differ); "
                "set `data` back to what it was"
            )
        walk = self.examples.walk
        block = state["block"] if self._block is None else walk.block
        for name, was, now, key in (
            ("seed", state["seed"], walk.seed, "training.seed"),
            ("block", state["block"], block, "data.shuffle.block"),
            ("window", state["window"], walk.window, "data.shuffle.window"),
        ):
            if was != now:
                raise DataError(
                    f"this run was reading with {name} {was}, not {now}: its order is another; set {key} back"
                )
        if block != walk.block:
            self.examples.walk = Walk(self.data, walk.seed, block, walk.window)
        self.consumed, self.bad = state["samples"], set(state["bad"])
        self._iteration += 1

    def count_bad(self) -> int:
        """How many samples are known to be bad, those that other ranks met among them."""
        if self.quarantine:
            self.bad |= self.quarantine.add([])
        return len(self.bad)

    def _note_failures(self, failures: list[dict[str, str]]) -> None:
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
    transform: Callable,
    tokenizer: CaptionTokenizer,
    quarantine: Path,
    device: torch.device,
) -> ShardStream:
    """The stream of a run, as its recipe's `data` says, for one of its ranks."""
    return ShardStream(
        data,
        batch_size,
        ranks.rank,
        ranks.world,
        config.workers,
        seed,
        transform,
        tokenizer,
        quarantine,
        config.max_bad_share,
        config.shuffle.block,
        config.shuffle.window,
        pinned=device.type == "cuda",
    )


def raised(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader whose workers return errors: the first error is raised here, as its own one line."""
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _collate(read: list[Example | DataError]) -> dict[str, Any] | DataError:
    if errors := [example for example in read if isinstance(example, DataError)]:
        return errors[0]
    examples = [example for example in read if isinstance(example, Example)]
    images = [example.image for example in examples]
    batch = {
        "keys": [example.key for example in examples],
        "positions": torch.tensor([example.position for example in examples]),
        "image_ids": torch.tensor([example.image_id for example in examples]),
        "captions": [example.caption for example in examples],
        "images": join_images(images),
        "failures": [failure for example in examples for failure in example.failures],
    }
    if examples[0].tokens is not None:
        batch["ids"], batch["mask"] = pad_tokens([example.tokens or [] for example in examples])
    return batch


def begin_worker(worker: int) -> None:
    """Workers leave signals to the training process (a terminal's Ctrl-C reaches them too, and a launcher's or SLURM's SIGTERM:
    a worker that died of it would end the run in an error before it has saved), and decode on one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with_parent(parent: int) -> None:
    """Obey a SIGTERM that the training process itself sends (at its exit it waits for the workers it has sent one), or that
    comes after its death."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent == os.getppid():
        pass
    os._exit(0)
