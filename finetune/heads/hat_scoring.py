"""Scoring of a collection by HAT: captions are encoded once and kept, images are encoded batch by batch and dropped.

The tokens of all images would be the large part: 15.8 GB in float32 for COCO's 5,000 images at HAT's own sizes. Here only a
batch of them exists at a time. Beside it are the captions' tokens (3 GB for 25,010 captions of 13 words at three levels) and
the matrix of scores. Captions are sorted by length, so a "position" below is a caption's place in that order.

Tested in tests/finetune/heads/test_hat.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, distributed

from data_tools.in_order.collection import Collection
from data_tools.pixels.transforms import EvaluationTransform
from data_tools.tokenizer import CaptionTokenizer, pad_tokens
from finetune.heads.base import Workload
from finetune.heads.hat_model import HatModel
from pretrain.encode import gather_shares, rank_share
from runtime.progress import progress
from runtime.ranks import Ranks

CAPTIONS = 32
"""Captions scored at once. They are sorted by length, so hardly any of a block is padding."""
ELEMENTS = 1 << 20
"""Similarities in a block. Its temporaries, 4 MB each, should stay in the cache."""
GRAM_ELEMENTS = 1 << 25
"""Elements of the Gram matrices kept at a time."""
ROWS = 256
"""Rows of the score matrix reordered at a time."""


@dataclass
class CaptionTokens:
    """The tokens of all captions without padding: one run of rows a caption, shortest captions first."""

    levels: list[Tensor]
    """(all words, width) each"""
    starts: Tensor
    """(captions,) int64, the first row of the caption at each position"""
    lengths: Tensor
    """(captions,) int64"""
    order: np.ndarray
    """(captions,) the number in the collection of the caption at each position"""

    def take(self, positions: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return one (captions, words, width) a level, zero behind each caption's end, and the captions' mask."""
        lengths = self.lengths[positions]
        columns = torch.arange(int(lengths.max()), device=lengths.device)
        mask = columns < lengths[:, None]
        rows = torch.where(mask, self.starts[positions][:, None] + columns, 0)
        return [level[rows] * mask[..., None] for level in self.levels], mask


@torch.no_grad()
def encode_captions(model: HatModel, tokenizer: CaptionTokenizer, captions: list[str], work: Workload) -> CaptionTokens:
    """Encode all captions, the work shared by the ranks.

    A block of captions does not depend on the number of ranks, and neither do its bits.

    Returns:
        The tokens of all captions, the same on every rank.
    """
    ids = tokenizer.encode(captions)
    order = np.argsort([len(row) for row in ids], kind="stable")
    ids = [ids[number] for number in order]
    lengths = torch.tensor([len(row) for row in ids])
    ends = lengths.cumsum(0)
    shape = int(ends[-1]), model.config.width
    levels = [torch.empty(shape, device=work.device) for _ in model.pairs]
    own = rank_share(len(ids), work.batch_size, work.ranks)
    for start in range(own.start, own.stop, work.batch_size):
        end = min(start + work.batch_size, own.stop)
        block, mask = (part.to(work.device) for part in pad_tokens(ids[start:end], tokenizer.length))
        first, last = int(ends[start] - lengths[start]), int(ends[end - 1])
        for level, words in zip(levels, model.text_levels(block, mask), strict=True):
            level[first:last] = words[mask]
    # Each rank sends its own rows. Shares differ in length, so this is a broadcast each instead of one gather.
    if work.ranks.world > 1:
        for rank in range(work.ranks.world):
            part = rank_share(len(ids), work.batch_size, Ranks(rank, work.ranks.world))
            if len(part):
                first, last = int(ends[part.start] - lengths[part.start]), int(ends[part.stop - 1])
                for level in levels:
                    distributed.broadcast(level[first:last], src=rank)
    return CaptionTokens(levels, (ends - lengths).to(work.device), lengths.to(work.device), order)


