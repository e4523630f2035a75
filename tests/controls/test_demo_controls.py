"""Controls beside the demo's claims, on what `make demo` left in runs/demo: `make controls` runs them (minutes)."""

import json
from pathlib import Path
from random import Random

import pytest

from launch.cli import main
from retrieval.records import read_record
from runtime.metrics import read_metrics

pytestmark = pytest.mark.controls
DEMO = Path(__file__).parents[2] / "runs" / "demo"
WAYS = ("image_to_text", "text_to_image")
STEPS = 450
"""Steps of the shuffled run: by then the true one is far above chance."""


def test_the_demo_reaches_its_gate():
    record = read_record(DEMO / "scores.json")
    assert record["images"] == 500 and record["head"] == "dual"
    for way in WAYS:
        assert record[way]["R@1"] >= 25 and record[way]["R@10"] >= 70, (way, record[way])


def test_trained_on_shuffled_pairs_it_scores_chance(tmp_path):
    """Every image gets another image's captions: all else is the demo's own, and nothing must be found."""
    source = json.loads((DEMO / "source" / "captions_train.json").read_text())
    images = [image["id"] for image in source["images"]]
    others = images.copy()
    Random(0).shuffle(others)
    moved = dict(zip(images, others, strict=True))
    for annotation in source["annotations"]:
        annotation["image_id"] = moved[annotation["image_id"]]
    (tmp_path / "captions.json").write_text(json.dumps(source))
    drawings = str(DEMO / "source" / "images")
    assert main(["shard", str(tmp_path / "captions.json"), "--images", drawings, "--out", str(tmp_path / "train")]) == 0
    data = ["--data.train", str(tmp_path / "train"), "--data.validation", str(DEMO / "shards" / "validation")]
    recipe = ["--config", "pretrain/demo.yaml", "--runs", str(tmp_path), *data, "--training.steps", str(STEPS)]
    assert main(["launch", "local", "--nproc", "2", "pretrain", *recipe]) == 0
    options = [
        "--config",
        "finetune/demo_evaluate.yaml",
        "--checkpoint",
        str(tmp_path / "pretrain"),
        "--heads",
        "[dual]",
    ]
    out = tmp_path / "scores.json"
    assert main(["evaluate", *options, "--data", str(DEMO / "shards" / "test"), "--out", str(out)]) == 0
    shuffled = read_record(out)
    true = next(line for line in read_metrics(DEMO / "pretrain") if line["step"] == STEPS and "validation/rsum" in line)
    for way in WAYS:
        low, high = shuffled[way]["interval"]["R@10"]
        chance = shuffled["chance"][way]["R@10"]
        assert low <= chance <= high or shuffled[way]["R@10"] < 2 * chance, (way, shuffled[way])
        assert true[f"validation/{way}_R@10"] > 4 * chance, "the true pairs must teach something in as many steps"
