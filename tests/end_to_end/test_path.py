"""The main job from drawings to scores, through the command, on two real processes."""

import json

import pytest

from launch.cli import main
from runtime.metrics import read_metrics


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A tiny demo: every stage of `ligature demo`, a few steps each."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    arguments = ["--out", str(out), "--images", "96", "24", "30", "--pretrain-steps", "6", "--finetune-steps", "4"]
    assert main(["demo", *arguments]) == 0
    return out


def test_the_demo_leaves_its_records_table_and_curves(demo):
    record = json.loads((demo / "scores.json").read_text())
    assert record["images"] == 30 and record["captions"] == 150
    assert record["training"] == "fine-tuned-on shapes" and record["head"] == "dual"
    assert json.loads((demo / "scores-pretrained.json").read_text())["training"] == "pretrained"
    assert json.loads((demo / "scores-fusion.json").read_text())["head"].startswith("fusion")
    assert "| TR |" in (demo / "table.md").read_text()
    assert (demo / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_every_objective_is_logged_and_validation_too(demo):
    lines = read_metrics(demo / "pretrain")
    last = {name: value for line in lines for name, value in line.items()}
    names = ("loss", "contrastive", "matching", "masked_language", "codebook", "lr", "temperature", "gradient_norm")
    names += ("samples_per_second", "data_wait", "codebook/perplexity")
    assert all(f"train/{name}" in last for name in names)
    assert "validation/image_to_text_R@1" in last
    assert list((demo / "pretrain" / "tensorboard").glob("events.*"))


def test_repeating_a_finished_command_reports_that_it_is_done(demo, capfd):
    data = ["--data.train", str(demo / "shards" / "train"), "--data.validation", str(demo / "shards" / "validation")]
    recipe = ["--config", "pretrain/demo.yaml", "--runs", str(demo), *data, "--training.steps", "6"]
    assert main(["launch", "local", "--nproc", "2", "pretrain", *recipe]) == 0
    assert "nothing to do" in capfd.readouterr().out


def test_a_run_folder_of_another_recipe_is_refused(demo, capfd):
    data = ["--data.train", str(demo / "shards" / "train"), "--data.validation", str(demo / "shards" / "validation")]
    recipe = ["--config", "pretrain/demo.yaml", "--runs", str(demo), *data, "--optimizer.lr", "0.5"]
    assert main(["pretrain", *recipe]) == 2
    assert "optimizer.lr: 0.0015 -> 0.5" in capfd.readouterr().err


def test_load_model_encodes_images_and_texts(demo):
    import torch
    from PIL import Image

    from pretrain import load_model

    model = load_model(demo / "finetune")
    pictures = [Image.open(path) for path in sorted((demo / "source" / "images").glob("test_*.png"))[:3]]
    texts = ["a red circle", "two blue squares", "a green star"]
    images, words = model.encode_image(pictures), model.encode_text(texts)
    assert images.shape == words.shape == (3, 128)
    assert torch.allclose(images.norm(dim=-1), torch.ones(3)) and torch.allclose(words.norm(dim=-1), torch.ones(3))
    assert torch.equal(model.encode_image(torch.stack([model.transform(picture) for picture in pictures])), images)
    probability = model.match(pictures, texts)
    assert probability.shape == (3,) and bool(((probability >= 0) & (probability <= 1)).all())


def test_an_untrained_model_scores_chance(tmp_path):
    """The control beside every learning claim: random weights must find nothing, with both heads."""
    from retrieval.records import read_record

    shapes = tmp_path / "shapes"
    from data_tools.shapes.source import write_source

    write_source(shapes, {"train": 64, "test": 250}, size=32, seed=3)
    for split in ("train", "test"):
        captions = str(shapes / f"captions_{split}.json")
        assert main(["shard", captions, "--images", str(shapes / "images"), "--out", str(tmp_path / split)]) == 0
    recipe = ["--config", "pretrain/demo.yaml", "--runs", str(tmp_path), "--data.train", str(tmp_path / "train")]
    # One step at a vanishing rate: the whole path runs, and the weights stay what they were.
    still = ["--training.steps", "1", "--optimizer.lr", "1e-12", "--optimizer.min_lr", "1e-12"]
    assert main(["pretrain", *recipe, *still]) == 0
    options = ["--config", "finetune/demo_evaluate.yaml", "--checkpoint", str(tmp_path / "pretrain")]
    options += ["--data", str(tmp_path / "test"), "--out", str(tmp_path / "scores.json"), "--shortlist", "4"]
    assert main(["evaluate", *options]) == 0
    for name in ("scores.json", "scores-fusion.json"):
        record = read_record(tmp_path / name)
        for way in ("image_to_text", "text_to_image"):
            # Chance at 10 of 250 is 4 %; a random projection is no uniform draw, so the bound is loose, and far below learning.
            assert record[way]["R@10"] < 10, (name, way)
            assert record["chance"][way]["R@10"] == pytest.approx(4, abs=0.2)
