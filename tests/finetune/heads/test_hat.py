"""HAT: its scores in blocks, its loss over ranks, its encoders, and its training from start to record."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import hat_jobs
import numpy as np
import pytest
import small
import tiny_images
import torch

from data_tools.in_order.collection import open_collection
from data_tools.pixels.transforms import EvaluationTransform
from finetune.config import FinetuneRecipe
from finetune.heads.base import Workload
from finetune.heads.config import HatConfig, ImageBackboneConfig
from finetune.heads.hat import triplet_loss
from finetune.heads.hat_model import LoadedHat
from finetune.heads.hat_scoring import hat_scores
from finetune.heads.levels import BackboneEncoders
from finetune.report.heat_maps import attention_maps
from launch.cli import main
from pretrain.model.config import TextEncoderConfig
from pretrain.weights.load import load_model
from retrieval.records import read_record
from runtime.errors import CheckpointError, RecipeError
from runtime.metrics import read_metrics
from runtime.ranks import Ranks

SWIN = ImageBackboneConfig(
    "swin_tiny_patch4_window7_224",
    image_size=64,
    arguments={"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 2},
    weights="none",
)
BERT = TextEncoderConfig(width=16, layers=3, heads=2, feed_forward=32, positions=16)


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_scores_of_a_collection_equal_those_of_single_pairs(direction):
    model, tokenizer, pictures = (
        hat_jobs.model(direction=direction),
        tiny_images.tokenizer(),
        tiny_images.Pictures(5, 3),
    )
    actual = hat_scores(model.eval(), tokenizer, pictures, Workload(Ranks(), torch.device("cpu"), 2))
    assert actual.shape == (5, 15)
    transform = EvaluationTransform(32)
    for image, caption in ((0, 0), (4, 14), (2, 7), (3, 1)):
        ids, mask = tokenizer([pictures.captions[caption]])
        with torch.no_grad():
            regions = model.image_levels(transform(pictures.pictures[image])[None])
            alone = model.score(regions, model.text_levels(ids, mask), mask)
        assert actual[image, caption] == pytest.approx(alone.item(), abs=1e-5)


@pytest.mark.parametrize("count", [5, 1])
def test_two_ranks_score_bit_for_bit_like_one(gloo_pool, lone_process, count):
    expected = np.random.default_rng(0).random((count, 3 * count)) < 0.5
    for chosen in (None, expected):
        (alone,) = lone_process.run(hat_jobs.scores, count, 3, chosen)
        for together in gloo_pool.run(hat_jobs.scores, count, 3, chosen):
            assert np.array_equal(alone, together)
        if chosen is None:
            whole = alone
    assert not alone[~expected].any()
    np.testing.assert_allclose(alone[expected], whole[expected], atol=1e-5)


def test_without_attention_the_mean_tokens_are_compared():
    model = hat_jobs.model(attention="mean").eval()
    ids, mask = tiny_images.tokenizer()(["w1 w2 w3"])
    with torch.no_grad():
        regions, words = model.image_levels(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), model.text_levels(ids, mask)
        expected = sum(
            torch.nn.functional.cosine_similarity(r.mean(1), w.mean(1)) for r, w in zip(regions, words, strict=True)
        )
        assert model.score(regions, words, mask).item() == pytest.approx(expected.item(), abs=1e-6)


# --- loss ---------------------------------------------------------------------------------------------------------


def test_the_triplet_loss_takes_the_mean_of_all_negatives_when_configured():
    scores, ids = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 0, 2])
    expected = 0.0
    for pair in range(4):
        others = [other for other in range(4) if ids[other] != ids[pair]]
        for shorts in (
            [max(0.0, float(0.2 - scores[pair, pair] + scores[pair, other])) for other in others],
            [max(0.0, float(0.2 - scores[pair, pair] + scores[other, pair])) for other in others],
        ):
            expected += sum(shorts) / len(others) / 4
    assert triplet_loss(scores, ids, ids, 0.2, hardest=False).item() == pytest.approx(expected, rel=1e-5)


def test_the_triplet_loss_takes_the_hardest_negative_and_never_a_caption_of_the_same_image():
    torch.manual_seed(0)
    scores, ids = torch.randn(6, 6), torch.tensor([3, 1, 3, 2, 5, 1])
    expected = 0.0
    for i in range(6):
        others = [j for j in range(6) if ids[j] != ids[i]]
        expected += max(0.0, 0.2 - scores[i, i] + max(scores[i, j] for j in others))
        expected += max(0.0, 0.2 - scores[i, i] + max(scores[j, i] for j in others))
    assert triplet_loss(scores, ids, ids, 0.2).item() == pytest.approx(float(expected) / 6, rel=1e-6)


def test_a_batch_of_one_image_has_no_loss_and_a_gradient_of_zero():
    scores = torch.randn(3, 3, requires_grad=True)
    loss = triplet_loss(scores, torch.zeros(3), torch.zeros(3), 0.2)
    loss.backward()
    assert loss == 0 and not scores.grad.any()


def test_two_ranks_have_the_loss_and_the_gradients_of_one_process(gloo_pool, lone_process):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    mask = torch.arange(8)[None] < torch.tensor([[8], [3], [5], [4], [6], [5]])
    ids = torch.randint(5, 80, (6, 8), generator=generator) * mask
    image_ids = torch.tensor([0, 1, 2, 3, 1, 4])
    ((loss, alone),) = lone_process.run(hat_jobs.loss_and_gradients, pixels, ids, mask, image_ids)
    parts = gloo_pool.run(hat_jobs.loss_and_gradients, pixels, ids, mask, image_ids)
    for part in parts:
        torch.testing.assert_close(part[0], loss)
    assert loss > 0 and len(alone) > 40
    for name, gradient in alone.items():
        # DDP averages over the ranks.
        mean = sum(part[1][name] for part in parts) / 2
        torch.testing.assert_close(mean, gradient, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


# --- encoders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "widths", "regions"),
    [
        (SWIN, [8, 16, 32, 64], [256, 64, 16, 4]),
        (ImageBackboneConfig("resnet18", image_size=64, weights="none"), [64, 128, 256, 512], [256, 64, 16, 4]),
    ],
    ids=["swin", "resnet"],
)
def test_a_backbones_stages_are_its_levels(image, widths, regions):
    config = HatConfig(encoders="backbones", image=image, text=BERT, caption_tokens=16, frozen_epochs=0, tokenizer="x")
    encoders = BackboneEncoders(config, 90, start=False).train()
    assert encoders.image_widths == widths
    actual = encoders.image_levels(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [4, 2, 4])
    assert [tuple(level.shape) for level in actual] == [(2, regions[k], widths[k]) for k in (3, 1, 3)]
    assert not any(type(module).__name__.startswith("BatchNorm") and module.training for module in encoders.modules())


def test_a_bert_folder_starts_the_text_encoder(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertForMaskedLM(BertConfig(vocab_size=90, max_position_embeddings=16, **sizes)).eval()
    bert.save_pretrained(tmp_path)
    text = TextEncoderConfig(width=16, layers=3, heads=2, feed_forward=32, positions=16, weights=str(tmp_path))
    config = HatConfig(encoders="backbones", image=SWIN, text=text, caption_tokens=16, frozen_epochs=0)
    encoders = BackboneEncoders(config, 90, start=True).eval()
    ids, mask = tiny_images.tokenizer()(["w1 w2 w3", "w4"])
    with torch.no_grad():
        theirs = bert.bert(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        for mine, layer in zip(encoders.text_levels(ids, mask, [1, 3]), (1, 3), strict=True):
            torch.testing.assert_close(mine[mask], theirs[layer][mask], atol=1e-5, rtol=1e-5)


def test_levels_that_do_not_exist_are_refused():
    with pytest.raises(RecipeError, match=r"hat.levels has \[3, 1\], but the text encoder has 2 layers"):
        hat_jobs.model(levels=[[1, 1], [3, 1]])
    with pytest.raises(RecipeError, match=r"\[1, 3\].*the image encoder 2 levels"):
        hat_jobs.model(levels=[[1, 3]])
    for levels in ([[0, 1]], [], [[1]]):
        with pytest.raises(RecipeError, match="hat.levels is"):
            HatConfig(levels=levels)


def test_freezing_encoders_without_weights_is_refused():
    for part in ("image", "text"):
        settings = {"image": ImageBackboneConfig(), "text": TextEncoderConfig(layers=12, weights="bert")}
        settings[part].weights = "none"
        with pytest.raises(RecipeError, match=f"hat.{part}.weights is none: random encoders cannot stay frozen"):
            HatConfig(encoders="backbones", tokenizer="x", **settings)
    with pytest.raises(RecipeError, match="backbones., which reads none"):
        FinetuneRecipe(head="hat", checkpoint="x", dataset="d", hat=HatConfig(encoders="backbones"))


# --- from a checkpoint to a record --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(pretrained, drawn, tmp_path_factory):
    """A fine-tuned HAT (frozen for the first 4 of its 6 steps), left alone."""
    folder = tmp_path_factory.mktemp("hat")
    assert main(small.finetune(pretrained, drawn, folder, *small.HAT)) == 0
    return folder


def losses(folder):
    return [line["train/loss"] for line in read_metrics(folder / "finetune") if "train/loss" in line]


def test_the_encoders_are_frozen_first_and_learn_later(pretrained, drawn, runs, tmp_path, capfd):
    assert main(small.finetune(pretrained, drawn, tmp_path, *small.HAT, steps=3)) == 0
    assert "so these parts never learn: image (0.4), text (0.4)" in capfd.readouterr().err
    start = dict(load_model(pretrained).network.named_parameters())
    early, late = (LoadedHat(folder / "finetune").model for folder in (tmp_path, runs))
    for name, parameter in early.encoders.named_parameters():
        assert torch.equal(parameter, start[name]), name
    moved = [not torch.equal(parameter, start[name]) for name, parameter in late.encoders.named_parameters()]
    assert sum(moved) > 20
    assert not torch.equal(early.text_projections[0].weight, late.text_projections[0].weight)
    assert len(losses(runs)) == 6


def test_a_killed_and_resumed_run_gives_the_same_result(pretrained, drawn, runs, tmp_path):
    """Killed after its fifth step: the frozen phase lies before, so Adam's moments differ in age."""
    command = small.finetune(pretrained, drawn, tmp_path, *small.HAT)
    process = subprocess.Popen([sys.executable, "-m", "launch.cli", *command], start_new_session=True)
    while not any(line["step"] >= 5 for line in read_metrics(tmp_path / "finetune")):
        with suppress(subprocess.TimeoutExpired):
            pytest.fail(f"the run ended by itself with {process.wait(0.02)}")
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() != 0
    assert main(command) == 0
    assert losses(tmp_path) == losses(runs)
    one, other = (LoadedHat(folder / "finetune").model.state_dict() for folder in (runs, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_records_of_all_pairs_of_a_shortlist_and_of_an_ensemble(pretrained, drawn, runs, tmp_path, capfd):
    back = [*small.HAT, "--name", "t2i", "--hat.direction", "text_to_image"]
    assert main(small.finetune(pretrained, drawn, tmp_path, *back, steps=2)) == 0
    here, there = runs / "finetune", tmp_path / "t2i"
    save = ["--save_scores", "true"]
    assert main(small.evaluate(here, drawn, tmp_path / "i2t.json", *save)) == 0
    assert main(small.evaluate(there, drawn, tmp_path / "t2i.json", *save)) == 0
    assert main(small.evaluate(here, drawn, tmp_path / "both.json", "--ensemble", str(there), *save)) == 0
    scores = {name: np.load(tmp_path / f"{name}.scores.npz")["scores"] for name in ("i2t", "t2i", "both")}
    np.testing.assert_allclose(scores["both"], (scores["i2t"] + scores["t2i"]) / 2, rtol=1e-6)
    records = {name: read_record(tmp_path / f"{name}.json") for name in scores}
    assert [record["head"] for record in records.values()] == [
        "hat i-t, 2 levels",
        "hat t-i, 2 levels",
        "hat ensemble of i-t, 2 levels and t-i, 2 levels",
    ]
    assert records["both"]["checkpoint"] == f"{records['i2t']['checkpoint']}+{records['t2i']['checkpoint']}"
    assert records["i2t"]["training"] == "fine-tuned-on shapes"
    tokenizer = LoadedHat(here).tokenizer
    tokenizer.pipeline.no_truncation()
    captions = open_collection(drawn / "test", None).captions
    long = sum(len(row) > tokenizer.caption_tokens for row in tokenizer.encode(captions))
    assert records["i2t"]["truncated_captions"] == long > 0

    # A shortlist of everybody is all pairs; a short one holds what the dual head found, and says how good that was.
    lists = ["--shortlist_from", str(pretrained), "--shortlist"]
    assert main(small.evaluate(here, drawn, tmp_path / "whole.json", *lists, "120")) == 0
    whole = read_record(tmp_path / "whole.json")
    for direction in ("image_to_text", "text_to_image"):
        assert whole[direction] == records["i2t"][direction]
    assert main(small.evaluate(here, drawn, tmp_path / "short.json", *lists, "4")) == 0
    short = read_record(tmp_path / "short.json")
    assert (short["shortlist"]["captions"], short["shortlist"]["images"]) == (4, 4)
    assert short["image_to_text"]["R@1"] <= short["shortlist"]["recall"]["image_to_text"] < 100
    assert "a right answer is on" in capfd.readouterr().out
    dual = small.evaluate(pretrained, drawn, tmp_path / "dual.json")
    assert main(dual) == 0
    actual = read_record(tmp_path / "dual.json")["text_to_image"]
    assert short["shortlist"]["recall"]["text_to_image"] == pytest.approx(actual["R@5"], abs=12)


def test_hat_and_alignment_checkpoints_are_not_interchangeable(pretrained, drawn, runs, tmp_path, capfd):
    with pytest.raises(CheckpointError, match="holds a hat head"):
        load_model(runs / "finetune")
    with pytest.raises(CheckpointError, match="is no HAT checkpoint; its head is dual"):
        LoadedHat(pretrained)
    assert main(small.evaluate(pretrained, drawn, tmp_path / "x.json", "--heads", "[hat]")) == 2
    assert "its heads are dual and fusion" in capfd.readouterr().err


def test_heat_maps_are_the_attention_of_the_score(drawn, runs, tmp_path, capfd):
    hat = LoadedHat(runs / "finetune")
    image = open_collection(drawn / "test", None)[0]
    names, maps = attention_maps(hat, image, "a red circle")
    assert names == hat.tokenizer.pipeline.encode("a red circle").tokens[1:-1] and names[:2] == ["a", "red"]
    assert [level.shape for level in maps] == [(len(names), 4, 4)] * 2
    # Regions give to words (i-t): the written-out softmax over all words, [CLS] and [SEP] among them.
    ids, mask = hat.tokenizer(["a red circle"])
    with torch.no_grad():
        regions = hat.model.image_levels(EvaluationTransform(32)(image)[None])[1][0]
        words = hat.model.text_levels(ids, mask)[1][0]
        similarity = torch.nn.functional.leaky_relu(regions @ words.T, 0.1)
        expected = torch.softmax(9 * similarity / similarity.norm(dim=0, keepdim=True), 1).T[1:-1]
    np.testing.assert_allclose(maps[1].reshape(-1, 16), expected.numpy(), atol=1e-5)
    picture = next((drawn / "source" / "images").glob("test_*.png"))
    assert (
        main(["heatmap", str(runs / "finetune"), str(picture), "a red circle", "--out", str(tmp_path / "map.png")]) == 0
    )
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    long = "a red circle " * 20
    assert main(["heatmap", str(runs / "finetune"), str(picture), long, "--out", str(tmp_path / "map.png")]) == 0
    assert "the caption is longer than 32 tokens: its end is not read" in capfd.readouterr().err
    (tmp_path / "no.png").write_text("no image")
    assert (
        main(["heatmap", str(runs / "finetune"), str(tmp_path / "no.png"), "a", "--out", str(tmp_path / "x.png")]) == 1
    )
    assert "no.png cannot be read" in capfd.readouterr().err and not (tmp_path / "x.png").exists()
