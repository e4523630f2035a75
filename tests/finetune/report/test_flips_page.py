"""The page of flips: its counts and its images, from scores written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from data_tools.in_order.collection import open_collection
from finetune.report.flips_page import count_better_images
from launch.cli import main


@pytest.fixture
def records(drawn, tmp_path):
    """Two score files of the test scenes: the second is wrong on the captions of images 3 and 5, by much and by little."""
    collection = open_collection(drawn / "test", None)
    owner = collection.caption_image
    generator = np.random.default_rng(0)
    right = generator.random((len(collection), len(owner))).astype(np.float32)
    right[owner, np.arange(len(owner))] = 2.0
    wrong = right.copy()
    wrong[:, owner == 3] *= -1
    for caption in np.flatnonzero(owner == 5):
        wrong[7, caption] = 3.0
    for name, scores in (("first", right), ("second", wrong)):
        np.save(tmp_path / f"{name}.npy", scores)
        scored = ["--scores", str(tmp_path / f"{name}.npy"), "--data", str(drawn / "test"), "--save_scores", "true"]
        about = ["--dataset", "shapes", "--split", "test", "--out", str(tmp_path / f"{name}.json")]
        assert main(["evaluate", *scored, *about]) == 0
    return tmp_path, collection


def test_ties_count_as_better_images():
    scores = np.array([[1.0, 3.0, 2.0], [0.0, 0.0, -1.0]])
    assert count_better_images(scores, np.array([1, 0])).tolist() == [0, 1]
    assert count_better_images(scores, np.array([0, 2])).tolist() == [2, 2]


def test_the_page_lists_captions_only_the_first_model_gets_right_worst_first(records, drawn, capsys):
    folder, collection = records
    command = ["compare", str(folder / "first.json"), str(folder / "second.json"), "--page", str(folder / "page.html")]
    assert main([*command, "--data", str(drawn / "test")]) == 0
    assert "10 of 10 captions" in capsys.readouterr().out
    page = (folder / "page.html").read_text()
    captions = [
        caption for caption, image in zip(collection.captions, collection.caption_image, strict=True) if image in (3, 5)
    ]
    places = [page.index(f"<h2>{caption}</h2>") for caption in captions]
    assert max(places[:5]) < min(places[5:]), "image 3's captions err by most"
    assert page.count("<h2>") == 10 and page.count("class=right") == 10
    assert page.count("<figure") == 5 * 6 + 5 * 5, "the right image beside the best five where it is not among them"
    cell = "<td class=number>"
    assert f"first alone{cell}10{cell}8.3 %" in page and f"both right{cell}110" in page and "data:image/jpeg" in page


def test_captions_in_another_order_than_the_scores_are_refused(records, drawn, capsys):
    folder, collection = records
    turned = np.roll(collection.caption_image, 1)
    for name in ("first", "second"):
        np.savez(folder / f"{name}.npz", scores=np.load(folder / f"{name}.npy"), caption_image=turned)
        about = [
            "--dataset",
            "shapes",
            "--split",
            "test",
            "--save_scores",
            "true",
            "--out",
            str(folder / f"{name}.json"),
        ]
        assert main(["evaluate", "--scores", str(folder / f"{name}.npz"), *about]) == 0
    command = ["compare", str(folder / "first.json"), str(folder / "second.json"), "--page", str(folder / "page.html")]
    assert main([*command, "--data", str(drawn / "test")]) == 2
    assert "its captions in another order than those scored" in capsys.readouterr().err


def test_wrong_arguments_give_a_one_line_error(records, drawn, capsys):
    folder, _ = records
    command = ["compare", str(folder / "first.json"), str(folder / "second.json"), "--page", str(folder / "page.html")]
    assert main(command) == 2
    assert "go together" in capsys.readouterr().err
    assert main([*command, "--data", str(drawn / "train")]) == 2
    assert "the scores are of others" in capsys.readouterr().err
    assert main([*command, "--data", str(drawn / "validation")]) == 2, "as many, but others"
    assert "holds other images than those scored" in capsys.readouterr().err
    about = [
        "--dataset",
        "shapes",
        "--split",
        "test",
        "--data",
        str(drawn / "test"),
        "--out",
        str(folder / "second.json"),
    ]
    assert main(["evaluate", "--scores", str(folder / "second.npy"), *about]) == 0, "without --save_scores"
    assert main([*command, "--data", str(drawn / "test")]) == 1
    assert "--save_scores true" in capsys.readouterr().err and not (folder / "page.html").exists()
