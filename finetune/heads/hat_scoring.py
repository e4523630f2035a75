"""A collection scored by HAT: captions encoded once and kept, images encoded once and let go, block by block.

Tokens of all images would be the large part (COCO's 5,000 images at HAT's own sizes: 15.8 GB in float32); here only a batch of
them exists at a time, beside the captions' tokens (25,010 captions of 13 words, three levels: 3 GB) and the matrix of scores.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, distributed

from data_tools.in_order.collection import Collection
from data_tools.pixels.transforms import EvaluationTransform
from data_tools.tokenizer import CaptionTokenizer, pad_tokens
from finetune.heads.hat import HatModel
from pretrain.encode import gather_shares, rank_share
from runtime.progress import progress
from runtime.ranks import Ranks

CAPTIONS = 32
"""Captions scored at once. They come sorted by length, so that hardly any of a block is padding."""
ELEMENTS = 1 << 20
"""Similarities of a block: its temporaries, 4 MB each, should stay in the cache."""
GRAM_ELEMENTS = 1 << 25
"""Of the Gram matrices that are kept at a time."""


@dataclass
class CaptionTokens:
    """The tokens of all captions without padding, one run of rows a caption, shortest captions first."""

    levels: list[Tensor]
    """(all words, width) each"""
    starts: Tensor
    """(captions,) int64, the first row of the caption at each place"""
    lengths: Tensor
    """(captions,) int64"""
    order: np.ndarray
    """(captions,) the number in the collection of the caption at each place"""

    def take(self, places: Tensor) -> tuple[list[Tensor], Tensor]:
        """-> a (captions, words, width) each level, zero behind each caption's end, and their mask."""
        lengths = self.lengths[places]
        columns = torch.arange(int(lengths.max()), device=lengths.device)
        mask = columns < lengths[:, None]
        rows = torch.where(mask, self.starts[places][:, None] + columns, 0)
        return [level[rows] * mask[..., None] for level in self.levels], mask


@torch.no_grad()
def encode_captions(
    model: HatModel, tokenizer: CaptionTokenizer, captions: list[str], ranks: Ranks, device: torch.device, batch: int
) -> CaptionTokens:
    """Encode all captions, the work shared by the ranks; whole on every rank afterwards. Blocks do not depend on the world."""
    ids = tokenizer.encode(captions)
    order = np.argsort([len(row) for row in ids], kind="stable")
    ids = [ids[number] for number in order]
    lengths = torch.tensor([len(row) for row in ids])
    ends = lengths.cumsum(0)
    shape = int(ends[-1]), model.config.width
    levels = [torch.empty(shape, device=device) for _ in model.pairs]
    own = rank_share(len(ids), batch, ranks)
    for start in range(own.start, own.stop, batch):
        end = min(start + batch, own.stop)
        block, mask = (part.to(device) for part in pad_tokens(ids[start:end]))
        first, last = int(ends[start] - lengths[start]), int(ends[end - 1])
        for level, words in zip(levels, model.text_levels(block, mask), strict=True):
            level[first:last] = words[mask]
    if ranks.world > 1:
        for rank in range(ranks.world):
            part = rank_share(len(ids), batch, Ranks(rank, ranks.world))
            if len(part):
                first, last = int(ends[part.start] - lengths[part.start]), int(ends[part.stop - 1])
                for level in levels:
                    distributed.broadcast(level[first:last], src=rank)
    return CaptionTokens(levels, (ends - lengths).to(device), lengths.to(device), order)


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors give back, for the next ones. (Other C libraries have no such switch, and no such need.)

    By default it returns the end of the heap to the system beyond twice the largest block freed, so that tensors of a few
    megabytes are mapped and faulted in again at every operation: a quarter of the time of HAT's t-i scores.
    """
    trim_threshold, map_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(map_threshold, 32 << 20)  # the most it takes


@torch.no_grad()
def hat_scores(
    model: HatModel,
    tokenizer: CaptionTokenizer,
    collection: Collection,
    ranks: Ranks,
    device: torch.device,
    batch_size: int = 64,
    workers: int = 0,
    wanted: np.ndarray | None = None,
    silent: bool = False,
) -> np.ndarray:
    """The score of every image with every caption, or with those that are wanted; the work is shared by the ranks.

    wanted: (images, captions) bool, from a first stage's shortlists; others score 0. -> (images, captions) float32, the same on
    every rank and, with the same number of threads each, the same to the last bit whatever their number.
    """
    training = model.training
    model.eval()
    if device.type == "cpu":
        keep_freed_memory()
    texts = encode_captions(model, tokenizer, collection.captions, ranks, device, batch_size)
    images, captions = len(collection), len(collection.captions)
    own = rank_share(images, batch_size, ranks)
    scores = torch.zeros(len(own), captions)
    pairs = images * captions if wanted is None else int(wanted.sum())
    transform = EvaluationTransform(model.encoders.image_size)
    done = 0
    with progress("scoring", pairs, "pairs", silent=silent or not ranks.first) as bar:
        for pixels in collection.images(transform, own, batch_size, workers):
            levels = model.image_levels(pixels.to(device))
            rows = slice(done, done + len(pixels))
            if wanted is None:
                _score_all(model, levels, texts, scores[rows])
                bar.advance(len(pixels) * captions * ranks.world)
            else:
                chosen = wanted[own.start + done : own.start + done + len(pixels)][:, texts.order]
                _score_chosen(model, levels, texts, chosen, scores[rows])
                bar.advance(int(chosen.sum()) * ranks.world)
            done += len(pixels)
    model.train(training)
    # Back from the order of lengths into the collection's, in place of a second matrix.
    found = gather_shares([scores], images, batch_size, (captions,), device).numpy()
    place = np.empty(captions, dtype=np.int64)
    place[texts.order] = np.arange(captions)
    for start in range(0, images, 256):
        found[start : start + 256] = found[start : start + 256][:, place]
    return found


def _score_all(model: HatModel, levels: list[Tensor], texts: CaptionTokens, out: Tensor) -> None:
    """All captions for each image of a batch. out: (images, captions) in the order of lengths."""
    largest = max(tokens.shape[1] for tokens in levels)
    group = max(1, GRAM_ELEMENTS // largest**2)
    for begin in range(0, len(out), group):
        images = [tokens[begin : begin + group] for tokens in levels]
        grams, rows = model.grams(images), out[begin : begin + group]
        for start in range(0, len(texts.order), CAPTIONS):
            places = torch.arange(start, min(start + CAPTIONS, len(texts.order)), device=texts.lengths.device)
            words, mask = texts.take(places)
            for part in blocks(len(rows), largest, mask.numel()):
                given = [gram[part] for gram in grams] if grams else None
                found = model.score([tokens[part] for tokens in images], words, mask, given)
                rows[part, start : start + len(places)] = found.cpu()


def blocks(images: int, regions: int, words: int) -> Iterator[slice]:
    """Runs of images whose similarities with so many words fit in the cache."""
    step = max(1, ELEMENTS // (regions * words))
    return (slice(first, first + step) for first in range(0, images, step))


def _score_chosen(model: HatModel, levels: list[Tensor], texts: CaptionTokens, chosen: np.ndarray, out: Tensor) -> None:
    """For each image its own captions. chosen: (images, captions) bool, in the order of lengths, as is out."""
    for row, marks in enumerate(chosen):
        image = [tokens[row : row + 1] for tokens in levels]
        grams = model.grams(image)
        for places in torch.from_numpy(np.flatnonzero(marks)).split(CAPTIONS):
            words, mask = texts.take(places.to(texts.lengths.device))
            out[row, places] = model.score(image, words, mask, grams)[0].cpu()
