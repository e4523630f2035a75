"""Shortlists of a first stage, and their re-ranking: a slower head orders each query's best candidates anew.

Tested in tests/finetune/test_evaluate.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.in_order.collection import Collection
from finetune.heads.base import Workload
from finetune.heads.registry import DEFAULT, HEADS, load_part
from pretrain.weights.load import find_checkpoint
from retrieval.metrics import rerank
from runtime.files import read_json

QUERIES = 1024
"""Queries handled at once while candidates are selected, to bound the memory."""


@dataclass
class FirstStage:
    """The scores that choose the shortlists."""

    similarity: np.ndarray
    """(images, captions)"""
    details: dict[str, Any]
    """Further keys of the record's `shortlist`: the checkpoint of the scores, if it is another one, and its head."""


@dataclass
class Shortlists:
    """Each query's best candidates by a first stage, in both directions."""

    captions: np.ndarray
    """(images, k) each image's best captions"""
    images: np.ndarray
    """(captions, k) each caption's best images"""

    def pairs(self) -> np.ndarray:
        """Return which pairs are on a list of either direction, (images, captions) bool."""
        listed = np.zeros((len(self.captions), len(self.images)), dtype=bool)
        np.put_along_axis(listed, self.captions, True, axis=1)
        listed[self.images.ravel(), np.repeat(np.arange(len(self.images)), self.images.shape[1])] = True
        return listed

    def ceiling(self, caption_image: np.ndarray) -> dict[str, Any]:
        """Return the lists' lengths, and the recall that no re-ranker can exceed.

        Args:
            caption_image: (captions,) the image of each caption.

        Returns:
            `captions` and `images`, the lengths; `recall`, by direction the percentage of queries with a right answer on
            their list.
        """
        image_listed = caption_image[self.captions] == np.arange(len(self.captions))[:, None]
        caption_listed = self.images == caption_image[:, None]
        return {
            "captions": self.captions.shape[1],
            "images": self.images.shape[1],
            "recall": {
                "image_to_text": 100 * float(image_listed.any(1).mean()),
                "text_to_image": 100 * float(caption_listed.any(1).mean()),
            },
        }

    def take(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take the lists' scores out of a matrix (images, captions).

        Returns:
            (images, k) and (captions, k), in the order of the lists.
        """
        return np.take_along_axis(scores, self.captions, axis=1), np.take_along_axis(scores.T, self.images, axis=1)

    def rerank(self, similarity: np.ndarray, scores: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Order each query's list by the re-ranker, above all other candidates in the first stage's order.

        Args:
            similarity: (images, captions) the first stage's scores.
            scores: the re-ranker's scores of the lists, (images, k) and (captions, k).

        Returns:
            What to rank by, (images, captions) and (captions, images).
        """
        return rerank(similarity, self.captions, scores[0]), rerank(similarity.T, self.images, scores[1])


def make_shortlists(similarity: np.ndarray, size: int, folds: np.ndarray, caption_image: np.ndarray) -> Shortlists:
    """Select each query's best candidates within its fold.

    A protocol that scores each fold apart needs shortlists within each fold.

    Args:
        similarity: (images, captions) scores of the first stage.
        size: candidates a query. A smaller gallery gives all it has.
        folds: (images,) the fold of each image (`retrieval.protocols.folds_of`).
        caption_image: (captions,) the image of each caption.
    """
    caption_folds = folds[caption_image]
    lists: list[np.ndarray] = []
    for scores, query_folds, gallery_folds in (
        (similarity, folds, caption_folds),
        (similarity.T, caption_folds, folds),
    ):
        # All lists have one length, so the smallest fold's gallery bounds it.
        length = min(size, int(np.bincount(gallery_folds).min()))
        best = np.empty((len(scores), length), dtype=np.int64)
        for fold in np.unique(folds):
            rows, columns = np.flatnonzero(query_folds == fold), np.flatnonzero(gallery_folds == fold)
            for start in range(0, len(rows), QUERIES):
                block = rows[start : start + QUERIES]
                negated = -scores[np.ix_(block, columns)]
                best[block] = columns[np.argpartition(negated, length - 1, axis=1)[:, :length]]
        lists.append(best)
    return Shortlists(*lists)


def score_first_stage(source: str, collection: Collection, work: Workload) -> FirstStage:
    """Score a collection by the head of another checkpoint, for shortlists.

    Args:
        source: a run's folder or a checkpoint's (the recipe key `shortlist_from`).
        collection: what is scored.
        work: the ranks, the device and the batch size.
    """
    folder = find_checkpoint(source)
    kind = read_json(folder / "model.json").get("head", DEFAULT)
    able = kind in HEADS and HEADS[kind].first_stage
    # A head without a first stage goes to the default head's loader, which refuses it with a message.
    return load_part(kind if able else DEFAULT, "first_stage")(folder, collection, work)
