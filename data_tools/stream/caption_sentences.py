"""Sentences of a long caption, one or a run of which a training example reads."""

from __future__ import annotations

import re
from typing import Literal

from data_tools.stream.order import derived_seed

Reading = Literal["all", "one", "run"]
"""What an example reads of a caption: all of it, one sentence, or a run of neighbouring sentences."""

_BOUNDARY = re.compile(
    r"(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr|St|vs|No)\.)(?<!\b(?:Mrs|etc)\.)(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])|\s*\n\s*"
)
"""White space after the end of a sentence, where a capital or a digit follows, and line breaks. Initials and a few abbreviations end
no sentence."""
SENTENCES = 1
"""Purpose of the random numbers that choose sentences."""


def split_sentences(caption: str) -> list[str]:
    """Return the sentences of a caption, in order; the whole caption where it has no end of a sentence within."""
    sentences, start = [], 0
    for boundary in _BOUNDARY.finditer(caption):
        # A closing quote or bracket belongs to the sentence before it.
        sentences.append(caption[start : boundary.end()].strip())
        start = boundary.end()
    sentences.append(caption[start:].strip())
    return [sentence for sentence in sentences if sentence] or [caption]


def read_sentences(caption: str, reading: Reading, seed: int) -> str:
    """Return what an example reads of a caption; a function of the seed.

    Of n sentences `run` draws how many to read, 1 to n alike, and then where they begin.
    """
    if reading == "all":
        return caption
    sentences = split_sentences(caption)
    length = 1 if reading == "one" else 1 + derived_seed(seed, SENTENCES, 0) % len(sentences)
    start = derived_seed(seed, SENTENCES, 1) % (len(sentences) - length + 1)
    return " ".join(sentences[start : start + length])
