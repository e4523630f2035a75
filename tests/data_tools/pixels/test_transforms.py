"""A view is a function of its seed and equals the result of a plain pipeline."""

from __future__ import annotations

import io
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.config import AugmentConfig
from data_tools.pixels.decode import decode_image, decode_pixels
from data_tools.pixels.transforms import EvaluationTransform, TrainTransform
from data_tools.pixels.views import draw_views

RED, GREEN = (255, 0, 0), (0, 255, 0)


def noise(size: tuple[int, int] = (24, 18), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def halves(width: int = 32, height: int = 32) -> np.ndarray:
    """The left half red, the right one green."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = RED, GREEN
    return pixels


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
    views = TrainTransform(16, AugmentConfig(flip=False, operations=0, crop_scale=[1, 1]), views=8)(halves(), 0)
    assert (views[:, 0, 8, 2] > 200).all() and (views[:, 1, 8, 13] > 200).all()


def test_with_flips_about_half_are_mirrored():
    views = TrainTransform(16, AugmentConfig(operations=0, crop_scale=[1, 1]), views=64)(halves(), 0)
    assert 16 < (views[:, 1, 8, 2] > 200).sum() < 48


def test_operations_leave_colours_alone():
    """A red image stays red: captions name colours."""
    for seed in range(40):
        views = TrainTransform(16, AugmentConfig(operations=3, magnitude=10), views=1)(
            np.full((32, 32, 3), RED, dtype=np.uint8), seed
        )
        covered = views[0, 0] > 20  # what a shift or a turn uncovers is black
        assert (views[0, 1][covered] < 60).all() and (views[0, 2][covered] < 60).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (300, 2)])
def test_odd_shapes_become_squares(size, transform):
    assert transform(noise(size=size), 3).shape == (2, 3, 16, 16)
    assert EvaluationTransform(16)(Image.fromarray(noise(size=size))).shape == (3, 16, 16)


def test_views_of_photos_are_what_pillow_makes_of_the_same_crops(shared_data):
    with tarfile.open(shared_data / "data" / "cc12m_test" / "cc12m-train-0000.tar") as tar:
        photos = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")][:12]
    augment = AugmentConfig(operations=0)
    differences = []
    for seed, data in enumerate(photos):
        image = decode_image(data)
        views = draw_views((image.height, image.width), augment, 2, seed)
        transformed = TrainTransform(64, augment, 2)(decode_pixels(data), seed)
        for view, pixels in zip(views, transformed, strict=True):
            crop = image.crop((view.left, view.top, view.left + view.width, view.top + view.height))
            plain = crop.resize((64, 64), Image.Resampling.BICUBIC)
            plain = plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.mirrored else plain
            differences.append(np.abs(np.asarray(plain).astype(int) - pixels.permute(1, 2, 0).numpy()))
    assert np.mean(differences) < 0.03 and np.max(differences) <= 1
    assert {view.mirrored for seed in range(12) for view in draw_views((9, 9), augment, 2, seed)} == {True, False}


def test_evaluation_sees_the_whole_image():
    seen = EvaluationTransform(16)(Image.fromarray(halves(64, 16)))
    assert seen.dtype == torch.uint8
    assert (seen[0, :, :7] > 240).all() and (seen[1, :, 9:] > 240).all()


def test_evaluation_resizes_with_pillow():
    image = Image.fromarray(noise(size=(90, 61)))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(EvaluationTransform(32)(image).permute(1, 2, 0), expected)


def test_evaluation_takes_images_as_a_user_opens_them():
    """Other modes and pictures on their side become what decoding would make of them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for form, mode, options in [
        ("PNG", "L", {}),
        ("PNG", "RGBA", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"exif": exif}),
    ]:
        buffer = io.BytesIO()
        image = Image.fromarray(halves()).convert(mode)
        if mode == "RGBA":
            image.putalpha(Image.linear_gradient("L").resize((32, 32)))
        image.save(buffer, form, **options)
        opened, decoded = Image.open(buffer), decode_image(buffer.getvalue())
        assert torch.equal(EvaluationTransform(16)(opened), EvaluationTransform(16)(decoded))
    assert (EvaluationTransform(16)(opened)[0, :7] > 200).all(), "what is stored to the left is shown on top"
