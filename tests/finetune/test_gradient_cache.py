"""Micro-batches give the gradient of the whole batch: held against one graph of all of it, on one rank and on two."""

from __future__ import annotations

import gradient_jobs
import pytest
import small
import torch

from finetune.config import FinetuneLoopConfig, FinetuneRecipe
from launch.cli import main
from runtime.errors import RecipeError
from runtime.metrics import read_metrics

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def assert_same(actual, expected, tolerance):
    """Figures, and gradients relative to the largest of a tensor."""
    (figures, gradients), (expected_figures, expected_gradients) = actual, expected
    assert figures.keys() == expected_figures.keys() and gradients.keys() == expected_gradients.keys()
    for name, figure in figures.items():
        assert abs(float(figure) - float(expected_figures[name])) < tolerance, name
    # What softmax does not see (the bias of its keys) has a gradient of rounding errors alone.
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        scale = max(float(expected_gradients[name].abs().max()), largest * 1e-3)
        assert float((gradient - expected_gradients[name]).abs().max()) < tolerance * scale, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("losses", ["contrast", "all"])
def test_the_gradient_is_that_of_the_whole_batch(pretrained, losses, dtype):
    expected = gradient_jobs.gradients(pretrained, losses, None, dtype=dtype)
    moved = {name for name, gradient in expected[1].items() if gradient.abs().max() > 0}
    assert {"model.temperature.logit", "model.image_projection.weight", "model.text_encoder.words.weight"} <= moved
    for micro_batch in (1, 2, 3, 8):
        actual = gradient_jobs.gradients(pretrained, losses, micro_batch, dtype=dtype)
        assert_same(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("losses", ["contrast", "all"])
def test_with_dropout_each_micro_batch_runs_again_with_the_same_numbers(pretrained, losses):
    for micro_batch in (1, 3, 8):
        actual = gradient_jobs.gradients(pretrained, losses, micro_batch, dropout=True)
        assert_same(actual, gradient_jobs.gradients(pretrained, losses, micro_batch, True, dropout=True), 1e-10)
        if losses == "contrast":  # and dropout is on
            without = gradient_jobs.gradients(pretrained, losses, micro_batch)
            assert abs(actual[0]["loss"] - without[0]["loss"]) > 1e-3


@pytest.mark.parametrize("losses", ["contrast", "all"])
def test_two_ranks_share_the_gradient_of_the_global_batch(pretrained, losses, gloo_pool):
    expected = gloo_pool.run(gradient_jobs.gradients, pretrained, losses, None)
    if losses == "contrast":  # negatives for matching are drawn on each rank, but contrast knows all of them
        whole = gradient_jobs.gradients(pretrained, losses, None)
        assert_same(({}, expected[0][1]), ({}, whole[1]), 1e-10)
    for micro_batch in (1, 3):
        for actual, alone in zip(
            gloo_pool.run(gradient_jobs.gradients, pretrained, losses, micro_batch), expected, strict=True
        ):
            assert_same(actual, alone, 1e-10)
    dropped = [gloo_pool.run(gradient_jobs.gradients, pretrained, losses, 2, kept, dropout=True) for kept in (0, 1)]
    for actual, one_graph in zip(*dropped, strict=True):
        assert_same(actual, one_graph, 1e-10)


def losses(folder):
    return [line["train/loss"] for line in read_metrics(folder / "finetune") if "train/loss" in line]


@pytest.fixture(scope="module")
def without_dropout(drawn, tmp_path_factory):
    """A pretrained checkpoint whose losses do not depend on what dropout draws."""
    return small.pretrain(tmp_path_factory.mktemp("plain"), drawn, "--model.text.dropout", "0")


def test_a_run_has_the_losses_of_the_whole_batch(without_dropout, drawn, tmp_path, gloo_pool):
    """Clipping too sees the whole gradient, or the losses would part from the second step on."""
    faster = ["--optimizer.lr", "3e-3", "--optimizer.clip_norm", "0.5"]
    for name, micro_batch in (("whole", []), ("parts", ["--training.micro_batch", "3"])):
        command = small.finetune(without_dropout, drawn, tmp_path / name, *faster, *micro_batch)
        assert main(command) == 0
        command = small.finetune(without_dropout, drawn, tmp_path / f"{name}-2", *faster, *micro_batch)
        gloo_pool.run(gradient_jobs.tune, command[1:])
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0] - 0.05, "the run learns"
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    assert losses(tmp_path / "parts-2") == pytest.approx(losses(tmp_path / "whole-2"), abs=1e-4)
    norms = [
        [line["train/gradient_norm"] for line in read_metrics(tmp_path / name / "finetune") if "train/loss" in line]
        for name in ("whole", "parts", "whole-2", "parts-2")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and norms[2] == pytest.approx(norms[3], rel=1e-3)


@pytest.mark.parametrize("losses", ["contrast", "all"])
def test_in_bf16_every_weight_keeps_its_gradient(pretrained, losses):
    half = {"dtype": torch.float32, "bf16": True}
    whole, full = (
        gradient_jobs.gradients(pretrained, losses, None, **half),
        gradient_jobs.gradients(pretrained, losses, None),
    )
    figures, gradients = gradient_jobs.gradients(pretrained, losses, 3, **half)
    assert gradients.keys() == full[1].keys()
    assert float(figures["contrastive"]) == pytest.approx(float(whole[0]["contrastive"]), rel=1e-3)
    for name, gradient in gradients.items():
        exact = full[1][name].float().flatten()
        if exact.norm() > 1e-3:
            error = (gradient.flatten() - exact).norm()
            assert error < 1.5 * (whole[1][name].flatten() - exact).norm() + 0.02 * exact.norm(), name


@pytest.mark.parametrize("head", ["hat", "vldeformer"])
def test_other_heads_refuse_micro_batches(head):
    with pytest.raises(RecipeError, match="micro_batch is for the dual head"):
        FinetuneRecipe(checkpoint="x", dataset="x", head=head, training=FinetuneLoopConfig(micro_batch=4))
    with pytest.raises(RecipeError, match="micro_batch is 0; it must be 1 or more"):
        FinetuneLoopConfig(micro_batch=0)
