"""Draws for a view follow torchvision's distributions, and the operations equal torchvision's."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from data_tools.config import AugmentConfig
from data_tools.pixels.operations import apply_operation
from data_tools.pixels.views import STRONGEST, View, draw_views

THEIRS = {name: name.title().replace("_", "") for name in STRONGEST}
THEIRS["auto_contrast"] = "AutoContrast"


@settings(max_examples=60)
@given(some.integers(1, 700), some.integers(1, 700), some.floats(0.01, 1), some.integers(0, 2**63 - 1))
def test_boxes_lie_inside_their_image(height, width, low, seed):
    for view in draw_views((height, width), AugmentConfig(crop_scale=[low, 1.0]), 3, seed):
        assert 0 <= view.top <= view.top + view.height <= height and view.height > 0
        assert 0 <= view.left <= view.left + view.width <= width and view.width > 0


def test_crops_are_distributed_as_torchvisions():
    image, scale, count = torch.zeros(3, 300, 400), [0.2, 1.0], 3000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        boxes = [v2.RandomResizedCrop(8, scale=tuple(scale)).make_params([image]) for _ in range(count)]
    theirs = [(box["top"], box["left"], box["height"], box["width"]) for box in boxes]
    augment = AugmentConfig(crop_scale=scale)
    ours = [(v.top, v.left, v.height, v.width) for n in range(count) for v in draw_views((300, 400), augment, 1, n)]

    def features(boxes) -> list:
        top, left, height, width = np.array(boxes, dtype=float).T
        return [height * width, width / height, top / np.maximum(1, 300 - height), left / np.maximum(1, 400 - width)]

    for one, other in zip(features(ours), features(theirs), strict=True):
        assert ks_2samp(one, other).pvalue > 0.01


@pytest.mark.parametrize("size", [(20, 1000), (1000, 20), (1, 90), (300, 2)])
def test_a_narrow_image_gives_its_middle_like_torchvision(size):
    box = v2.RandomResizedCrop(8, scale=(0.9, 1.0)).make_params([torch.zeros(3, *size)])
    view = draw_views(size, AugmentConfig(crop_scale=[0.9, 1.0]), 1, 0)[0]
    assert (view.top, view.left, view.height, view.width) == tuple(
        box[name] for name in ("top", "left", "height", "width")
    )


def test_operations_are_drawn_alike_with_torchvisions_strengths():
    drawn = [op for seed in range(3000) for op in draw_views((9, 9), AugmentConfig(magnitude=7), 1, seed)[0].operations]
    counts = Counter(name for name, _ in drawn)
    assert set(counts) == set(STRONGEST) and 520 < min(counts.values()) <= max(counts.values()) < 680
    strengths = {name: {strength for other, strength in drawn if other == name} for name in STRONGEST}
    for name, values in strengths.items():
        magnitudes, signed = v2.RandAugment._AUGMENTATION_SPACE[THEIRS[name]]
        expected = 0.0 if (table := magnitudes(11, 331, 331)) is None else float(table[7])
        expected = expected / 331 if name.startswith("translate") else expected
        assert sorted(values) == pytest.approx([-expected, expected] if signed else [0.0]), name


@pytest.mark.parametrize("name", STRONGEST)
def test_an_operation_equals_torchvisions(name):
    pixels = np.random.default_rng(0).integers(20, 200, (12, 10, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((40, 33), Image.Resampling.BICUBIC)
    for strength in (0.7 * STRONGEST[name], -0.7 * STRONGEST[name]):
        theirs = strength * {"translate_x": 40, "translate_y": 33}.get(name, 1)
        expected = v2.RandAugment()._apply_image_or_video_transform(
            image, THEIRS[name], theirs, InterpolationMode.NEAREST, {}
        )
        result = apply_operation(image, name, strength)
        assert np.array_equal(result, expected)
        assert name == "identity" or not np.array_equal(result, image)
        # The same on tensors, a batch at a time: equal but for what lies on an edge between two pixels.
        batch = functional.pil_to_tensor(image).expand(2, -1, -1, -1)
        tensors = apply_operation(batch, name, strength).permute(0, 2, 3, 1).numpy().astype(int)
        assert (np.abs(tensors - np.asarray(result)) > 1).mean() < 0.01


def test_draws_never_change_between_versions():
    """Runs go on after an upgrade with the augmentations they began with."""
    first, second = draw_views((480, 640), AugmentConfig(), 2, 12345)
    assert first == View(12, 86, 466, 352, True, (("shear_x", -0.3 * 7 / 10), ("shear_x", 0.3 * 7 / 10)))
    assert second == View(13, 123, 402, 417, True, (("equalize", 0.0), ("equalize", 0.0)))


def test_without_a_crop_or_operations_only_flips_are_drawn():
    views = draw_views((30, 40), AugmentConfig(crop_scale=[1.0, 1.0], operations=0), 64, 3)
    assert {(v.top, v.left, v.height, v.width, v.operations) for v in views} == {(0, 0, 30, 40, ())}
    assert 16 < sum(view.mirrored for view in views) < 48
