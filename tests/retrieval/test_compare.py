"""Two records held against each other: the differences by hand, the test's level, and what may not be compared."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import permutation_test

import retrieval.protocols as protocols
from launch.cli import main
from retrieval.compare import compare_records, describe
from retrieval.records import About, score, write_record
from runtime.errors import LigatureError

IMAGES, EACH = 60, 3
CAPTION_IMAGE = np.repeat(np.arange(IMAGES), EACH)
KEYS = [f"key{number}" for number in range(IMAGES)]
ABOUT = {"dataset": "d", "split": "s", "captions_per_image": "all", "head": "dual", "training": "pretrained"}


def matrix(strength, seed):
    noise = np.random.default_rng(seed).normal(size=(IMAGES, len(CAPTION_IMAGE)))
    return noise + strength * (np.arange(IMAGES)[:, None] == CAPTION_IMAGE)


def write(path, scores, keys=KEYS, **about):
    record, outcome = score(scores, scores.T, CAPTION_IMAGE, About(**{**ABOUT, "checkpoint": path.stem, **about}))
    write_record(path, record, outcome, keys)
    return record


def row(comparison, direction, measure):
    return next(
        line for line in comparison["differences"] if (line["direction"], line["measure"]) == (direction, measure)
    )


def test_differences_are_those_of_the_records_and_a_clear_one_is_resolved(tmp_path):
    a, b = (write(tmp_path / f"{name}.json", matrix(strength, 1)) for name, strength in (("a", 1.0), ("b", 3.0)))
    comparison = compare_records(tmp_path / "a.json", tmp_path / "b.json")
    for direction in ("image_to_text", "text_to_image"):
        for name in ("R@1", "R@5", "R@10"):
            line = row(comparison, direction, name)
            assert (line["first"], line["second"]) == (
                pytest.approx(a[direction][name]),
                pytest.approx(b[direction][name]),
            )
            assert line["difference"] == pytest.approx(b[direction][name] - a[direction][name])
            assert line["interval"][0] <= line["difference"] <= line["interval"][1]
    rsum = row(comparison, "both", "rsum")
    assert rsum["difference"] == pytest.approx(b["rsum"] - a["rsum"])
    assert rsum["verdict"] == "higher" and rsum["p"] < 0.001
    assert "second higher" in describe(comparison)


def test_the_p_value_equals_scipys(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write(tmp_path / f"{name}.json", matrix(1.5, seed))
    line = row(compare_records(tmp_path / "a.json", tmp_path / "b.json"), "text_to_image", "R@5")
    hits = []
    for seed in (1, 2):
        scores = matrix(1.5, seed).T
        right = scores[np.arange(len(CAPTION_IMAGE)), CAPTION_IMAGE][:, None]
        hits.append(np.bincount(CAPTION_IMAGE, (scores > right).sum(1) < 5))
    theirs = permutation_test(
        (hits[1] - hits[0],), np.mean, permutation_type="samples", n_resamples=10_000, rng=np.random.default_rng(0)
    )
    assert line["p"] == pytest.approx(theirs.pvalue, abs=0.02)
    assert line["verdict"] == "unresolved"


def test_a_record_against_itself_is_unresolved(tmp_path):
    write(tmp_path / "a.json", matrix(1.0, 1))
    for line in compare_records(tmp_path / "a.json", tmp_path / "a.json")["differences"]:
        assert (line["difference"], line["interval"], line["verdict"], line["p"]) == (0, [0, 0], "unresolved", 1)


def test_folds_count_as_in_the_records(tmp_path, monkeypatch):
    monkeypatch.setitem(protocols.PROTOCOLS, "folded", protocols.Protocol(None, 3, "thirds"))
    a, b = (
        write(tmp_path / f"{name}.json", matrix(1.0, seed), protocol="folded") for name, seed in (("a", 1), ("b", 2))
    )
    line = row(compare_records(tmp_path / "a.json", tmp_path / "b.json"), "image_to_text", "R@5")
    assert line["difference"] == pytest.approx(b["image_to_text"]["R@5"] - a["image_to_text"]["R@5"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"split": "other"}, "split is 's' in one and 'other' in the other"),
        ({"keys": KEYS[::-1]}, "not scored on the same images"),
    ],
)
def test_other_data_is_refused(tmp_path, spoil, message):
    write(tmp_path / "a.json", matrix(1.0, 1))
    write(tmp_path / "b.json", matrix(1.0, 1), **spoil)
    with pytest.raises(LigatureError, match=message):
        compare_records(tmp_path / "a.json", tmp_path / "b.json")


def test_ranks_that_are_missing_or_of_another_record_are_refused(tmp_path, capfd):
    write(tmp_path / "a.json", matrix(1.0, 1))
    write(tmp_path / "b.json", matrix(2.0, 1))
    (tmp_path / "b.ranks.npz").write_bytes((tmp_path / "a.ranks.npz").read_bytes())
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    assert "b.ranks.npz does not belong to" in capfd.readouterr().err
    (tmp_path / "b.ranks.npz").unlink()
    with pytest.raises(LigatureError, match="ranks.npz is missing"):
        compare_records(tmp_path / "a.json", tmp_path / "b.json")
    record = json.loads((tmp_path / "a.json").read_text())
    del record["ranks"]
    (tmp_path / "a.json").write_text(json.dumps(record))
    with pytest.raises(LigatureError, match="has no ranks beside it"):
        compare_records(tmp_path / "a.json", tmp_path / "b.json")
