"""The codebook's losses, checked by hand; what its plans are; and whom L_ot teaches."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny
import torch

from pretrain.config import CodebookConfig, TransportConfig
from pretrain.model.alignment_model import TextBatch
from pretrain.objectives.codebook import Codebook, solve_plans, usage_figures
from pretrain.objectives.state import Keys, MicroBatch, Plans, StudentState
from pretrain.transport import proximal_point, sinkhorn


def state_of(image, text, codewords, plans: Plans, keys: Keys, rows) -> StudentState:
    """A student with these features, whose codebook is normalised as the model's is."""
    model = SimpleNamespace(
        codewords=lambda: torch.nn.functional.normalize(codewords, dim=-1),
        codebook_features=lambda features, modality: features,
        image_features=lambda tokens: tokens[:, 0],
        text_features=lambda states, mask: states[:, 0],
    )
    nothing = torch.zeros(0)
    batch = MicroBatch(
        nothing, TextBatch(nothing, nothing), nothing, torch.tensor(rows), nothing, keys, 0.4, None, plans
    )  # type: ignore[arg-type]
    return StudentState(model, batch, image[:, None], text[:, None])  # type: ignore[arg-type]


def by_hand(text_plan: list[float], image_plan: list[float]) -> tuple[float, float]:
    """Two codewords (1, 0) and (0, 1), temperature 1; the image's feature is (1, 0), the text's (0.6, 0.8).

    -> (prediction, transport cost), the former from the plans that text and image predict.
    """
    image_log = [1 - math.log(math.e + 1), -math.log(math.e + 1)]
    denominator = math.log(math.exp(0.6) + math.exp(0.8))
    text_log = [0.6 - denominator, 0.8 - denominator]
    prediction = -sum(t * p for t, p in zip(text_plan, text_log, strict=True))
    prediction -= sum(t * p for t, p in zip(image_plan, image_log, strict=True))
    # Costs 1 - cosine: the image is 0 and 1 from the codewords, the text 0.4 and 0.2; each by its own plan.
    cost = 0.9 * 0 + 0.1 * 1 + 0.3 * 0.4 + 0.7 * 0.2
    return prediction, cost


OF_IMAGE, OF_TEXT = [0.9, 0.1], [0.3, 0.7]


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [
        ("cross", by_hand(text_plan=OF_IMAGE, image_plan=OF_TEXT)),
        ("self", by_hand(text_plan=OF_TEXT, image_plan=OF_IMAGE)),
    ],
)
def test_both_pairings_match_a_hand_computed_example(pairing, expected):
    image, text = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    plans = Plans(torch.tensor([OF_IMAGE]), torch.tensor([OF_TEXT]))
    keys = Keys(torch.stack([image[0] * 0, image[0]]), torch.stack([text[0] * 0, text[0]]), torch.tensor([0, 1]))
    codewords = torch.tensor([[3.0, 0.0], [0.0, 0.2]])  # of any length: they are normalised
    losses = Codebook(CodebookConfig(pairing=pairing, temperature=1.0))(
        state_of(image, text, codewords, plans, keys, rows=[1])
    )
    assert losses["codeword_prediction"].item() == pytest.approx(expected[0], rel=1e-6)
    assert losses["transport_cost"].item() == pytest.approx(expected[1], rel=1e-6)
    assert losses["codebook"].item() == pytest.approx(sum(expected), rel=1e-6)


def test_the_pairings_differ():
    assert by_hand(OF_IMAGE, OF_TEXT)[0] == pytest.approx(1.791401, abs=1e-6)
    assert by_hand(OF_TEXT, OF_IMAGE)[0] == pytest.approx(1.071401, abs=1e-6)


def test_the_loss_of_a_batch_is_the_mean_of_its_parts():
    image, text, codewords = tiny.unit(6, 8, seed=1), tiny.unit(6, 8, seed=2), tiny.unit(5, 8, seed=3)
    keys = Keys(tiny.unit(6, 8, seed=4), tiny.unit(6, 8, seed=5), torch.arange(6))
    plans, *_ = solve_plans(keys.image, keys.text, codewords, 6, TransportConfig())
    objective = Codebook(CodebookConfig())
    whole = objective(state_of(image, text, codewords, plans, keys, list(range(6))))
    parts = []
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        of_part = Plans(plans.image[part], plans.text[part])
        parts.append(objective(state_of(image[part], text[part], codewords, of_part, keys, list(range(6))[part])))
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), value)


def test_targets_sum_to_1_and_are_the_plans_rows():
    image, text, codewords = tiny.unit(12, 8, seed=1), tiny.unit(12, 8, seed=2), tiny.unit(7, 8, seed=3)
    plans, figures, *_ = solve_plans(image, text, codewords, 12, TransportConfig())
    for features, target in ((image, plans.image), (text, plans.text)):
        torch.testing.assert_close(target.sum(-1), torch.ones(12))
        torch.testing.assert_close(target, 12 * proximal_point(1 - features @ codewords.T).plan, atol=1e-6, rtol=1e-4)
    assert 1 <= figures["codebook/effective_codes"] <= 7
    assert figures["codebook/row_error"] < 1e-5 and figures["codebook/column_error"] < 0.05


def test_queue_features_sharpen_the_targets_of_the_batch():
    image, text, codewords = tiny.unit(64, 8, seed=1), tiny.unit(64, 8, seed=2), tiny.unit(16, 8, seed=3)
    alone, flat, *_ = solve_plans(image[:8], text[:8], codewords, 8, TransportConfig())
    joined, sharp, *_ = solve_plans(image, text, codewords, 8, TransportConfig())
    assert joined.image.shape == alone.image.shape == (8, 16)
    torch.testing.assert_close(joined.image.sum(-1), torch.ones(8))
    assert sharp["codebook/effective_codes"] < flat["codebook/effective_codes"]


