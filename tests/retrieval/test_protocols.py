"""The `full` protocol: by hand, at chance, and at its edges."""

import numpy as np
import pytest

from retrieval.protocols import DIRECTIONS, PROTOCOLS, Protocol, folds_of, measure
from runtime.errors import LigatureError


def full(*scores, **settings):
    """The figures of protocol `full`."""
    return measure(*scores, **settings)[0]


CAPTION_IMAGE = np.array([0, 0, 1, 2])


def test_figures_match_a_hand_computed_example():
    image_to_text = np.array([[0.1, 0.9, 0.5, 0.2], [0.9, 0.8, 0.7, 0.6], [0.3, 0.2, 0.1, 0.3]])
    text_to_image = np.array([[0.9, 0.1, 0.2], [0.1, 0.2, 0.3], [0.5, 0.5, 0.1], [0.0, 0.0, 0.0]])
    result = full(image_to_text, text_to_image, CAPTION_IMAGE)
    # image 0: its caption 1 is first; image 1: third; image 2: tied with caption 0 at the top, rank 1.5
    there = result["image_to_text"]
    assert there["R@1"] == pytest.approx(100 * (1 + 0 + 0.5) / 3)
    assert there["R@5"] == there["R@10"] == 100
    assert (there["median_rank"], there["mean_rank"]) == (1.5, pytest.approx(5.5 / 3))
    assert there["mean_reciprocal_rank"] == pytest.approx((1 + 1 / 3 + 1 / 1.5) / 3)
    # caption 0: first; caption 1: third; caption 2: tied with image 0, rank 1.5; caption 3: all three tied, rank 2
    back = result["text_to_image"]
    assert back["R@1"] == pytest.approx(100 * (1 + 0 + 1 / 2 + 1 / 3) / 4)
    assert (back["median_rank"], back["mean_rank"]) == (1.75, pytest.approx(7.5 / 4))
    assert result["tie_fraction"] == {"image_to_text": pytest.approx(1 / 3), "text_to_image": 0.5}
    assert result["rsum"] == pytest.approx(there["R@1"] + back["R@1"] + 400)
    assert result["chance"]["image_to_text"]["R@1"] == pytest.approx(100 * (2 + 1 + 1) / 4 / 3)
    assert result["chance"]["text_to_image"]["R@1"] == pytest.approx(100 / 3)


def test_constant_scores_are_chance_exactly():
    caption_image = np.repeat(np.arange(40), 5)
    result = full(np.zeros((40, 200), np.float16), np.ones((200, 40), np.float32), caption_image)
    for direction in DIRECTIONS:
        for name, value in result["chance"][direction].items():
            assert result[direction][name] == value
    assert result["chance"]["text_to_image"] == pytest.approx({"R@1": 2.5, "R@5": 12.5, "R@10": 25})
    assert result["chance"]["image_to_text"]["R@1"] == pytest.approx(2.5)
    assert result["tie_fraction"] == dict.fromkeys(DIRECTIONS, 1.0)


def test_random_scores_are_near_chance_and_right_scores_are_perfect():
    caption_image = np.repeat(np.arange(300), 5)
    random = np.random.default_rng(0).normal(size=(300, 1500))
    result = full(random, random.T, caption_image)
    for direction in DIRECTIONS:
        low, high = result[direction]["interval"]["R@10"]
        assert low <= result[direction]["R@10"] <= high
        assert result[direction]["R@10"] == pytest.approx(result["chance"][direction]["R@10"], abs=3.5)
    right = (np.arange(300)[:, None] == caption_image).astype(float)
    result = full(right, right.T, caption_image)
    assert result["rsum"] == 600
    assert result["text_to_image"]["interval"]["R@1"] == [100, 100]
    assert result["tie_fraction"] == dict.fromkeys(DIRECTIONS, 0.0)


def test_a_gallery_of_one_image_is_scored():
    result = full(np.zeros((1, 2)), np.zeros((2, 1)), np.array([0, 0]))
    assert result["rsum"] == 600
    assert result["image_to_text"]["median_rank"] == 1


