"""Scores of sentences about pairs of photographs (NLVR2): accuracy and consistency."""

from __future__ import annotations

from collections.abc import Mapping


def sentence_of(identifier: str) -> str:
    """Return the key of a sentence: `split-set-pair-sentence` without the pair, because a sentence is asked of several."""
    parts = identifier.split("-")
    if len(parts) != 4:
        raise ValueError(f"{identifier!r} is no NLVR2 identifier; write it as split-set-pair-sentence")
    return "-".join((parts[0], parts[1], parts[3]))


def accuracy_and_consistency(predictions: Mapping[str, bool], labels: Mapping[str, bool]) -> tuple[float, float]:
    """Return the shares of right examples and of sentences all of whose examples are right, in 0 to 1.

    Args:
        predictions: the answer to each identifier.
        labels: the truth of each identifier; a balanced or unbalanced subset is a smaller mapping on both sides.
    """
    if not labels:
        raise ValueError("no labels to score; give at least one example")
    missing, foreign = labels.keys() - predictions.keys(), predictions.keys() - labels.keys()
    if missing or foreign:
        raise ValueError(
            f"{len(missing)} examples have no prediction and {len(foreign)} predictions no example"
            f" (such as {min(missing or foreign)}); predict each example once"
        )
    sentences: dict[str, bool] = {}
    right = 0
    for identifier, label in labels.items():
        hit = predictions[identifier] == label
        right += hit
        key = sentence_of(identifier)
        sentences[key] = sentences.get(key, True) and hit
    return right / len(labels), sum(sentences.values()) / len(sentences)
