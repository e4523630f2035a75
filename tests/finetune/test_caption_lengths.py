"""What is cut of long captions, and recalls by length, on scores whose ranks are known."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from data_tools.tokenizer import load_tokenizer
from finetune.caption_lengths import CaptionLengths, length_table
from launch.cli import main
from pretrain.weights.load import find_checkpoint
from retrieval.protocols import measure


def test_bins_end_at_the_limit_and_hold_the_recalls_of_their_own_queries():
    # Captions 0 and 1 are of image 0. Caption 2 finds image 0 first, the others find their own.
    caption_image = np.array([0, 0, 1, 2])
    scores = np.array([[0.9, 0.8, 0.95, 0.0], [0.1, 0.2, 0.3, 0.1], [0.0, 0.1, 0.2, 0.7]])
    _, outcome = measure(scores, scores.T.copy(), caption_image, resamples=2)
    described = CaptionLengths(np.array([10, 25, 30, 50]), limit=24).describe(outcome)
    bins = described.pop("by_length")
    assert described == {
        "limit": 24,
        "median": 27.5,
        "longest": 50,
        "cut_captions": 3,
        "cut_share": 0.75,
        "lost_share": (1 + 6 + 26) / 115,
    }
    assert [(part["tokens"], part["images"], part["captions"]) for part in bins] == [
        ([1, 16], 0, 1),
        ([25, 32], 2, 2),  # image 0 by its longer caption
        ([33, 50], 1, 1),
    ]
    assert bins[0]["image_to_text"] == {"R@1": None, "R@5": None, "R@10": None}
    assert [part["text_to_image"]["R@1"] for part in bins] == [100, 50, 100]
    # Image 0 ranks caption 2, which is image 1's, first.
    assert [part["image_to_text"]["R@1"] for part in bins[1:]] == [50, 100]
    lines = length_table(described | {"by_length": bins}).splitlines()
    assert "the model reads 24, so 75.0 % of the captions are cut and 28.7 % of all tokens lost" in lines[0]
    assert [line.endswith(", cut") for line in lines[1:]] == [False, True, True]


def test_a_table_of_long_captions_is_scored_by_length_and_what_is_cut_is_told(pretrained, tmp_path, capsys):
    words = ["a red circle", "a blue square and a star " * 4, "two green triangles left of a star " * 8]
    with open(tmp_path / "long.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for number, caption in enumerate(words):
            Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
            rows.writerow([f"{number}.png", caption])
    scores = tmp_path / "scores.json"
    about = [
        "--data",
        str(tmp_path / "long.csv"),
        "--dataset",
        "long",
        "--split",
        "all",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(pretrained), "--out", str(scores), *about]) == 0
    record = json.loads(scores.read_text())
    tokenizer = load_tokenizer(find_checkpoint(pretrained), 10_000)
    lengths = [len(ids) for ids in tokenizer.encode([caption.strip() for caption in words])]
    cut = [length for length in lengths if length > 32]
    told = record["caption_tokens"]
    assert told["limit"] == 32 and told["longest"] == max(lengths) and told["cut_captions"] == len(cut) > 0
    assert told["cut_share"] == pytest.approx(len(cut) / 3) and record["truncated_captions"] == len(cut)
    assert told["lost_share"] == pytest.approx(sum(length - 32 for length in cut) / sum(lengths))
    assert sum(part["captions"] for part in told["by_length"]) == 3
    assert f"{100 * len(cut) / 3:.1f} % of the captions are cut" in capsys.readouterr().out