def test_intervals_follow_the_seed():
    scores = np.random.default_rng(1).normal(size=(50, 50)) + 2 * np.eye(50)
    first, again, other = (full(scores, scores.T, np.arange(50), seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["image_to_text"]["interval"] != other["image_to_text"]["interval"]
    assert first["image_to_text"]["R@1"] == other["image_to_text"]["R@1"]


@pytest.mark.parametrize(
    ("image_to_text", "text_to_image", "caption_image", "message"),
    [
        ((4, 4), (4, 4), CAPTION_IMAGE, "1 of 4 images have no caption, the first is row 3"),
        ((3, 4), (3, 4), CAPTION_IMAGE, r"need \(3, 4\) and \(4, 3\)"),
        ((2, 4), (4, 2), CAPTION_IMAGE, "images 0 to 2, but the rows of the scores are images 0 to 1"),
        ((0, 4), (4, 0), CAPTION_IMAGE, "nothing to score"),
        ((3, 0), (0, 3), np.array([], dtype=int), "nothing to score"),
        ((3, 4), (4, 3), CAPTION_IMAGE.astype(float), "caption_image is float64"),
        ((3, 4), (4, 3), CAPTION_IMAGE[:, None], "caption_image is int64 of shape"),
        ((3, 4), (4, 3), CAPTION_IMAGE - 1, "caption_image points to images -1 to 1"),
    ],
)
def test_invalid_inputs_are_refused(image_to_text, text_to_image, caption_image, message):
    with pytest.raises(LigatureError, match=message):
        full(np.zeros(image_to_text), np.zeros(text_to_image), caption_image)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_names_the_direction_that_holds_a_nan(direction):
    scores = {"image_to_text": np.zeros((3, 4)), "text_to_image": np.zeros((4, 3))}
    scores[direction][1, 2] = np.nan
    with pytest.raises(LigatureError, match=f"{direction} scores: nan at query 1, item 2"):
        full(**scores, caption_image=CAPTION_IMAGE)


def test_folds_are_consecutive_and_averaged(monkeypatch):
    """Each fold scored by hand as its own collection; a caption more or less changes no other fold."""
    import retrieval.protocols as protocols

    monkeypatch.setitem(protocols.PROTOCOLS, "folded", Protocol(12, 3, "three folds of four"))
    caption_image = np.repeat(np.arange(12), [2, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    scores = np.random.default_rng(3).normal(size=(12, 25)) + (np.arange(12)[:, None] == caption_image)
    result, outcome = measure(scores, scores.T, caption_image, protocol="folded")
    parts = []
    for fold in range(3):
        columns = caption_image // 4 == fold
        block = scores[fold * 4 : fold * 4 + 4, columns]
        parts.append(full(block, block.T, caption_image[columns] - 4 * fold))
    for direction in DIRECTIONS:
        for name in ("R@1", "R@5", "mean_rank", "median_rank"):
            assert result[direction][name] == pytest.approx(np.mean([part[direction][name] for part in parts]))
        assert result["chance"][direction]["R@1"] == pytest.approx(
            np.mean([part["chance"][direction]["R@1"] for part in parts])
        )
    assert result["rsum"] == pytest.approx(np.mean([part["rsum"] for part in parts]))
    assert result["image_to_text"]["mAP@R"] == pytest.approx(
        np.mean([part["image_to_text"]["mAP@R"] for part in parts])
    )
    assert outcome.folds.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(outcome.ranks["text_to_image"].above) == 25


def test_protocols_are_for_their_number_of_images():
    assert {name: (row.images, row.folds) for name, row in PROTOCOLS.items()} == {
        "full": (None, 1),
        "coco_5k": (5000, 1),
        "coco_1k": (5000, 5),
        "flickr30k_1k": (1000, 1),
        "flickr8k_1k": (1000, 1),
    }
    assert np.bincount(folds_of("coco_1k", 5000)).tolist() == [1000] * 5
    with pytest.raises(LigatureError, match="coco_1k is defined on 5,000 images, not on 4,800"):
        folds_of("coco_1k", 4800)
