"""NLVR2's accuracy and consistency, against cases counted by hand and the released identifiers."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from retrieval.pairs import accuracy_and_consistency, sentence_of

SHARED = Path(os.environ.get("LIGATURE_SHARED", "shared"))
LABELS = {"dev-1-0-0": True, "dev-1-1-0": False, "dev-1-0-1": True, "dev-2-0-0": False}


def test_one_wrong_pair_costs_its_sentence():
    """3 of 4 examples are right; of the three sentences, the one with two pairs is lost."""
    assert accuracy_and_consistency({**LABELS, "dev-1-1-0": True}, LABELS) == (3 / 4, 2 / 3)


@pytest.mark.parametrize("predictions", [{}, {**LABELS, "dev-9-0-0": True}])
def test_missing_and_foreign_examples_are_refused(predictions):
    with pytest.raises(ValueError, match="predict each example once"):
        accuracy_and_consistency(predictions, LABELS)


def test_other_identifiers_are_refused():
    with pytest.raises(ValueError, match="split-set-pair-sentence"):
        sentence_of("dev-1-0")


@pytest.mark.skipif(not (SHARED / "data/nlvr2/dev.jsonl.gz").is_file(), reason="needs LIGATURE_SHARED")
def test_released_identifiers_name_one_sentence():
    """Always "True" is right in 3,551 of dev's 6,982 examples, and a key stands for one text."""
    with gzip.open(SHARED / "data/nlvr2/dev.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts: dict[str, set[str]] = {}
    for row in rows:
        texts.setdefault(sentence_of(row["identifier"]), set()).add(row["sentence"])
    assert all(len(each) == 1 for each in texts.values())
    labels = {row["identifier"]: row["label"] == "True" for row in rows}
    assert accuracy_and_consistency(dict.fromkeys(labels, True), labels)[0] == 3551 / 6982
