"""A loaded model's methods: one input is one row, and what would silently be another answer is refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from pretrain import load_model
from runtime.errors import DataError


def test_one_input_is_one_row_and_unequal_pairs_are_refused(pretrained):
    model = load_model(pretrained)
    picture = Image.new("RGB", (32, 32), "red")
    pixels = model.transform(picture)[None]
    network = model.network
    assert torch.equal(model.encode_image(picture), network.image_features(network.image_encoder(pixels)))
    assert model.encode_text("red").shape[0] == 1
    assert torch.equal(model.encode_text("red"), model.encode_text(["red"]))
    assert torch.equal(model.match(picture, "red"), model.match([picture], ["red"]))
    with pytest.raises(DataError, match="2 images need as many texts, not 1"):
        model.match([picture, picture], "red")
    with pytest.raises(DataError, match="float32"):
        model.encode_image(torch.zeros(1, 3, 32, 32))