def test_figures_show_a_collapsed_codebook():
    collapsed, even = usage_figures(torch.tensor([0, 20, 0, 0])), usage_figures(torch.tensor([5, 5, 5, 5]))
    assert [float(collapsed[f"codebook/{name}"]) for name in ("perplexity", "dead", "largest_share")] == [
        1.0,
        0.75,
        1.0,
    ]
    assert [float(even[f"codebook/{name}"]) for name in ("perplexity", "dead", "largest_share")] == [4.0, 0.0, 0.25]


def test_codeword_use_is_measured_over_enough_features_per_codeword():
    """A batch of 4 pairs leaves half of 16 codewords idle whatever they are; 20 such batches do not."""
    task = tiny.task(tiny.recipe(training__global_batch=4, training__micro_batch=4))
    logged = []
    for step in range(21):
        _, figures = task.prepare(tiny.batch(4, step), 1.0, 4)
        logged.append(figures)
    assert all("codebook/dead" not in figures for figures in logged[:19]) and "codebook/churn" not in logged[0]
    nearest = torch.stack(list(task._usage._counts)).sum(0)
    assert len(task._usage._counts) == 20 and int(nearest.sum()) == 20 * 8
    assert float(logged[-1]["codebook/dead"]) == float((nearest == 0).float().mean())
    assert all(float(figures["codebook/churn"]) == 0 for figures in logged[1:])  # nothing has moved in between


def test_the_transport_cost_teaches_the_codebook_alone_and_pulls_it_to_the_teachers_features():
    image, text = tiny.unit(6, 8, seed=1).requires_grad_(), tiny.unit(6, 8, seed=2).requires_grad_()
    codewords = tiny.unit(5, 8, seed=3).requires_grad_()
    keys = Keys(tiny.unit(6, 8, seed=4).requires_grad_(), tiny.unit(6, 8, seed=5).requires_grad_(), torch.arange(6))
    plans, *_ = solve_plans(keys.image, keys.text, codewords, 6, TransportConfig())
    assert not plans.image.requires_grad and not plans.text.requires_grad
    losses = Codebook(CodebookConfig())(
        state_of(
            image, text, codewords, plans, Keys(keys.image.detach(), keys.text.detach(), keys.image_ids), list(range(6))
        )
    )
    predictions = torch.nn.functional.normalize(codewords, dim=-1)
    of_cost = torch.autograd.grad(losses["codebook"], (codewords, image, text), allow_unused=True, retain_graph=True)
    # What remains of the codebook's gradient without the two predictions is that of L_ot: -sum_i T_ij z_i, projected.
    logits = [text.detach() @ predictions.T / 0.1, image.detach() @ predictions.T / 0.1]
    prediction = -sum(
        (target * torch.log_softmax(part, -1)).sum(-1).mean()
        for part, target in zip(logits, (plans.image, plans.text), strict=True)
    )
    (of_prediction,) = torch.autograd.grad(prediction, codewords)
    pull = -(plans.image.T @ keys.image.detach() + plans.text.T @ keys.text.detach()) / 6
    unit = predictions.detach()
    pull = pull - (pull * unit).sum(-1, keepdim=True) * unit  # the codewords here have length 1
    torch.testing.assert_close(of_cost[0] - of_prediction, pull, atol=1e-5, rtol=1e-4)
    # And the student's gradient is the predictions' alone: the cost does not know the student.
    alone = -(plans.image * torch.log_softmax(text @ unit.T / 0.1, -1)).sum(-1).mean()
    torch.testing.assert_close(of_cost[2], torch.autograd.grad(alone, text)[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("solver", ["ipot", "sinkhorn", "argmax"])
def test_every_solver_gives_targets_and_reports_its_column_error(solver):
    image, text, codewords = tiny.unit(12, 8, seed=1), tiny.unit(12, 8, seed=2), tiny.unit(5, 8, seed=3)
    plans, figures, *_ = solve_plans(image, text, codewords, 12, TransportConfig(solver=solver))
    torch.testing.assert_close(plans.image.sum(-1), torch.ones(12))
    if solver == "argmax":
        assert torch.equal(plans.text, torch.nn.functional.one_hot((text @ codewords.T).argmax(-1), 5).float())
        assert figures["codebook/column_error"] > 0.1, "nothing balances it"
    else:
        assert figures["codebook/column_error"] <= 1e-3
        expected = sinkhorn(
            1 - image @ codewords.T, regularisation=0.05 if solver == "sinkhorn" else 0.0025, steps=5000
        )
        torch.testing.assert_close(plans.image, 12 * expected.plan, atol=2e-2, rtol=0)


def test_frozen_codewords_take_no_gradient_and_still_teach_the_student():
    image, codewords = tiny.unit(6, 8, seed=1).requires_grad_(), tiny.unit(5, 8, seed=3).requires_grad_()
    keys = Keys(tiny.unit(6, 8, seed=4), tiny.unit(6, 8, seed=5), torch.arange(6))
    plans, *_ = solve_plans(keys.image, keys.text, codewords.detach(), 6, TransportConfig())
    losses = Codebook(CodebookConfig(frozen=True))(state_of(image, image, codewords, plans, keys, list(range(6))))
    of_image, of_codewords = torch.autograd.grad(losses["codebook"], (image, codewords), allow_unused=True)
    assert of_image.any() and of_codewords is None
