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
def test_it_follows_the_formula_over_200_steps(precision):
    student = tiny.model()
    teacher = Teacher(student, MOMENTUM, precision)
    wanted = {name: average.double() for name, average in teacher.averages.items()}
    start = {name: average.clone() for name, average in teacher.averages.items()}
    for step in range(200):
        masters = masters_after(step, student)
        teacher.update(masters.items())
        for name, average in wanted.items():
            wanted[name] = MOMENTUM * average + (1 - MOMENTUM) * masters[name].double()
    for name, average in teacher.averages.items():
        assert average.dtype == torch.float32
        error, moved = (average - wanted[name]).norm(), (wanted[name] - start[name]).norm()
        assert error < 1e-4 * moved, name


def test_its_bf16_copy_is_a_cast_of_the_averages_while_these_lose_nothing():
    student = tiny.model()
    teacher = Teacher(student, MOMENTUM, torch.bfloat16)
    for step in range(3):
        teacher.update(masters_after(step, student).items())
    for name, parameter in teacher.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, teacher.averages[name].bfloat16()), name
    assert {buffer.dtype for buffer in teacher.model.buffers()} == {torch.float32}, "pixel statistics are not rounded"


def test_it_has_what_albefs_has_and_no_more():
    student = tiny.model()
    names = set(Teacher(student, MOMENTUM).averages)
    without = {name for name, _ in student.named_parameters()} - names
    assert without == {"codebook", "matching_head.weight", "matching_head.bias", "temperature.logit"}
    assert names < {name for name, _ in student.named_parameters()}


def test_it_is_no_part_of_the_student_takes_no_gradient_and_uses_no_dropout():
    student = tiny.model()
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    teacher = Teacher(student, MOMENTUM)
    masters = {name: parameter + 1 for name, parameter in student.named_parameters()}
    teacher.update((name, master.detach()) for name, master in masters.items())
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.named_parameters())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_its_weights_go_round(precision):
    student = tiny.model()
    teacher, other = Teacher(student, MOMENTUM, precision), Teacher(tiny.model(seed=1), MOMENTUM, precision)
    other.load({name: average.clone() for name, average in teacher.averages.items()})
    images = tiny.batch(4)["images"][0]
    assert torch.equal(other.model.image_encoder(images), teacher.model.image_encoder(images))


def test_a_master_that_is_missing_is_noticed():
    student = tiny.model()
    teacher = Teacher(student, MOMENTUM)
    with pytest.raises(AssertionError, match="every weight of the teacher has a master"):
        teacher.update([("image_projection.weight", student.image_projection.weight.data)])
