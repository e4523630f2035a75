"""The teacher: a float32 average of float32 masters, held against the formula in float64."""

from __future__ import annotations

import pytest
import tiny
import torch

from pretrain.teacher import Teacher

MOMENTUM = 0.995


def masters_after(step: int, student) -> dict[str, torch.Tensor]:
    """Weights that wander: a sum of small random steps, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in student.named_parameters()
    }


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_teacher_follows_the_formula_over_200_steps(precision):
    student = tiny.model()
    teacher = Teacher(student, MOMENTUM, precision)
    expected = {name: average.double() for name, average in teacher.averages.items()}
    start = {name: average.clone() for name, average in teacher.averages.items()}
    for step in range(200):
        masters = masters_after(step, student)
        teacher.update(masters.items())
        for name, average in expected.items():
            expected[name] = MOMENTUM * average + (1 - MOMENTUM) * masters[name].double()
    for name, average in teacher.averages.items():
        assert average.dtype == torch.float32
        error, moved = (average - expected[name]).norm(), (expected[name] - start[name]).norm()
        assert error < 1e-4 * moved, name


def test_the_bf16_copy_is_a_cast_of_averages_that_stay_float32():
    student = tiny.model()
    teacher = Teacher(student, MOMENTUM, torch.bfloat16)
    for step in range(3):
        teacher.update(masters_after(step, student).items())
    for name, parameter in teacher.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, teacher.averages[name].bfloat16()), name
    assert {buffer.dtype for buffer in teacher.model.buffers()} == {torch.float32}, "pixel statistics are not rounded"


def test_the_teacher_has_the_modules_of_albefs_and_no_more():
    student = tiny.model()
    names = set(Teacher(student, MOMENTUM).averages)
    without = {name for name, _ in student.named_parameters()} - names
    assert without == {"codebook", "matching_head.weight", "matching_head.bias", "temperature.logit"}
    assert names < {name for name, _ in student.named_parameters()}


def test_the_teacher_is_outside_the_student_without_gradient_or_dropout():
    student = tiny.model()
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    teacher = Teacher(student, MOMENTUM)
    masters = {name: parameter + 1 for name, parameter in student.named_parameters()}
    teacher.update((name, master.detach()) for name, master in masters.items())
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.named_parameters())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_teacher_weights_survive_saving_and_loading(precision):
    student = tiny.model()
    teacher, other = Teacher(student, MOMENTUM, precision), Teacher(tiny.model(seed=1), MOMENTUM, precision)
    other.load({name: average.clone() for name, average in teacher.averages.items()})
    images = tiny.batch(4)["images"][0]
    assert torch.equal(other.model.image_encoder(images), teacher.model.image_encoder(images))


def test_a_missing_master_is_an_error():
    student = tiny.model()
    teacher = Teacher(student, MOMENTUM)
    with pytest.raises(AssertionError, match="every weight of the teacher has a master"):
        teacher.update([("image_projection.weight", student.image_projection.weight.data)])


def test_over_2000_bf16_steps_the_error_is_below_a_thousandth_of_the_distance():
    """Masters move in float32, as those of a bf16 run do, and the teacher averages them: held against float64. An average
    kept in bf16 would not have moved, because (1 - momentum) of a step is below its resolution."""
    student = tiny.model(tiny.recipe(model__image__depth=1))
    teacher = Teacher(student, MOMENTUM, torch.bfloat16)
    masters = {name: average.clone() for name, average in teacher.averages.items()}
    generator = torch.Generator().manual_seed(0)
    drift = [1e-4 * torch.randn(master.shape, generator=generator) for master in masters.values()]
    watched = ("text_encoder.words.weight", "image_projection.bias", "image_encoder.vit.blocks.0.mlp.fc1.weight")
    start = {name: masters[name].double() for name in watched}
    expected, in_bf16 = dict(start), {name: masters[name].bfloat16() for name in watched}
    for step in range(2000):
        torch._foreach_add_(list(masters.values()), drift, alpha=1 + (step % 7 - 3) / 3)
        for name in watched:
            expected[name] = torch.lerp(expected[name], masters[name].double(), 1 - MOMENTUM)
            in_bf16[name].mul_(MOMENTUM).add_(masters[name].bfloat16(), alpha=1 - MOMENTUM)
        teacher.update(masters.items())
    for name in watched:
        moved = (expected[name] - start[name]).norm()
        assert (teacher.averages[name] - expected[name]).norm() < 1e-3 * moved, name
    moved = (expected[watched[0]] - start[watched[0]]).norm()
    assert (in_bf16[watched[0]] - expected[watched[0]]).norm() > 0.1 * moved


def test_the_distance_is_that_of_all_weights_relative_to_the_students():
    student = tiny.model()
    teacher = Teacher(student, MOMENTUM)
    masters = {name: parameter.detach() * 1.25 for name, parameter in student.named_parameters()}
    assert float(teacher.distance(masters.items())) == pytest.approx(0.25 / 1.25)


def test_albefs_order_of_the_average_gives_the_same_teacher_to_every_forward():
    """ALBEF averages within the forward, before the teacher encodes; here it follows the optimizer's step. Both use theta_k."""
    albef, ours = Teacher(tiny.model(), MOMENTUM), Teacher(tiny.model(), MOMENTUM)
    student = tiny.model()
    masters = {name: parameter.data.clone() for name, parameter in student.named_parameters()}
    for step in range(4):
        albef.update(masters.items())
        for name, average in albef.averages.items():
            torch.testing.assert_close(ours.averages[name], average, msg=f"{name} in the forward of step {step}")
        masters = masters_after(step, student)  # the optimizer's step
        ours.update(masters.items())
