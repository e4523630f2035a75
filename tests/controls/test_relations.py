"""Re-ranking by fusion beats the dual head where scenes differ only in who stands where: `make controls` (some ten minutes)."""

from statistics import mean

import pytest
import torch

from benchmarks.campaigns.vldeformer_scenes import Embedded, Matched, encode_pictures
from data_tools.shapes.drawing import draw
from data_tools.shapes.scenes import World
from data_tools.shapes.sentences import relation_pairs
from data_tools.shapes.source import write_source
from launch.cli import main
from pretrain.weights.load import load_model

pytestmark = pytest.mark.controls
WORLD = World(
    colours=("red", "green", "blue", "yellow"),
    shapes=("circle", "square", "triangle"),
    counts=(1,),
    plain_share=1.0,
    single_share=0.1,
)
SIZE = 32


@torch.no_grad()
def accuracy(scorer: Matched | Embedded) -> float:
    """Percent of 1,200 comparisons: of two captions of the same words for an image, of two images of the same things for a caption."""
    right = []
    for number, pair in enumerate(relation_pairs(300, seed=1, world=WORLD)):
        pictures = [draw(scene, SIZE, number) for scene, _ in pair]
        scores = scorer.score(encode_pictures(scorer, pictures), [caption.text for _, caption in pair])
        right += [scores[one, one] > scores[pair] for one in (0, 1) for pair in ((one, 1 - one), (1 - one, one))]
    return 100 * mean(float(one) for one in right)


def test_fusion_tuned_on_exchanged_words_reads_relations_and_beats_the_dual_head(tmp_path):
    write_source(tmp_path / "source", {"train": 2000, "validation": 100}, size=SIZE, world=WORLD)
    for split in ("train", "validation"):
        source = [str(tmp_path / "source" / f"captions_{split}.json"), "--images", str(tmp_path / "source" / "images")]
        assert main(["shard", *source, "--out", str(tmp_path / split)]) == 0
    data = ["--runs", str(tmp_path), "--data.train", str(tmp_path / "train")]
    data += ["--data.validation", str(tmp_path / "validation")]
    start, runs = ["launch", "local", "--nproc", "2"], {"before": tmp_path / "pretrain", "after": tmp_path / "tuned"}
    assert main([*start, "pretrain", "--config", "pretrain/demo.yaml", "--training.steps", "900", *data]) == 0
    tune = ["--config", "finetune/shapes_relations.yaml", "--name", "tuned", "--checkpoint", str(runs["before"])]
    assert main([*start, "finetune", *tune, *data]) == 0
    dual, fusion = {}, {}
    for name, folder in runs.items():
        model = load_model(folder)
        dual[name], fusion[name] = accuracy(Embedded(model)), accuracy(Matched(model))
    print(f"dual {dual}, fusion {fusion}")
    assert 40 < fusion["before"] < 60, "nothing but words exchanged is to have taught it"
    assert fusion["after"] > 80 and fusion["after"] > dual["after"] + 5, (dual, fusion)
