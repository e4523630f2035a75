"""How long the captions of a scored collection are, what the model does not read of them, and recalls by length."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrieval.protocols import RECALL_AT, Outcome

EDGES = (16, 32, 64, 128, 256, 512)
"""Most tokens of a caption in each bin, beside the model's own limit; longer ones are in a last bin."""


@dataclass(frozen=True)
class CaptionLengths:
    """The lengths of a collection's captions."""

    tokens: np.ndarray
    """(captions,) tokens of each whole caption, special tokens included."""
    limit: int
    """Most tokens that the model reads of a caption. It cuts longer ones."""

    def describe(self, outcome: Outcome) -> dict[str, Any]:
        """Return the record's `caption_tokens`.

        A caption is in the bin of its own length, an image in that of its longest caption. The limit is an edge, so each bin is read
        whole or is cut.

        Args:
            outcome: the result of every query.

        Returns:
            `limit`; `median` and `longest`, in tokens; `cut_captions`; `cut_share`, of the captions; `lost_share`, of all tokens; and
            `by_length`, a list of bins with `tokens` (least and most), `captions`, `images`, and R@K in percent by direction, None
            where a bin has no query.
        """
        cut = self.tokens > self.limit
        lost = int((self.tokens - self.limit)[cut].sum())
        longest = np.zeros(len(outcome.folds), np.int64)
        np.maximum.at(longest, outcome.caption_image, self.tokens)
        queries = {"image_to_text": longest, "text_to_image": self.tokens}
        most = int(self.tokens.max())
        edges = [0, *sorted(edge for edge in {*EDGES, self.limit} if edge < most), most]
        bins = []
        for low, high in itertools.pairwise(edges):
            inside = {name: (lengths > low) & (lengths <= high) for name, lengths in queries.items()}
            images, captions = (int(rows.sum()) for rows in inside.values())
            if images or captions:
                figures = {
                    name: {
                        f"R@{k}": 100 * float(outcome.ranks[name].hit(k)[rows].mean()) if rows.any() else None
                        for k in RECALL_AT
                    }
                    for name, rows in inside.items()
                }
                bins.append({"tokens": [low + 1, high], "captions": captions, "images": images, **figures})
        return {
            "limit": self.limit,
            "median": float(np.median(self.tokens)),
            "longest": int(self.tokens.max()),
            "cut_captions": int(cut.sum()),
            "cut_share": float(cut.mean()),
            "lost_share": lost / int(self.tokens.sum()),
            "by_length": bins,
        }


def length_table(described: dict[str, Any]) -> str:
    """Return what `CaptionLengths.describe` returned as lines of text: what is cut, and the recalls by length."""
    lines = [
        f"caption tokens: median {described['median']:.0f}, longest {described['longest']}; the model reads {described['limit']}, so "
        f"{100 * described['cut_share']:.1f} % of the captions are cut and {100 * described['lost_share']:.1f} % of all tokens lost"
    ]
    for part in described["by_length"]:
        low, high = part["tokens"]
        recalls = [
            "     -" if value is None else f"{value:6.1f}"
            for direction in ("image_to_text", "text_to_image")
            for value in part[direction].values()
        ]
        note = ", cut" if low > described["limit"] else ""
        lines.append(
            f"{low:>5} to {high:<5} {part['images']:>7,} images {part['captions']:>7,} captions  TR{' '.join(recalls[:3])}  "
            f"IR{' '.join(recalls[3:])}{note}"
        )
    return "\n".join(lines)
