"""The codebook on a run's page: how often each codeword is nearest, and what the most used ones stand for.

Axes of tensor names: `i` image, `t` caption, `k` codeword.

Tested in tests/finetune/report/test_run_page.py.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.report.page_parts import figure_html, image_url
from runtime.figures import new_figure
from runtime.page import escape

WORD = re.compile(r"\w+")
SHOWN, NEAREST_IMAGES, WORDS = 12, 6, 8
"""Codewords shown at most; images and words shown of each at most."""
LEAST_LIFT = 1.2
"""A codeword's word is this many times as frequent in its own captions as in all, or more."""


@dataclass
class Codeword:
    """A codeword with what is near it."""

    number: int
    images: list[int]
    """Numbers of the nearest images, nearest first."""
    words: list[str]
    """Words more frequent in the captions nearest to it than in all captions, most telling first."""
    share: float
    """Share of all images and captions that are nearest to it."""


def codebook_html(
    image: Tensor, text: Tensor, codewords: Tensor, captions: list[str], pixels: Tensor, place: str
) -> list[str]:
    """Return the two sections on the codebook.

    Args:
        image: image features (images, width).
        text: text features (captions, width).
        codewords: (codewords, width).
        captions: the texts of `text`.
        pixels: the images (images, 3, size, size) uint8.
        place: where the images come from, to show.
    """
    similarity_ik, similarity_tk = (features @ codewords.T for features in (image, text))
    usage = usage_html(similarity_ik.argmax(-1), similarity_tk.argmax(-1), len(codewords), place)
    most_used = find_most_used(similarity_ik, similarity_tk, captions)
    cells = "".join(codeword_html(codeword, pixels) for codeword in most_used)
    return [
        "<h2>Codebook</h2>",
        usage,
        "<h2>Most used codewords</h2>",
        f"<div class='grid codewords'>{cells}</div>",
    ]


def usage_html(nearest_i: Tensor, nearest_t: Tensor, codewords: int, place: str) -> str:
    """Return a plot of the share of images and captions nearest to each codeword, the most used first.

    Args:
        nearest_i: each image's nearest codeword, (images,).
        nearest_t: each caption's nearest codeword, (captions,).
        codewords: size of the codebook.
        place: where the images come from, to show.
    """
    counts = torch.stack([torch.bincount(nearest, minlength=codewords) for nearest in (nearest_i, nearest_t)])
    total_k = counts.sum(0)
    order = total_k.argsort(descending=True)
    image_percent, text_percent = counts[0][order] / len(nearest_i) * 100, counts[1][order] / len(nearest_t) * 100
    figure, ((axis,),) = new_figure(figsize=(10.4, 2.6))
    axis.bar(range(codewords), image_percent, width=1.0, label="images", alpha=0.75)
    axis.bar(range(codewords), -text_percent, width=1.0, label="captions (downward)", alpha=0.75)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xlabel("codewords, the most used first")
    axis.set_ylabel("% nearest to it")
    axis.legend(fontsize=8, frameon=False)
    share_k = total_k / total_k.sum()
    perplexity = float((-torch.special.xlogy(share_k, share_k).sum()).exp())
    dead = int((total_k == 0).sum())
    title = (
        f"{codewords:,} codewords on {len(nearest_i):,} images and {len(nearest_t):,} captions: "
        f"perplexity {perplexity:.1f}, {dead} dead"
    )
    return figure_html(figure, title, "wide") + f"<p class=soft>{escape(place)}</p>"


def find_most_used(similarity_ik: Tensor, similarity_tk: Tensor, captions: list[str]) -> list[Codeword]:
    """Return the codewords nearest to most images and captions, the most used first.

    Args:
        similarity_ik: (images, codewords).
        similarity_tk: (captions, codewords).
        captions: the captions' texts.
    """
    nearest_i, nearest_t = similarity_ik.argmax(-1), similarity_tk.argmax(-1)
    counts = torch.bincount(torch.cat([nearest_i, nearest_t]), minlength=similarity_ik.shape[1])
    all_words = _count_captions_by_word(captions)
    codewords = []
    for number in counts.argsort(descending=True)[:SHOWN].tolist():
        if not counts[number]:
            break
        own_captions = [captions[row] for row in (nearest_t == number).nonzero().flatten().tolist()]
        words = _find_telling_words(own_captions, all_words, len(captions))
        images = similarity_ik[:, number].argsort(descending=True)[:NEAREST_IMAGES].tolist()
        share = float(counts[number]) / (len(nearest_i) + len(nearest_t))
        codewords.append(Codeword(number, images, words, share))
    return codewords


def _count_captions_by_word(captions: list[str]) -> Counter[str]:
    return Counter(word for caption in captions for word in set(WORD.findall(caption.lower())))


def _find_telling_words(own_captions: list[str], all_words: Counter[str], all_captions: int) -> list[str]:
    """Return the words of some captions that are more frequent there than in all captions."""
    own_words = _count_captions_by_word(own_captions)
    # One more caption in all of them keeps rare words from winning by chance.
    lift = {
        word: (count / len(own_captions)) / ((all_words[word] + 1) / all_captions)
        for word, count in own_words.items()
        if count > 1
    }
    telling = (word for word in lift if lift[word] > LEAST_LIFT)
    return sorted(telling, key=lambda word: -lift[word] * own_words[word] ** 0.5)[:WORDS]


def codeword_html(codeword: Codeword, pixels: Tensor) -> str:
    """Return a codeword's number, share, nearest images and words. `pixels`: all images (images, 3, size, size) uint8."""
    images = "".join(
        f"<img class=thumb src='{image_url(pixels[number])}' alt='image {number}'>" for number in codeword.images
    )
    words = escape(", ".join(codeword.words)) or "no captions of its own"
    return (
        f"<div class='card codeword'><b>{codeword.number}</b> <span class=soft>{codeword.share:.1%}</span>"
        f"<br>{images}<br><i>{words}</i></div>"
    )
