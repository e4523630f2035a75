"""A first stage's shortlists and their re-ranking: each query's best candidates, ordered anew by a slower head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from retrieval.metrics import rerank


@dataclass
class Shortlists:
    """Who is on whose list, both ways."""

    captions: np.ndarray
    """(images, k) each image's best captions by the first stage"""
    images: np.ndarray
    """(captions, k) each caption's best images"""

    def wanted(self) -> np.ndarray:
        """(images, captions) bool: the pairs that some list names."""
        marked = np.zeros((len(self.captions), len(self.images)), dtype=bool)
        np.put_along_axis(marked, self.captions, True, axis=1)
        marked[self.images.ravel(), np.repeat(np.arange(len(self.images)), self.images.shape[1])] = True
        return marked

    def ceiling(self, caption_image: np.ndarray) -> dict[str, Any]:
        """How long the lists are, and the share of queries (percent) with a right answer on theirs: no re-ranker can find more."""
        right = caption_image[self.captions] == np.arange(len(self.captions))[:, None]
        found = (self.images == caption_image[:, None]).any(1)
        return {
            "captions": self.captions.shape[1],
            "images": self.images.shape[1],
            "recall": {
                "image_to_text": 100 * float(right.any(1).mean()),
                "text_to_image": 100 * float(found.mean()),
            },
        }

    def of(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lists' scores (images, k) and (captions, k) out of a matrix (images, captions) that holds them."""
        return np.take_along_axis(scores, self.captions, axis=1), np.take_along_axis(scores.T, self.images, axis=1)

    def rerank(self, similarity: np.ndarray, scores: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The first stage's matrix (images, captions) and the re-ranker's scores of the lists -> what to rank by, (images,
        captions) and (captions, images): each query's list in the re-ranker's order, above the rest in the first stage's."""
        return rerank(similarity, self.captions, scores[0]), rerank(similarity.T, self.images, scores[1])


def make_shortlists(similarity: np.ndarray, size: int, folds: np.ndarray, caption_image: np.ndarray) -> Shortlists:
    """The `size` best candidates of each query within its fold; a smaller gallery is taken whole.

    similarity: (images, captions); folds: (images,) the fold of each image (`retrieval.protocols.folds_of`): what a protocol
    scores apart is shortlisted apart.
    """
    caption_folds = folds[caption_image]
    lists: list[np.ndarray] = []
    for scores, queries, gallery in (
        (similarity, folds, caption_folds),
        (similarity.T, caption_folds, folds),
    ):
        # One width for all: the smallest fold's gallery bounds it.
        width = min(size, int(np.bincount(gallery).min()))
        best = np.empty((len(scores), width), dtype=np.int64)
        for fold in np.unique(folds):
            rows, columns = np.flatnonzero(queries == fold), np.flatnonzero(gallery == fold)
            for start in range(0, len(rows), 1024):
                part = rows[start : start + 1024]
                block = -scores[np.ix_(part, columns)]
                best[part] = columns[np.argpartition(block, width - 1, axis=1)[:, :width]]
        lists.append(best)
    return Shortlists(*lists)
