"""The contrastive loss against its formula, written out sample by sample and key by key in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import Tensor

from pretrain.config import ContrastiveConfig
from pretrain.model.alignment_model import TextBatch
from pretrain.objectives.contrastive import Contrastive, soft_targets
from pretrain.objectives.state import Keys, MicroBatch, StudentState

TEMPERATURE = 0.07
WIDTH = 8


def student_state(
    image: Tensor, text: Tensor, keys: Keys, rows: list[int], distill_weight: float, temperature: float = TEMPERATURE
) -> StudentState:
    """A student with these features: each sample's only token is its feature."""
    model = SimpleNamespace(
        temperature=lambda: torch.tensor([temperature], dtype=image.dtype),
        image_features=lambda tokens: tokens[:, 0],
        text_features=lambda states, mask: states[:, 0],
    )
    places = torch.tensor(rows)
    nothing = torch.zeros(0)
    batch = MicroBatch(
        nothing, TextBatch(nothing, nothing), keys.image_ids[places], places, nothing, keys, distill_weight
    )  # type: ignore[arg-type]
    return StudentState(model, batch, image[:, None], text[:, None])  # type: ignore[arg-type]


def by_hand(image, text, keys: Keys, rows, distill_weight: float, intra_modal: bool, temperature=TEMPERATURE) -> float:
    """ALBEF Eq. 1, 2 and 6 with the two terms within a modality, one number at a time."""
    image_keys, text_keys, ids = keys.image.tolist(), keys.text.tolist(), keys.image_ids.tolist()

    def dot(one, other):
        return math.fsum(x * y for x, y in zip(one, other, strict=True))

    def log_softmax(logits):
        top = max(logits)
        total = top + math.log(math.fsum(math.exp(logit - top) for logit in logits))
        return [logit - total for logit in logits]

    def term(student, teachers, against, mask_itself):
        total = 0.0
        for sample, row in enumerate(rows):
            positives = [identity == ids[row] for identity in ids]
            target = [positive / sum(positives) for positive in positives]
            opinion = [
                -math.inf if mask_itself and number == row else dot(teachers[row], key) / temperature
                for number, key in enumerate(against)
            ]
            if distill_weight and max(opinion) > -math.inf:
                soft = [math.exp(logit) for logit in log_softmax(opinion)]
                target = [distill_weight * s + (1 - distill_weight) * t for s, t in zip(soft, target, strict=True)]
            predicted = log_softmax([dot(student[sample], key) / temperature for key in against])
            total -= math.fsum(t * p for t, p in zip(target, predicted, strict=True) if t)
        return total / len(rows)

    image, text = image.tolist(), text.tolist()
    terms = [term(image, image_keys, text_keys, False), term(text, text_keys, image_keys, False)]
    if intra_modal:
        terms += [term(image, image_keys, image_keys, True), term(text, text_keys, text_keys, True)]
    return math.fsum(terms) / len(terms)


def features(count: int, seed: int) -> Tensor:
    return tiny.unit(count, WIDTH, seed=seed, dtype=torch.float64)


def keys_of(ids: list[int]) -> Keys:
    return Keys(features(len(ids), 1), features(len(ids), 2), torch.tensor(ids))


CASES = {
    "no queue": ([10, 11, 12, 13], [0, 1, 2, 3]),
    "with a queue": ([10, 11, 12, 13, 1, 2, 3, 4, 5], [0, 1, 2, 3]),
    "a micro-batch in the middle of the global batch": ([10, 11, 12, 13, 1, 2], [2, 3]),
    "keys of the same image in batch and queue": ([10, 11, 10, 13, 11, 10, 7], [0, 1, 2, 3]),
    "the same image everywhere": ([10, 10, 10, 10], [0, 1, 2, 3]),
    "a batch of one with a queue": ([10, 1, 2], [0]),
    "a batch of one and a cold queue": ([10], [0]),
}


@pytest.mark.parametrize("intra_modal", [True, False], ids=["four terms", "two terms"])
@pytest.mark.parametrize("distill_weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_loss_equals_the_formula(case, distill_weight, intra_modal):
    ids, rows = case
    image, text, keys = features(len(rows), 3), features(len(rows), 4), keys_of(ids)
    state = student_state(image, text, keys, rows, distill_weight)
    loss = Contrastive(ContrastiveConfig(intra_modal=intra_modal))(state)["contrastive"]
    assert loss.item() == pytest.approx(
        by_hand(image, text, keys, rows, distill_weight, intra_modal), rel=1e-12, abs=1e-12
    )


@pytest.mark.parametrize("temperature", [0.001, 0.5])
def test_the_formula_holds_at_the_bounds_of_the_temperature(temperature):
    image, text, keys, rows = features(4, 3), features(4, 4), keys_of([1, 2, 3, 4, 5, 1]), [0, 1, 2, 3]
    state = student_state(image, text, keys, rows, 0.4, temperature)
    loss = Contrastive(ContrastiveConfig())(state)["contrastive"]
    assert loss.item() == pytest.approx(by_hand(image, text, keys, rows, 0.4, True, temperature), rel=1e-9)


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_so_that_splitting_it_changes_nothing():
    image, text, keys = features(6, 3), features(6, 4), keys_of([1, 2, 3, 1, 5, 6, 7, 2])
    objective = Contrastive(ContrastiveConfig())
    whole = objective(student_state(image, text, keys, list(range(6)), 0.4))["contrastive"]
    parts = [
        objective(student_state(image[part], text[part], keys, list(range(6))[part], 0.4))["contrastive"]
        for part in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=0)


def test_soft_targets_sum_to_1_and_the_teacher_never_names_itself_within_a_modality():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    logits[0, 0] = -torch.inf
    positives = torch.eye(3, 5, dtype=torch.bool)
    targets = soft_targets(logits, positives, 0.4)
    torch.testing.assert_close(targets.sum(-1), torch.ones(3))
    assert targets[0, 0] == pytest.approx(0.6), "the hard part alone"


def test_gradient_reaches_student_features_and_not_the_keys():
    image, text = features(3, 3).requires_grad_(), features(3, 4).requires_grad_()
    keys = keys_of([1, 2, 3, 4])
    keys.image.requires_grad_()
    Contrastive(ContrastiveConfig())(student_state(image, text, keys, [0, 1, 2], 0.4))["contrastive"].backward()
    assert image.grad is not None and image.grad.any() and text.grad is not None and text.grad.any()
    expected = torch.autograd.functional.jacobian(
        lambda value: Contrastive(ContrastiveConfig())(student_state(value, text, keys, [0, 1, 2], 0.4))["contrastive"],
        image.detach(),
    )
    torch.testing.assert_close(image.grad, expected)
