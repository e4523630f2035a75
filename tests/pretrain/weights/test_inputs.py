"""What `encode_image`, `encode_text` and `match` accept: every kind gives the same pixels, any other is one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pretrain.weights.inputs import read_images, read_texts
from runtime.errors import DataError


def transform(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


ARRAY = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
PIXELS = torch.from_numpy(ARRAY).permute(2, 0, 1)


def test_every_kind_of_image_gives_the_same_pixels(tmp_path):
    picture, path = Image.fromarray(ARRAY), tmp_path / "picture.png"
    picture.save(path)
    for one in (picture, path, str(path), ARRAY, PIXELS, PIXELS[None]):
        assert torch.equal(read_images(one, transform), PIXELS[None])
    many = [picture, path, str(path), ARRAY, PIXELS]
    assert torch.equal(read_images(many, transform), torch.stack([PIXELS] * 5))
    assert torch.equal(read_images(np.stack([ARRAY, ARRAY]), transform), torch.stack([PIXELS] * 2))


@pytest.mark.parametrize(
    "wrong", [PIXELS / 255, PIXELS[0], ARRAY / 255, ARRAY[..., 0], ARRAY.transpose(2, 0, 1), [], [3], 3, b"png", None]
)
def test_other_images_are_refused_in_one_line(wrong):
    with pytest.raises(DataError) as error:
        read_images(wrong, transform)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_image_is_named(tmp_path):
    with pytest.raises(DataError, match="missing.png"):
        read_images(tmp_path / "missing.png", transform)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError):
        read_images(Path(tmp_path / "text.png"), transform)


def test_one_string_is_one_text():
    assert read_texts("red") == ["red"] and read_texts(("red", "blue")) == ["red", "blue"]
    for wrong in (3, b"red", ["red", 3], [["red"]], None):
        with pytest.raises(DataError, match="string"):
            read_texts(wrong)
