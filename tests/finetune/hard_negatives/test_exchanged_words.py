"""Captions matched against themselves with words exchanged."""

import math

import dual_jobs
import pytest
import small
import torch

from finetune.config import FinetuneRecipe
from finetune.hard_negatives.exchanged_words import ExchangedWords, exchange_table
from finetune.heads.config import ExchangedWordsConfig
from launch.cli import main
from pretrain.model.alignment_model import TextBatch
from pretrain.objectives.state import MicroBatch, StudentState
from pretrain.weights.load import load_model
from runtime.errors import RecipeError
from runtime.metrics import read_metrics

PAIRS = ["left right", "top bottom"]


@pytest.fixture(scope="module")
def model(pretrained):
    return load_model(pretrained)


def test_words_of_pairs_are_exchanged_and_no_others(model):
    table = exchange_table([*PAIRS, "left top"], model.tokenizer)  # a word's first pair counts
    captions = ["a red circle left of a star", "a square at the top", "a red star"]
    wanted = ["a red circle right of a star", "a square at the bottom", "a red star"]
    ids, mask = model.tokenizer(captions)
    assert torch.equal(table[ids], model.tokenizer(wanted)[0])
    assert sorted(table.tolist()) == list(range(len(table))) and torch.equal(table[table], torch.arange(len(table)))


def test_a_word_that_is_no_token_is_refused(model):
    for word in ("leftwards", "links"):
        with pytest.raises(RecipeError, match=f"'{word}', which is not one token"):
            exchange_table([f"{word} right"], model.tokenizer)


def test_the_loss_equals_matching_logits_computed_pair_by_pair(model):
    """Against the model asked for one pair at a time; a caption without such a word does not count."""
    captions = ["a red circle left of a star", "two green stars", "a blue star at the top"]
    altered = ["a red circle right of a star", None, "a blue star at the bottom"]
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network, (ids, mask) = model.network.eval(), model.tokenizer(captions)
    batch = MicroBatch(images, TextBatch(ids, mask), torch.arange(3), torch.arange(3), torch.zeros(3, 2), None, 0.0)
    state = StudentState(network, batch, network.image_encoder(images), network.text_encoder(ids, mask))
    figures = ExchangedWords(PAIRS, model.tokenizer)(state)

    def logit(image, caption):
        words, there = model.tokenizer([caption])
        read = network.fusion_encoder.prepare_images(network.image_encoder(images[image][None]))
        states = network.fusion_encoder(network.text_encoder(words, there), there, read, torch.tensor([0]))
        no, yes = network.matching_logits(states)[0].tolist()
        return yes - no

    margins = [logit(number, captions[number]) - logit(number, altered[number]) for number in (0, 2)]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / 2
    assert figures["exchanged"].item() == pytest.approx(expected, abs=1e-5)
    assert figures["exchanged_right"].item() == sum(margin > 0 for margin in margins) / 2
    assert abs(margins[0]) > 1e-4  # an exchanged word is seen


def test_a_run_trains_with_exchanged_words(pretrained, drawn, tmp_path):
    words = ["--exchanged.weight", "1", "--exchanged.words", str(PAIRS)]
    assert main(small.finetune(pretrained, drawn, tmp_path, *words, steps=2)) == 0
    lines = [line for line in read_metrics(tmp_path / "finetune") if "train/exchanged" in line]
    assert len(lines) == 2
    for line in lines:
        parts = [line[f"train/{name}"] for name in ("contrastive", "matching", "exchanged")]
        assert line["train/loss"] == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 1.0}, "exchanged.words is empty"),
        ({"words": ["left"]}, "holds 'left'"),
        ({"words": ["left left"]}, "holds 'left left'"),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(RecipeError, match=message):
        ExchangedWordsConfig(**given)


def test_exchanged_words_need_the_fusion_head():
    exchanged = ExchangedWordsConfig(1.0, PAIRS)
    for more in ({"matching_weight": 0.0}, {"head": "vldeformer"}):
        with pytest.raises(RecipeError, match="trains the fusion head"):
            FinetuneRecipe(checkpoint="x", dataset="x", exchanged=exchanged, **more)


def test_two_ranks_have_the_loss_of_one_for_any_distribution_of_words(pretrained, gloo_pool):
    captions = [
        "a red circle left of a star",
        "a blue star at the top",
        "a red star left of a circle",
        "two green stars",
    ]
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):  # the second half with one such caption, and with two
        batch = [captions[number] for number in order], images[order], PAIRS
        whole = dual_jobs.exchanged_on_this_rank(pretrained, *batch)
        parts = gloo_pool.run(dual_jobs.exchanged_on_this_rank, pretrained, *batch)
        for one, *shares in zip(whole, *parts, strict=True):
            torch.testing.assert_close(sum(shares) / len(shares), one, rtol=1e-4, atol=1e-6)
