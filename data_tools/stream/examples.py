"""Positions of the order become decoded, transformed and tokenized examples.

Tested in tests/data_tools/stream/test_shard_stream.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data_tools.pixels.decode import decode_image, decode_pixels
from data_tools.pixels.feature_blocks import CachedViews
from data_tools.pixels.packed import join_images
from data_tools.shards.reader import BrokenSample, RawSample
from data_tools.stream.caption_sentences import read_sentences
from data_tools.stream.order import derived_seed
from data_tools.stream.quarantine import sample_id
from data_tools.stream.training_set import Walk
from data_tools.tokenizer import CaptionTokenizer, pad_tokens
from runtime.errors import DataError

STAND_INS = 100
"""Samples to try for one position, its own included, before the whole dataset counts as broken."""


@dataclass(slots=True)
class Example:
    """The decoded sample at one position of the order."""

    position: int
    image_id: int
    key: str
    image: Any
    caption: str
    tokens: list[int] | None
    failures: list[dict[str, str]]
    """Shard, key and reason of each unreadable sample that this one stands in for."""


@dataclass(frozen=True)
class Preparation:
    """What turns a raw sample into an example."""

    transform: Callable | CachedViews | None = None
    """(pixels (height, width, 3) uint8, seed) -> (views, 3, size, size) uint8 or `PackedImages`; `CachedViews` take the place of
    pixels; None keeps PIL images."""
    tokenizer: CaptionTokenizer | None = None
    """None leaves captions as text."""


class ExampleReader(Dataset):
    """Position -> `Example`, as a torch dataset.

    An example is a pure function of (training set, seed, position) and of the samples known to be bad. Workers and ranks
    may therefore read positions in any order.
    """

    def __init__(self, walk: Walk, preparation: Preparation) -> None:
        self.walk = walk
        self.transform, self.tokenizer = preparation.transform, preparation.tokenizer
        self.reader, self.keep = walk.data.reader, walk.data.keep
        self.bad: frozenset[str] = frozenset()
        """Samples that could not be read, as `shard/key`."""

    def __getitems__(self, positions: list[int]) -> list[Example | DataError]:
        """Return the examples at these positions, or one error in their place (see `raise_errors` in workers.py)."""
        try:
            samples, captions = self.walk.at(np.array(positions))
            raw_samples = self.reader.read(samples)
            return [
                self._example(position, sample, raw, caption)
                for position, sample, raw, caption in zip(
                    positions, samples.tolist(), raw_samples, captions.tolist(), strict=True
                )
            ]
        except DataError as error:
            return [error]

    def _example(self, position: int, sample: int, raw: RawSample | BrokenSample, caption_number: int) -> Example:
        """Return the example at a position, from its own sample or else from the first stand-in that can be read."""
        failures: list[dict[str, str]] = []
        for attempt in range(STAND_INS):
            if attempt:
                # The stand-in is a function of (seed, position, attempt), so every rank and every resume picks the same.
                sample, caption_number = self.walk.stand_in(position, attempt)
                (raw,) = self.reader.read([sample])
            failure = {"shard": raw.shard, "key": raw.key, "reason": "it could not be read before"}
            if self.bad and sample_id(failure) in self.bad:
                failures.append(failure)
                continue
            # A function of the position, so that a sample gets other views in each epoch.
            seed = derived_seed(self.walk.seed, position)
            try:
                if isinstance(raw, BrokenSample):
                    raise raw
                caption = read_sentences(
                    self._choose_caption(raw, caption_number, seed), self.walk.data.sentences, seed
                )
                image = self._decode(raw, sample)
            except BrokenSample as error:
                failures.append({**failure, "reason": error.reason})
                continue
            except (OSError, ValueError) as error:
                failures.append({**failure, "reason": " ".join(str(error).split())})
                continue
            if self.transform is not None:
                image = self.transform(image, seed)
            tokens = self.tokenizer.encode([caption])[0] if self.tokenizer else None
            return Example(position, raw.image_id, raw.key, image, caption, tokens, failures)
        raise DataError(
            f"{STAND_INS} samples in a row cannot be read, the last one {failures[-1]['key']}: {failures[-1]['reason']}"
        )

    def _decode(self, raw: RawSample, sample: int) -> Any:
        """Return what the transform reads: the sample's number where views are cached, else its decoded image."""
        if isinstance(self.transform, CachedViews):
            return self.transform.check(sample)
        return decode_image(raw.image) if self.transform is None else decode_pixels(raw.image)

    def _choose_caption(self, raw: RawSample, number: int, seed: int) -> str:
        """Return caption `number` of a sample, or for -1 a random one that the filter allows."""
        captions = raw.captions
        if number >= 0:
            if number >= len(captions):
                raise BrokenSample(raw.shard, raw.key, f"it has {len(captions)} captions, its index says more")
            return captions[number]
        if self.keep.counts_words:
            captions = [caption for caption in captions if self.keep.allows(caption)] or captions
        return captions[seed % len(captions)]


def collate_examples(results: list[Example | DataError], length: int | None = None) -> dict[str, Any] | DataError:
    """Join examples into a batch (see `ShardStream` for its parts), or return the first error among them.

    Args:
        results: The examples of the batch.
        length: Words that captions are padded to; None for the longest caption's.
    """
    examples: list[Example] = []
    for result in results:
        if isinstance(result, DataError):
            return result
        examples.append(result)
    batch = {
        "keys": [example.key for example in examples],
        "positions": torch.tensor([example.position for example in examples]),
        "image_ids": torch.tensor([example.image_id for example in examples]),
        "captions": [example.caption for example in examples],
        "images": join_images([example.image for example in examples]),
        "failures": [failure for example in examples for failure in example.failures],
    }
    if examples[0].tokens is not None:
        batch["ids"], batch["mask"] = pad_tokens([example.tokens or [] for example in examples], length)
    return batch
