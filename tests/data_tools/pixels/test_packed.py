"""Views made on the device equal the views that workers make, for any batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import ShardStream
from data_tools.config import AugmentConfig
from data_tools.pixels.packed import PackedImages, join_images, render_views
from data_tools.pixels.transforms import TrainTransform
from data_tools.pixels.views import View

SIZES = [(61, 90), (150, 40), (200, 230), (1, 7)]
CPU = torch.device("cpu")


def smooth(size: tuple[int, int], seed: int) -> np.ndarray:
    """A picture with edges and slopes rather than noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def views_of_both(size: int = 48, seeds: range = range(4), **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the views made by the workers and by the device, each (views, images, 3, size, size), of the same images."""
    results = []
    for where in ("workers", "device"):
        transform = TrainTransform(size, AugmentConfig(where=where, **settings), 2)
        images = [transform(smooth(shape, seed), seed) for shape in SIZES for seed in seeds]
        results.append(render_views(join_images(images), CPU))
    return results[0], results[1]


def test_the_device_makes_the_views_that_workers_would_make():
    workers, device = views_of_both(operations=0)
    assert workers.shape == device.shape == (2, 16, 3, 48, 48) and device.dtype == torch.uint8
    apart = (workers.int() - device.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 0.03
    wrong = (workers.int() - device.flip(-1).int()).abs().float().mean()
    assert wrong > 10, "the comparison tells views apart"


def test_operations_on_the_device_are_those_of_the_workers():
    workers, device = views_of_both(operations=2, seeds=range(8))
    apart = (workers.int() - device.int()).abs().float()
    # Rounding before an operation can move a pixel over an edge, or a whole shade of an equalised picture.
    assert apart.mean() < 0.03 and (apart > 2).float().mean() < 0.001
    unchanged, _ = views_of_both(operations=0, seeds=range(8))
    assert (unchanged.int() - device.int()).abs().float().mean() > 10


def test_a_view_does_not_depend_on_what_shares_its_batch():
    transform = TrainTransform(32, AugmentConfig(where="device"), 2)
    images = [transform(smooth(size, 1), 5) for size in SIZES]
    alone = torch.cat([image.render(CPU) for image in images], dim=1)
    assert torch.equal(join_images(images).render(CPU), alone)
    assert torch.equal(join_images(images[::-1]).render(CPU), alone.flip(1))


def test_only_what_the_views_show_travels():
    pixels = smooth((100, 200), 0)
    views = [View(10, 20, 30, 40), View(25, 5, 30, 20)]
    packed = PackedImages.of(pixels, views, 8)
    assert packed.sizes == [(45, 55)] and packed.pixels.shape == (45 * 55 * 3,)
    assert packed.views == [[View(0, 15, 30, 40), View(15, 0, 30, 20)]]
    assert torch.equal(packed.pixels.view(45, 55, 3), torch.from_numpy(pixels[10:55, 5:60]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_packed_batches_is_the_stream_of_views(drawn, workers):
    def read(where: str, workers: int) -> list[dict]:
        transform = TrainTransform(24, AugmentConfig(where=where, operations=0), 2)
        return list(itertools.islice(ShardStream(drawn / "train", 8, workers=workers, transform=transform), 4))

    for views, packed in zip(read("workers", 0), read("device", workers), strict=True):
        assert views["keys"] == packed["keys"] and isinstance(packed["images"], PackedImages)
        assert len(packed["images"]) == 8
        apart = views["images"].int() - render_views(packed["images"], CPU).int()
        assert apart.abs().max() <= 3 and apart.abs().float().mean() < 0.03  # drawn edges overshoot