@torch.no_grad()
def hat_scores(
    model: HatModel,
    tokenizer: CaptionTokenizer,
    collection: Collection,
    work: Workload,
    listed: np.ndarray | None = None,
) -> np.ndarray:
    """Score every image with every caption, or only the pairs of a first stage's shortlists; the ranks share the work.

    Args:
        model: a HAT model, on the workload's device.
        tokenizer: the model's own.
        collection: images and captions.
        work: the ranks, the device and the batch size.
        listed: (images, captions) bool, the pairs to score; the others score 0. None scores all.

    Returns:
        (images, captions) float32, the same on every rank. With the same number of threads a rank, the bits do not depend on
        the number of ranks.
    """
    training = model.training
    model.eval()
    ranks = work.ranks
    texts = encode_captions(model, tokenizer, collection.captions, work)
    images, captions = len(collection), len(collection.captions)
    own = rank_share(images, work.batch_size, ranks)
    scores = torch.zeros(len(own), captions)
    pairs = images * captions if listed is None else int(listed.sum())
    transform = EvaluationTransform(model.encoders.image_size)
    done = 0
    with progress("scoring", pairs, "pairs", silent=work.silent or not ranks.first) as bar:
        for pixels in collection.images(transform, own, work.batch_size, work.workers):
            levels = model.image_levels(pixels.to(work.device))
            rows = slice(done, done + len(pixels))
            if listed is None:
                _score_all(model, levels, texts, scores[rows])
                bar.advance(len(pixels) * captions * ranks.world)
            else:
                listed_here = listed[own.start + done : own.start + done + len(pixels)][:, texts.order]
                _score_listed(model, levels, texts, listed_here, scores[rows])
                bar.advance(int(listed_here.sum()) * ranks.world)
            done += len(pixels)
    model.train(training)
    whole = gather_shares([scores], images, work.batch_size, (captions,), work.device).numpy()
    _restore_order(whole, texts.order)
    return whole


def _restore_order(scores: np.ndarray, order: np.ndarray) -> None:
    """Move the columns from the order of lengths back into the collection's, in place: a second matrix may not fit."""
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    for start in range(0, len(scores), ROWS):
        scores[start : start + ROWS] = scores[start : start + ROWS][:, position]


def _score_all(model: HatModel, levels: list[Tensor], texts: CaptionTokens, out: Tensor) -> None:
    """Score each image of a batch with all captions into `out`, (images, captions) by position."""
    largest = max(tokens.shape[1] for tokens in levels)
    group = max(1, GRAM_ELEMENTS // largest**2)
    for begin in range(0, len(out), group):
        images = [tokens[begin : begin + group] for tokens in levels]
        grams, rows = model.grams(images), out[begin : begin + group]
        for start in range(0, len(texts.order), CAPTIONS):
            positions = torch.arange(start, min(start + CAPTIONS, len(texts.order)), device=texts.lengths.device)
            words, mask = texts.take(positions)
            for part in blocks(len(rows), largest, mask.numel()):
                part_grams = [gram[part] for gram in grams] if grams else None
                scores = model.score([tokens[part] for tokens in images], words, mask, part_grams)
                rows[part, start : start + len(positions)] = scores.cpu()


def blocks(images: int, regions: int, words: int) -> Iterator[slice]:
    """Divide images into runs that are small enough for their similarities with the words to fit in the cache.

    Args:
        images: number of images.
        regions: regions an image.
        words: words of all captions that are scored at once, pads included.
    """
    step = max(1, ELEMENTS // (regions * words))
    return (slice(first, first + step) for first in range(0, images, step))


def _score_listed(model: HatModel, levels: list[Tensor], texts: CaptionTokens, listed: np.ndarray, out: Tensor) -> None:
    """Score each image with its own captions into `out`; `listed` and `out` are (images, captions) by position."""
    for row, marks in enumerate(listed):
        image = [tokens[row : row + 1] for tokens in levels]
        grams = model.grams(image)
        for positions in torch.from_numpy(np.flatnonzero(marks)).split(CAPTIONS):
            words, mask = texts.take(positions.to(texts.lengths.device))
            out[row, positions] = model.score(image, words, mask, grams)[0].cpu()
