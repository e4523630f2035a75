"""ShardStream: a shard folder as an endless, shuffled, exactly resumable sequence of batches."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data_tools.images import decode_image, decode_pixels
from data_tools.manifest import Manifest
from data_tools.order import SampleOrder, derived_seed
from data_tools.packed import join_images
from data_tools.reader import ShardReader
from data_tools.tokenizer import CaptionTokenizer, pad_tokens
from runtime.errors import DataError

STAND_INS = 100
"""Tries to find a readable stand-in before the data is given up as broken."""


@dataclass(slots=True)
class Example:
    """One position of the order, decoded."""

    position: int
    sample: int
    key: str
    image: Any
    caption: str
    tokens: list[int] | None
    failures: list[dict[str, str]]


class ExampleReader(Dataset):
    """Position -> Example, a pure function of (manifest, seed, position): workers and ranks may call it in any order."""

    def __init__(
        self, reader: ShardReader, seed: int, transform: Callable | None, tokenizer: CaptionTokenizer | None
    ) -> None:
        self.reader, self.seed, self.transform, self.tokenizer = reader, seed, transform, tokenizer
        self.order = SampleOrder(len(reader), seed)

    def __getitem__(self, position: int) -> Example | DataError:
        """An error is returned, not raised: a loader worker would wrap it in a traceback of its own (see `raised`)."""
        try:
            return self._read(position)
        except DataError as error:
            return error

    def _read(self, position: int) -> Example:
        failures: list[dict[str, str]] = []
        for attempt in range(STAND_INS):
            # A sample that cannot be read is replaced by one that is itself a function of (seed, position).
            sample = (
                self.order[position] if attempt == 0 else derived_seed(self.seed, position, attempt) % len(self.reader)
            )
            try:
                raw = self.reader[sample]
                image: Any = decode_image(raw.image) if self.transform is None else decode_pixels(raw.image)
            except (OSError, ValueError, DataError) as error:
                shard = self.reader.manifest.shards[self.reader.place(sample)[0]].name
                failures.append(
                    {"shard": shard, "key": self.reader.key(sample), "reason": " ".join(str(error).split())}
                )
                continue
            draw = derived_seed(self.seed, position)
            caption = raw.captions[draw % len(raw.captions)]
            image = image if self.transform is None else self.transform(image, draw)
            tokens = self.tokenizer.encode([caption])[0] if self.tokenizer else None
            return Example(position, sample, raw.key, image, caption, tokens, failures)
        raise DataError(
            f"{STAND_INS} samples in a row cannot be read, the last one {failures[-1]['key']}: {failures[-1]['reason']}"
        )


class ShardStream:
    """Iterating yields this rank's batches, for ever. Every rank has the same number of batches, whatever the shards.

    A batch is a dictionary: `keys` (list of str), `positions` and `image_ids` (batch,) int64, `captions` (list of str),
    `images` (views, batch, 3, size, size) uint8 (a list of PIL images without a transform; PackedImages where the device
    augments them: `views_on` turns either into views), and with a tokenizer `ids`
    (batch, words) int64 and `mask` (batch, words) bool.

    The cursor counts samples consumed by all ranks; `state_dict()` may be taken after any batch, prefetching workers or not, and
    loaded with another world size, worker count or batch size.
    """

    def __init__(
        self,
        folder: str | Path | Manifest,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        seed: int = 0,
        transform: Callable | None = None,
        tokenizer: CaptionTokenizer | None = None,
        quarantine: Path | None = None,
        max_bad_share: float = 0.01,
    ) -> None:
        """batch_size: samples per rank and step; transform: (pixels (height, width, 3) uint8, seed) -> (views, 3, size, size); quarantine: a file
        that lists samples that cannot be read, each once. Raises DataError when they are more than `max_bad_share` of all."""
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size} and rank {rank} of world_size {world_size} do not make a stream")
        self.reader = ShardReader(folder)
        if not len(self.reader):
            raise DataError(f"{self.reader.manifest.folder} holds no samples")
        self.batch_size, self.rank, self.world_size, self.workers, self.seed = (
            batch_size,
            rank,
            world_size,
            workers,
            seed,
        )
        self.quarantine, self.max_bad_share = quarantine, max_bad_share
        self.examples = ExampleReader(self.reader, seed, transform, tokenizer)
        self.consumed = 0
        self.bad: set[str] = set()

    @property
    def epoch(self) -> float:
        """Epochs consumed, with fraction."""
        return self.consumed / len(self.reader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        starts = range(self.consumed + self.rank * self.batch_size, 1 << 62, self.batch_size * self.world_size)
        loader = DataLoader(
            self.examples,
            batch_sampler=(list(range(start, start + self.batch_size)) for start in starts),
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=begin_worker,
            multiprocessing_context="fork" if self.workers else None,
            prefetch_factor=2 if self.workers else None,
            generator=torch.Generator(),  # else it would draw from the global one
        )
        for batch in raised(loader):
            self._note_failures(batch.pop("failures"))
            self.consumed += self.batch_size * self.world_size
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: samples consumed by all ranks, the manifest's fingerprint, the seed, and the keys known to be bad."""
        return {
            "samples": self.consumed,
            "fingerprint": self.reader.manifest.fingerprint,
            "seed": self.seed,
            "bad": sorted(self.bad),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a cursor. Raises DataError where it belongs to other shards or another seed."""
        if state["fingerprint"] != self.reader.manifest.fingerprint:
            raise DataError(
                f"{self.reader.manifest.folder} is not the data this run was reading (its manifest differs); point data.train to the same shards"
            )
        if state["seed"] != self.seed:
            raise DataError(
                f"this run was reading with seed {state['seed']}, not {self.seed}: its order is another; set training.seed back"
            )
        self.consumed, self.bad = state["samples"], set(state["bad"])

    def _note_failures(self, failures: list[dict[str, str]]) -> None:
        new = {failure["key"]: failure for failure in failures if failure["key"] not in self.bad}
        if not new:
            return
        if self.quarantine:
            self.bad |= _list_once(self.quarantine, list(new.values()))
        self.bad |= new.keys()
        if len(self.bad) > self.max_bad_share * len(self.reader):
            where = f", listed in {self.quarantine}" if self.quarantine else ""
            raise DataError(
                f"{len(self.bad)} of {len(self.reader)} samples of {self.reader.manifest.folder} cannot be read, more than "
                f"max_bad_share {self.max_bad_share:.2%}{where}; shard them again, or raise the share"
            )


def _list_once(path: Path, failures: list[dict[str, str]]) -> set[str]:
    """Append failures to a file of JSON lines -> the keys it listed before, which are not listed again.

    Other ranks write there as well, so it is locked; a line that a crash cut short counts for nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = set()
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        for line in text.splitlines():
            with suppress(json.JSONDecodeError, KeyError, TypeError):
                listed.add(json.loads(line)["key"])
        cut = "" if not text or text.endswith("\n") else "\n"
        new = [failure for failure in failures if failure["key"] not in listed]
        if new:
            file.write(cut + "".join(json.dumps(failure) + "\n" for failure in new))
    return listed


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
        "image_ids": torch.tensor([example.sample for example in examples]),
        "captions": [example.caption for example in examples],
        "images": join_images(images),
        "failures": [failure for example in examples for failure in example.failures],
    }
    if examples[0].tokens is not None:
        batch["ids"], batch["mask"] = pad_tokens([example.tokens or [] for example in examples])
    return batch


def begin_worker(worker: int) -> None:
    """Workers leave signals to the training process (a terminal's Ctrl-C reaches them too), and decode on one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
