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

from finetune.report.page_parts import image_url
from runtime.page import escape

WORD = re.compile(r"\w+")
SHOWN, NEAREST_IMAGES, WORDS = 12, 6, 8
"""Codewords shown at most; images and words shown of each at most."""
BARS = 320
"""Bars of the plot at most; of a larger codebook each is the mean of neighbours."""
LEAST_LIFT = 1.2
"""A codeword's word is this many times as frequent in its own captions as in all, or more."""
STYLE = """
.usage { padding: 10px 12px } .usage figcaption { font-size: 13px; font-weight: 600; margin-bottom: 6px }
.usage svg { display: block; width: 100%; min-height: 120px } .usage text { fill: var(--soft); font: 12px system-ui, sans-serif }
.usage .rule { stroke: var(--soft) } .usage g:hover { opacity: .6 }
.codewords { --cell: 340px } .codeword { padding: 10px 12px; overflow-wrap: anywhere; break-inside: avoid }
.thumb { width: calc((100% - 24px) / 6); margin: 4px 4px 4px 0; border-radius: 4px }
"""
"""CSS of the sections, besides that of `finetune.report.svg_chart`."""


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
    percents = [100 * row[order] / len(nearest) for row, nearest in zip(counts, (nearest_i, nearest_t), strict=True)]
    share_k = total_k / total_k.sum()
    perplexity = float((-torch.special.xlogy(share_k, share_k).sum()).exp())
    dead = int((total_k == 0).sum())
    title = (
        f"{codewords:,} codewords on {len(nearest_i):,} images and {len(nearest_t):,} captions: "
        f"perplexity {perplexity:.1f}, {dead} dead"
    )
    return (
        f"<figure class=usage><figcaption>{escape(title)}</figcaption>{_draw_usage(percents)}<div class=keys>"
        "<span style='--c:var(--c0)'><i></i>images, upward</span><span style='--c:var(--c1)'><i></i>captions, downward</span>"
        f"</div></figure><p class=soft>Codewords from left to right, the most used first; % of images and of captions nearest to "
        f"each. {escape(place)}</p>"
    )


def _draw_usage(percents: list[Tensor]) -> str:
    """Return the bars of images (upward) and of captions (downward) as SVG. `percents`: two of (codewords,), in order."""
    width, height, left = 1000, 180, 46
    each = -(-len(percents[0]) // BARS)  # codewords a bar, whose length is their mean
    tallest = max(float(percent.max()) for percent in percents) or 1.0
    bars = [torch.stack([part.mean() for part in percent.split(each)]).tolist() for percent in percents]
    wide = (width - left) / len(bars[0])
    shapes = []
    for number, (images, captions) in enumerate(zip(*bars, strict=True)):
        first, last = number * each + 1, min((number + 1) * each, len(percents[0]))
        ranks = f"place {first:,}" if first == last else f"places {first:,} to {last:,}, mean"
        up, down = (80 * value / tallest for value in (images, captions))
        shapes.append(
            f"<g><title>{ranks}: {images:.2f} % of images, {captions:.2f} % of captions</title>"
            f"<rect x={left + number * wide:.1f} y={90 - up:.1f} width={wide * 0.9:.2f} height={up:.1f} fill='var(--c0)' />"
            f"<rect x={left + number * wide:.1f} y=90 width={wide * 0.9:.2f} height={down:.1f} fill='var(--c1)' /></g>"
        )
    ticks = "".join(
        f"<text x={left - 6} y={y} text-anchor=end>{text}</text>"
        for y, text in ((16, f"{tallest:.3g} %"), (94, "0"), (174, f"{tallest:.3g} %"))
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="use of the codewords">{ticks}{"".join(shapes)}'
        f"<line class=rule x1={left} x2={width} y1=90 y2=90 /></svg>"
    )


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
