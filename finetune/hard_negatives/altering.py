"""VLDeformer's hard negatives (section 3.4): captions with words exchanged, images with patches exchanged.

Every choice is a function of random numbers that belong to the sample, so no state needs saving.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_tools.tokenizer import CaptionTokenizer, pad_tokens
from finetune.hard_negatives.lexicon import COCO_OBJECTS, Entry, Lexicon
from finetune.heads.config import HardNegativesConfig

TRIES = 8
"""Object words tried in place of a noun, until one differs from it."""


@dataclass
class Word:
    """A word of a caption, and its tokens."""

    start: int
    """Position of its first token."""
    stop: int
    """Position behind its last token."""
    text: str
    entry: Entry | None
    """What the lexicon knows of it; None where it is unknown."""

    @property
    def noun(self) -> bool:
        """Whether the word is a noun."""
        return self.entry is not None and self.entry.kind == "noun"

    @property
    def exchangeable(self) -> bool:
        """Whether another word can replace this one."""
        return self.entry is not None and (self.noun or self.entry.antonym is not None)


class AlteredCaptions:
    """Alters captions: an object word replaces a noun; its antonym replaces a verb, an adjective or an adverb.

    `ratio` is the probability that a word of these kinds is exchanged.
    """

    def __init__(self, config: HardNegativesConfig, lexicon: Lexicon, tokenizer: CaptionTokenizer) -> None:
        self.ratio, self.lexicon, self.tokenizer = config.text_ratio, lexicon, tokenizer
        self.objects = config.objects or [" ".join(name.split()) for name in COCO_OBJECTS.split(",")]
        self.numbers_per_caption = 2 * tokenizer.caption_tokens
        """Two random numbers a word: whether to exchange it, and for which object word."""

    def words(self, ids: list[int]) -> list[Word]:
        """Return the words of a caption's ids, without [CLS] and [SEP].

        WordPiece's inner pieces (##ing) belong to the word before them.
        """
        words: list[Word] = []
        for position, token in enumerate(ids):
            if token in (self.tokenizer.cls, self.tokenizer.sep, self.tokenizer.pad):
                continue
            piece = self.tokenizer.pipeline.id_to_token(token) or ""
            if piece.startswith("##") and words:
                words[-1].text, words[-1].stop = words[-1].text + piece[2:], position + 1
            else:
                words.append(Word(position, position + 1, piece, None))
        for word in words:
            word.entry = self.lexicon.look_up(word.text.lower())
        return words

    def alter(self, ids: list[int], numbers: np.ndarray) -> list[int] | None:
        """Exchange words of a caption.

        Where the draws choose no word, the word with the lowest draw is exchanged: a negative must differ from its positive.

        Args:
            ids: the caption's token ids, [CLS] and [SEP] included, without pads.
            numbers: (numbers_per_caption,) uniform in [0, 1).

        Returns:
            The altered ids, or None where the caption has no word to exchange.
        """
        words = self.words(ids)
        draws, picks = numbers[::2], numbers[1::2]
        candidates = [number for number, word in enumerate(words) if word.exchangeable]
        chosen = [number for number in candidates if draws[number] < self.ratio]
        if not chosen:
            chosen = sorted(candidates, key=lambda number: draws[number])[:1]
        altered = {
            number: text
            for number in chosen
            if (text := self._replacement(words[number], float(picks[number]))) is not None
        }
        if not altered:
            return None
        for number, text in list(altered.items()):  # the article follows: a dog, an apple
            if number and number - 1 not in altered and words[number - 1].text in ("a", "an"):
                altered[number - 1] = "an" if text[0] in "aeiou" else "a"
        altered_ids, position = list[int](), 0
        for number, text in sorted(altered.items()):
            altered_ids += ids[position : words[number].start] + self._pieces(text)
            position = words[number].stop
        altered_ids += ids[position:]
        limit = self.tokenizer.caption_tokens
        if len(altered_ids) > limit:
            altered_ids = [*altered_ids[: limit - 1], self.tokenizer.sep]
        return altered_ids if altered_ids != ids else None

    def __call__(self, ids: Tensor, mask: Tensor, numbers: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Alter a batch of captions.

        Args:
            ids: (captions, words), on any device.
            mask: (captions, words) bool.
            numbers: (captions, numbers_per_caption) uniform in [0, 1).

        Returns:
            The ids and the mask of the altered captions, padded anew, and (captions,) bool: which captions were altered. The
            others are unchanged.
        """
        rows = [row[:length].tolist() for row, length in zip(ids.cpu(), mask.sum(1).tolist(), strict=True)]
        altered = [self.alter(row, own) for row, own in zip(rows, numbers, strict=True)]
        changed = torch.tensor([row is not None for row in altered], device=ids.device)
        new_rows = [row if new is None else new for row, new in zip(rows, altered, strict=True)]
        new_ids, new_mask = pad_tokens(new_rows, self.tokenizer.length)
        return new_ids.to(ids.device), new_mask.to(ids.device), changed

    def nouns(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return which tokens are of nouns, (captions, words) bool; all tokens of a caption without a noun."""
        nouns = torch.zeros_like(mask, device="cpu")
        for row, (own, length) in enumerate(zip(ids.cpu(), mask.sum(1).tolist(), strict=True)):
            for word in self.words(own[:length].tolist()):
                if word.noun:
                    nouns[row, word.start : word.stop] = True
        nouns = nouns.to(mask.device)
        return torch.where(nouns.any(1, keepdim=True), nouns, mask)

    def _replacement(self, word: Word, pick: float) -> str | None:
        """Return the text that replaces a word; None where no object word differs from it. `pick` is uniform in [0, 1)."""
        assert word.entry is not None
        if not word.noun:
            assert word.entry.antonym is not None
            return self.lexicon.inflect(word.entry.antonym, word.text, word.entry)
        count = len(self.objects)
        for step in range(min(TRIES, count)):
            name = self.objects[(int(pick * count) + step) % count]
            if name not in (word.entry.base, word.text):
                return self.lexicon.inflect(name, word.text, word.entry)
        return None

    def _pieces(self, text: str) -> list[int]:
        return self.tokenizer.pipeline.encode(text, add_special_tokens=False).ids


def choose_patches(attention: Tensor | None, draws: Tensor, attended: float, rest: float) -> Tensor:
    """Choose which patches of each image to exchange.

    Args:
        attention: (images, patches) how much the captions' nouns attend to each patch. None: choose at random alone.
        draws: (images, patches) uniform in [0, 1).
        attended: share of the patches to choose by the highest attention.
        rest: share of the other patches to choose at random.

    Returns:
        (images, patches) bool.
    """
    images, patches = draws.shape
    chosen = torch.zeros(images, patches, dtype=torch.bool, device=draws.device)
    attended_count = round(attended * patches) if attention is not None else 0
    if attended_count and attention is not None:
        chosen.scatter_(1, attention.topk(attended_count, dim=1).indices, True)
    random_count = round(rest * (patches - attended_count))
    if random_count:
        # Draws are below 1, so a patch that is chosen already, at 2, is never among the lowest.
        chosen.scatter_(1, draws.masked_fill(chosen, 2.0).topk(random_count, dim=1, largest=False).indices, True)
    return chosen


def exchange_patches(images: Tensor, chosen: Tensor, donors: Tensor) -> Tensor:
    """Replace chosen patches by the patches at the same position of other images.

    Args:
        images: (batch, 3, size, size).
        chosen: (batch, rows, columns) bool, the patches to replace.
        donors: (batch,) the row of the image that each image's new patches come from.

    Returns:
        (batch, 3, size, size).
    """
    patch = images.shape[-1] // chosen.shape[-1]
    replaced = chosen.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return torch.where(replaced[:, None], images[donors], images)
