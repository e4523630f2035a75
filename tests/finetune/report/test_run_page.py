"""The page of a run: everything in one file, nothing to fetch, and what it says of codewords is so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from finetune.report.run_page import most_used, overlay
from launch.cli import main


@pytest.fixture(scope="module")
def run(drawn, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reported")
    data = ["--data.train", str(drawn / "train"), "--data.validation", str(drawn / "validation")]
    model = [
        "--model.image.width",
        "32",
        "--model.image.depth",
        "1",
        "--model.text.width",
        "32",
        "--model.text.layers",
        "1",
    ]
    model += [
        "--model.text.feed_forward",
        "64",
        "--model.fusion.layers",
        "1",
        "--model.codewords",
        "8",
        "--teacher.queue",
        "8",
    ]
    short = [
        "--training.global_batch",
        "8",
        "--training.micro_batch",
        "8",
        "--training.steps",
        "5",
        "--training.log_every",
        "1",
    ]
    arguments = ["--config", "pretrain/demo.yaml", "--name", "small", "--runs", str(folder), *data, *model, *short]
    assert main(["pretrain", *arguments]) == 0
    return folder / "small"


def test_the_page_holds_everything_and_fetches_nothing(run, capsys):
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    for title in (
        "Losses",
        "Temperature",
        "Teacher and student",
        "perplexity",
        "Dead codewords",
        "errors of the marginals",
    ):
        assert title in text, title
    for heading in ("Curves", "Codebook", "Most used codewords", "Where the fusion encoder looks for a word"):
        assert f"<h2>{heading}" in text
    sources = re.findall(r"(?:src|href)='([^']+)'", text)
    assert len(sources) > 30 and all(source.startswith("data:image/") for source in sources)
    assert "http" not in text and "match 0." in text
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]
    for name in ("teacher_distance", "codebook/churn", "codebook/largest_share", "codebook/dead", "temperature"):
        assert f"train/{name}" in logged[-1], name
    assert logged[-1]["train/teacher_distance"] > 0


def test_without_data_the_page_says_so(run, tmp_path, capsys):
    copy = tmp_path / "alone"
    shutil.copytree(run, copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(re.sub(r"validation: /.*", "validation: /nowhere", config))
    assert main(["report", str(copy), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "No data to look at" in text and "<h2>Codebook" not in text


def test_before_the_first_checkpoint_there_are_curves(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "young", ignore=shutil.ignore_patterns("checkpoints"))
    assert main(["report", str(tmp_path / "young"), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "There is no checkpoint yet" in text and "<h2>Curves" in text and "<h2>Codebook" not in text


def test_a_fine_tuning_run_has_curves_and_an_unreadable_recipe_says_what_is_wrong(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    told = config.read_text()
    config.write_text("head: dual\n" + told)
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert "This is no pretraining run" in (tmp_path / "page.html").read_text()
    config.write_text("oldest: 1\n" + told)
    assert main(["report", str(tmp_path / "run")]) != 0
    assert "unknown key oldest" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "no run's folder" in capsys.readouterr().err


def test_codewords_are_told_by_their_nearest_images_and_their_words():
    of_image = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.1, 0.7, 0.0]])
    of_text = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.1, 0.9, 0.0]])
    first, second = most_used(of_image, of_text, ["a red dog", "a red cat", "a blue dog", "a blue cat"])
    assert (first.number, first.images[:2], first.words[0]) == (0, [0, 1], "red")
    assert (second.number, second.images[0], second.words[0]) == (1, 2, "blue")
    assert first.share == pytest.approx(4 / 7)


def test_an_overlay_is_brightest_where_the_word_looks():
    heat = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    found = overlay(torch.full((3, 16, 16), 100, dtype=torch.uint8), heat)
    assert found.dtype == torch.uint8 and found[0, 0, 0] > 2 * found[0, -1, -1]
