"""Each loss reaches the stated parameters, and a step runs in the stated order."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from data_tools.config import AugmentConfig
from data_tools.pixels.packed import join_images
from data_tools.pixels.transforms import TrainTransform
from pretrain.objectives import codebook
from pretrain.task import PretrainTask

OBJECTIVES = ("contrastive", "matching", "masked_language", "codebook")
NAMES = [name for name, _ in tiny.model().named_parameters()]


def named(*beginnings: str, without: tuple[str, ...] = ()) -> set[str]:
    chosen = {name for name in NAMES if name.startswith(beginnings)}
    assert all(any(name.startswith(beginning) for name in NAMES) for beginning in (*beginnings, *without))
    return {name for name in chosen if not name.startswith(without)} if without else chosen


ENCODERS = named("image_encoder", "text_encoder")
REACHED = {
    "contrastive": ENCODERS | named("image_projection", "text_projection", "temperature"),
    "matching": ENCODERS | named("fusion_encoder", "matching_head"),
    "masked_language": ENCODERS | named("fusion_encoder", "masked_language_head"),
    "codebook": ENCODERS | named("image_projection", "text_projection", "codebook"),
}


def only(objective: str, **changes) -> PretrainTask:
    weights = {f"objectives__{name}__weight": 0.0 for name in OBJECTIVES if name != objective}
    return tiny.task(tiny.recipe(**weights, **changes))


def gradients(task: PretrainTask, size: int = 8) -> dict[str, torch.Tensor | None]:
    inputs, _ = task.prepare(tiny.batch(size), 1.0, size)
    task.student(inputs[0])[0].backward()
    return {name: parameter.grad for name, parameter in task.student.model.named_parameters()}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_loss_reaches_these_parameters_and_no_others(objective):
    by_name = gradients(only(objective))
    reached = {name for name, gradient in by_name.items() if gradient is not None}
    assert reached == REACHED[objective]
    zero = {name for name in reached if not by_name[name].any()}
    assert not zero, "a gradient that is zero everywhere is none"


def test_together_they_reach_everything():
    by_name = gradients(tiny.task(tiny.recipe()))
    assert {name for name, gradient in by_name.items() if gradient is not None and gradient.any()} == set(NAMES)


def test_intra_modal_terms_off_reach_the_same():
    by_name = gradients(only("contrastive", objectives__contrastive__intra_modal=False))
    assert {name for name, gradient in by_name.items() if gradient is not None} == REACHED["contrastive"]


def test_the_total_is_the_weighted_sum_of_the_named_losses():
    weights = {"contrastive": 0.5, "matching": 2.0, "masked_language": 3.0, "codebook": 0.25}
    task = tiny.task(tiny.recipe(**{f"objectives__{name}__weight": weight for name, weight in weights.items()}))
    (inputs,), _ = task.prepare(tiny.batch(8), 1.0, 8)
    total, figures = task.student(inputs)
    torch.testing.assert_close(total, sum(weight * figures[name] for name, weight in weights.items()))
    assert not any(figure.requires_grad for figure in figures.values())


def test_an_objective_with_weight_0_is_not_computed():
    task = only("contrastive")
    (inputs,), figures = task.prepare(tiny.batch(8), 1.0, 8)
    assert inputs.masked is None and inputs.plans is None
    assert set(task.student(inputs)[1]) == {"loss", "contrastive", "temperature"} and set(figures) == {"distill_weight"}


def test_a_model_without_codebook_or_fusion_encoder_trains_what_it_has():
    weights = {f"objectives__{name}__weight": 0.0 for name in OBJECTIVES[1:]}
    task = tiny.task(tiny.recipe(model__codewords=0, model__fusion={"layers": 0}, **weights))
    by_name = gradients(task)
    assert {name for name, gradient in by_name.items() if gradient is not None} >= REACHED["contrastive"]


def test_distillation_ramps_from_0_over_the_first_epoch():
    task = tiny.task(tiny.recipe())
    for epoch, expected in ((0.0, 0.0), (0.25, 0.1), (1.0, 0.4), (7.5, 0.4)):
        (inputs,), figures = task.prepare(tiny.batch(8), epoch, 8)
        assert inputs.distill_weight == pytest.approx(expected) == float(figures["distill_weight"])
        assert (inputs.masked.teacher_logits is None) == (expected == 0)


def test_keys_are_the_teachers_features_of_the_batch_and_then_the_queue():
    task = tiny.task(tiny.recipe())
    batch = tiny.batch(8)
    teacher = task.teacher.model
    with torch.no_grad():
        expected = teacher.image_features(teacher.image_encoder(batch["images"][1]))
    (inputs,), _ = task.prepare(batch, 1.0, 8)
    assert torch.equal(inputs.keys.image, expected), "of the second view; the queue is empty"
    assert torch.equal(inputs.images, batch["images"][0]), "the student sees the first"
    task.finish((name, parameter.data) for name, parameter in task.student.model.named_parameters())
    (inputs,), _ = task.prepare(tiny.batch(8, step=1), 1.0, 8)
    assert len(inputs.keys.image_ids) == 16 and torch.equal(inputs.keys.image[8:], expected)
    assert torch.equal(inputs.keys.image_ids[8:], batch["image_ids"])


def test_the_queues_keys_join_from_the_epoch_that_the_recipe_says_though_it_fills_before():
    task = tiny.task(tiny.recipe(teacher__queue_from_epoch=2.0))
    for step, (epoch, keys) in enumerate([(0.0, 8), (1.9, 8), (2.0, 24), (3.0, 32)]):
        (inputs,), _ = task.prepare(tiny.batch(8, step), epoch, 8)
        assert len(inputs.keys.image) == len(inputs.keys.text) == len(inputs.keys.image_ids) == keys
        task.finish((name, parameter.data) for name, parameter in task.student.model.named_parameters())


def test_teacher_and_queue_move_only_when_a_step_is_finished():
    task = tiny.task(tiny.recipe(transport__warm_start=True))
    before = {name: average.clone() for name, average in task.teacher.averages.items()}
    (inputs,), _ = task.prepare(tiny.batch(8), 1.0, 8)
    task.student(inputs)[0].backward()
    assert task.queue.filled == 0 and task.potentials is None
    assert all(torch.equal(average, before[name]) for name, average in task.teacher.averages.items())
    task.finish((name, parameter.data + 1) for name, parameter in task.student.model.named_parameters())
    assert task.queue.filled == 8 and task.potentials.shape == (2, 16)
    torch.testing.assert_close(task.teacher.averages["image_projection.bias"], before["image_projection.bias"] + 0.1)


@pytest.mark.parametrize("changes", [{}, {"objectives__codebook__features": "student", "model__text__dropout": 0.5}])
def test_what_is_prepared_is_a_function_of_the_batch_and_not_of_the_random_state(changes):
    task = tiny.task(tiny.recipe(**changes))
    task.student.train()
    batch = tiny.batch(8)
    prepared = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        (inputs,), _ = task.prepare(batch, 1.0, 8)
        prepared.append(inputs)
    first, second = prepared
    assert torch.equal(first.plans.image, second.plans.image) and torch.equal(first.plans.text, second.plans.text)
    assert torch.equal(first.draws, second.draws) and torch.equal(first.masked.text.ids, second.masked.text.ids)
    assert task.student.model.training, "the student's mode is left as it was"


@pytest.mark.parametrize("solver", ["ipot", "sinkhorn"])
def test_a_plan_starts_where_the_step_before_ended_and_is_the_same_within_the_tolerance(solver, monkeypatch):
    started = []
    solve = {"ipot": "proximal_point", "sinkhorn": "sinkhorn"}[solver]
    real = getattr(codebook, solve)
    monkeypatch.setattr(codebook, solve, lambda *given: (started.append(given[-1]), real(*given))[1])
    settings = {"transport__solver": solver, "transport__sinkhorn_steps": 5000}
    warm, cold = tiny.task(tiny.recipe(**settings, transport__warm_start=True)), tiny.task(tiny.recipe(**settings))
    for step in range(2):
        pair = []
        for task in (warm, cold):
            (inputs,), figures = task.prepare(tiny.batch(8, step), 1.0, 8)
            assert figures["codebook/column_error"] <= 1e-3
            pair.append(inputs.plans.image)
            task.finish((name, parameter.data) for name, parameter in task.student.model.named_parameters())
        assert (pair[0] - pair[1]).abs().sum(-1).mean() <= 0.02
    assert [start is not None for start in started] == [False, False, True, False]


def test_plans_from_the_students_features_differ_once_teacher_and_student_do():
    task = tiny.task(tiny.recipe(objectives__codebook__features="student", teacher__second_view=False))
    same = tiny.task(tiny.recipe(teacher__second_view=False))
    batch = tiny.batch(8)
    batch["images"] = batch["images"][:1]
    torch.testing.assert_close(
        task.prepare(batch, 1.0, 8)[0][0].plans.image, same.prepare(batch, 1.0, 8)[0][0].plans.image
    )
    for either in (task, same):
        either.student.model.load_state_dict(tiny.model(seed=3).state_dict())
    assert not torch.allclose(
        task.prepare(batch, 1.0, 8)[0][0].plans.image, same.prepare(batch, 1.0, 8)[0][0].plans.image, atol=1e-3
    )


def test_the_queue_joins_the_plan_where_the_recipe_says_so():
    task = tiny.task(tiny.recipe(transport__samples="batch+queue"))
    alone = tiny.task(tiny.recipe())
    for step in range(2):
        plans = []
        for either in (task, alone):
            (inputs,), _ = either.prepare(tiny.batch(8, step), 1.0, 8)
            assert inputs.plans.image.shape == (8, 16)
            plans.append(inputs.plans.image)
            either.finish((name, parameter.data) for name, parameter in either.student.model.named_parameters())
        assert torch.allclose(*plans) == (step == 0), "the queue is empty at first"


def test_views_made_on_the_device_reach_student_and_teacher():
    """`augment.where: device`: the step is that of the views it packs."""
    augment = AugmentConfig(where="device")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    packed = join_images([TrainTransform(tiny.IMAGE, augment, 2)(pixels, seed) for seed in range(8)])
    prepared = []
    for images in (packed, packed.render("cpu")):
        (inputs,), _ = tiny.task(tiny.recipe()).prepare(tiny.batch(8) | {"images": images}, 1.0, 8)
        prepared.append((inputs.images, inputs.keys.image))
    assert torch.equal(prepared[0][0], prepared[1][0]) and torch.equal(prepared[0][1], prepared[1][1])
