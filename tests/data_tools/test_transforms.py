"""Any view is a function of its seed, and what a plain pipeline would have made."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.config import AugmentConfig
from data_tools.transforms import EvaluationTransform, TrainTransform

RED, GREEN = (255, 0, 0), (0, 255, 0)


def noise(mode: str = "RGB", size: tuple[int, int] = (24, 18), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(params=[{}, {"operations": 0}, {"flip": False, "crop_scale": [1.0, 1.0]}], ids=str)
def transform(request):
    return TrainTransform(16, AugmentConfig(**request.param), views=2)


def test_views_are_a_function_of_the_seed(transform):
    first = transform(noise(), 5)
    torch.rand(3)
    assert torch.equal(first, transform(noise(), 5))
    assert first.shape == (2, 3, 16, 16) and first.dtype == torch.uint8


def test_other_seeds_give_other_views(transform):
    assert len({transform(noise(), seed).numpy().tobytes() for seed in range(8)}) > 4


def test_the_two_views_of_an_image_differ():
    one, other = TrainTransform(16, AugmentConfig(), views=2)(noise(), 5)
    assert not torch.equal(one, other)


def test_the_first_view_does_not_depend_on_how_many_there_are():
    one = TrainTransform(16, AugmentConfig(), views=1)(noise(), 5)
    assert torch.equal(one[0], TrainTransform(16, AugmentConfig(), views=2)(noise(), 5)[0])


def test_no_global_generator_is_touched(transform, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU's generator was seeded"))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    transform(noise(), 5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_without_flips_left_stays_left():
    image = Image.new("RGB", (32, 32), GREEN)
    image.paste(RED, (0, 0, 16, 32))
    views = TrainTransform(16, AugmentConfig(flip=False, operations=0, crop_scale=[1, 1]), views=8)(image, 0)
    assert (views[:, 0, 8, 2] > 200).all() and (views[:, 1, 8, 13] > 200).all()


def test_with_flips_about_half_are_mirrored():
    image = Image.new("RGB", (32, 32), GREEN)
    image.paste(RED, (0, 0, 16, 32))
    views = TrainTransform(16, AugmentConfig(operations=0, crop_scale=[1, 1]), views=64)(image, 0)
    assert 16 < (views[:, 1, 8, 2] > 200).sum() < 48


def test_operations_leave_colours_alone():
    """A red image stays red: captions name colours."""
    for seed in range(40):
        views = TrainTransform(16, AugmentConfig(operations=3, magnitude=10), views=1)(
            Image.new("RGB", (32, 32), RED), seed
        )
        covered = views[0, 0] > 20  # what a shift or a turn uncovers is black
        assert (views[0, 1][covered] < 60).all() and (views[0, 2][covered] < 60).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (300, 2)])
def test_odd_shapes_become_squares(size, transform):
    assert transform(noise(size=size), 3).shape == (2, 3, 16, 16)
    assert EvaluationTransform(16)(noise(size=size)).shape == (3, 16, 16)


def test_evaluation_sees_the_whole_image():
    image = Image.new("RGB", (64, 16), GREEN)
    image.paste(RED, (0, 0, 32, 16))
    seen = EvaluationTransform(16)(image)
    assert seen.dtype == torch.uint8
    assert (seen[0, :, :7] > 240).all() and (seen[1, :, 9:] > 240).all()


def test_evaluation_takes_images_of_other_modes():
    assert EvaluationTransform(16)(noise("L")).shape == (3, 16, 16)
