"""The page of a run: one file that fetches nothing, and what it says about codewords and word maps is right."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from finetune.report.codewords import find_most_used
from finetune.report.word_map_figures import overlay_heat
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
    assert "There is no data to look at" in text and "<h2>Codebook" not in text


def test_before_the_first_checkpoint_there_are_curves(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "young", ignore=shutil.ignore_patterns("checkpoints"))
    assert main(["report", str(tmp_path / "young"), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "There is no checkpoint yet" in text and "<h2>Curves" in text and "<h2>Codebook" not in text


def test_a_fine_tuning_run_has_curves_and_an_unreadable_recipe_says_what_is_wrong(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    config.write_text("head: dual\n" + text)
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert "This is not a pretraining run" in (tmp_path / "page.html").read_text()
    config.write_text("oldest: 1\n" + text)
    assert main(["report", str(tmp_path / "run")]) != 0
    assert "unknown key oldest" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no run (no config.yaml)" in capsys.readouterr().err


def test_a_codeword_has_its_nearest_images_and_telling_words():
    similarity_ik = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.1, 0.7, 0.0]])
    similarity_tk = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.1, 0.9, 0.0]])
    first, second = find_most_used(similarity_ik, similarity_tk, ["a red dog", "a red cat", "a blue dog", "a blue cat"])
    assert (first.number, first.images[:2], first.words[0]) == (0, [0, 1], "red")
    assert (second.number, second.images[0], second.words[0]) == (1, 2, "blue")
    assert first.share == pytest.approx(4 / 7)


def test_an_overlay_is_brightest_where_the_word_looks():
    heat = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    overlay = overlay_heat(torch.full((3, 16, 16), 100, dtype=torch.uint8), heat)
    assert overlay.dtype == torch.uint8 and overlay[0, 0, 0] > 2 * overlay[0, -1, -1]
