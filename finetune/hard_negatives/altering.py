"""VLDeformer's hard negatives (section 3.4): captions with words exchanged, images with patches exchanged.

Everything is a function of numbers that belong to the samples, so that no state is to be saved.
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
"""Draws for an object word that is not the word it replaces."""


@dataclass
class Word:
    """A word of a caption, and the tokens it is made of."""

    start: int
    stop: int
    text: str
    entry: Entry | None

    @property
    def noun(self) -> bool:
        return self.entry is not None and self.entry.kind == "noun"

    @property
    def exchangeable(self) -> bool:
        return self.entry is not None and (self.noun or self.entry.antonym is not None)


class AlteredCaptions:
    """Nouns give way to sampled object words, verbs, adjectives and adverbs to antonyms, each with probability `ratio`."""

    def __init__(self, config: HardNegativesConfig, lexicon: Lexicon, tokenizer: CaptionTokenizer) -> None:
        self.ratio, self.lexicon, self.tokenizer = config.text_ratio, lexicon, tokenizer
        self.objects = config.objects or [" ".join(name.split()) for name in COCO_OBJECTS.split(",")]
        self.numbers_per_caption = 2 * tokenizer.caption_tokens

    def words(self, ids: list[int]) -> list[Word]:
        """The words of a caption, [CLS] and [SEP] left out: WordPiece's inner pieces (##ing) belong to the word before them."""
        found: list[Word] = []
        for place, number in enumerate(ids):
            if number in (self.tokenizer.cls, self.tokenizer.sep, self.tokenizer.pad):
                continue
            piece = self.tokenizer.pipeline.id_to_token(number) or ""
            if piece.startswith("##") and found:
                found[-1].text, found[-1].stop = found[-1].text + piece[2:], place + 1
            else:
                found.append(Word(place, place + 1, piece, None))
        for word in found:
            word.entry = self.lexicon.look_up(word.text.lower())
        return found

    def alter(self, ids: list[int], numbers: np.ndarray) -> list[int] | None:
        """A caption's ids with words exchanged, or None where it has no word to exchange.

        numbers: (numbers_per_caption,) uniform in [0, 1). Where the draws choose none of the words, the one nearest to being
        chosen is: a negative equal to its positive would be none.
        """
        words = self.words(ids)
        draws, picks = numbers[::2], numbers[1::2]
        open_to_it = [number for number, word in enumerate(words) if word.exchangeable]
        chosen = [number for number in open_to_it if draws[number] < self.ratio]
        if not chosen:
            chosen = sorted(open_to_it, key=lambda number: draws[number])[:1]
        altered = {
            number: text
            for number in chosen
            if (text := self._instead(words[number], float(picks[number]))) is not None
        }
        if not altered:
            return None
        for number, text in list(altered.items()):  # a dog -> an apple
            if number and number - 1 not in altered and words[number - 1].text in ("a", "an"):
                altered[number - 1] = "an" if text[0] in "aeiou" else "a"
        out, place = list[int](), 0
        for number, text in sorted(altered.items()):
            out += ids[place : words[number].start] + self._pieces(text)
            place = words[number].stop
        out += ids[place:]
        limit = self.tokenizer.caption_tokens
        out = out if len(out) <= limit else [*out[: limit - 1], self.tokenizer.sep]
        return out if out != ids else None

    def __call__(self, ids: Tensor, mask: Tensor, numbers: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """ids, mask: (captions, words), on any device; numbers: (captions, numbers_per_caption).

        -> altered ids and mask, padded anew, and (captions,) bool: which could be altered. Those that could not stay as they are.
        """
        rows = [row[:length].tolist() for row, length in zip(ids.cpu(), mask.sum(1).tolist(), strict=True)]
        altered = [self.alter(row, own) for row, own in zip(rows, numbers, strict=True)]
        changed = torch.tensor([row is not None for row in altered], device=ids.device)
        new_ids, new_mask = pad_tokens([row if new is None else new for row, new in zip(rows, altered, strict=True)])
        return new_ids.to(ids.device), new_mask.to(ids.device), changed

    def nouns(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(captions, words) bool: tokens of nouns; all tokens of a caption that has none."""
        found = torch.zeros_like(mask, device="cpu")
        for row, (own, length) in enumerate(zip(ids.cpu(), mask.sum(1).tolist(), strict=True)):
            for word in self.words(own[:length].tolist()):
                if word.noun:
                    found[row, word.start : word.stop] = True
        found = found.to(mask.device)
        return torch.where(found.any(1, keepdim=True), found, mask)

    def _instead(self, word: Word, pick: float) -> str | None:
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
    """Which patches of each image to exchange: the share `attended` that is attended to most, and the share `rest` of the others.

    attention: (images, patches), None: only at random; draws: (images, patches) uniform. -> (images, patches) bool.
    """
    images, patches = draws.shape
    chosen = torch.zeros(images, patches, dtype=torch.bool, device=draws.device)
    first = round(attended * patches) if attention is not None else 0
    if first and attention is not None:
        chosen.scatter_(1, attention.topk(first, dim=1).indices, True)
    others = round(rest * (patches - first))
    if others:
        chosen.scatter_(1, draws.masked_fill(chosen, 2.0).topk(others, dim=1, largest=False).indices, True)
    return chosen


def exchange_patches(images: Tensor, chosen: Tensor, donors: Tensor) -> Tensor:
    """Chosen patches replaced by those at the same places of other images.

    images: (batch, 3, size, size); chosen: (batch, rows, columns) bool; donors: (batch,) whose patches each image gets.
    """
    patch = images.shape[-1] // chosen.shape[-1]
    where = chosen.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return torch.where(where[:, None], images[donors], images)
