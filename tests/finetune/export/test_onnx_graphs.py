"""`--format onnx`: onnxruntime alone, without torch, makes the same features and matching logits at other batch sizes and lengths."""

from __future__ import annotations

import exported
import numpy as np
import onnx
import pytest
import torch

from finetune.export import onnx_graphs
from finetune.export.export import export
from pretrain.weights.load import load_model
from runtime.errors import CheckpointError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def theirs(place):
    return exported.outputs("onnx", {"small": exported.checkpoint("small", place / "from")}, place)["small"]


def test_another_process_makes_the_same_outputs(place, theirs, tmp_path):
    images, texts = exported.write_inputs(tmp_path / "inputs")
    opaque = [number for number, picture in enumerate(images) if picture.mode != "RGBA"]
    model = load_model(place / "from")
    with torch.no_grad():
        image, text = model.encode_image(images).numpy(), model.encode_text(texts).numpy()
        ours = model.match([images[number] for number in opaque], [texts[number] for number in opaque])
    assert np.abs(theirs["image"] - image)[opaque].max() < 1e-4 and np.abs(theirs["text"] - text).max() < 1e-4
    assert np.abs(theirs["image_1"] - image[:1]).max() < 1e-4 and np.abs(theirs["text_alone"] - text[1:2]).max() < 1e-4
    assert np.abs(theirs["image_3"] - image[:3])[[0, 1]].max() < 1e-4
    probability = torch.softmax(torch.from_numpy(theirs["matching"]), -1)[opaque, 1]
    assert torch.allclose(probability, ours, atol=1e-4) and theirs["matching_alone"].shape == (1, 2)
    assert probability.std() > 1e-3, "matching tells pairs apart"


def test_the_graphs_take_any_batch_and_length_and_uint8_pixels(place, theirs):
    def axes(name):
        graph = onnx.load(place / "small" / f"{name}.onnx").graph
        return {
            each.name: [axis.dim_param or axis.dim_value for axis in each.type.tensor_type.shape.dim]
            for each in (*graph.input, *graph.output)
        }

    assert axes("image") == {"pixels": ["batch", 3, 64, 64], "features": ["batch", 16], "tokens": ["batch", 4, 256]}
    assert axes("text")["input_ids"] == ["batch", "words"] and axes("matching")["logits"] == ["batch", 2]
    pixels = onnx.load(place / "small" / "image.onnx").graph.input[0]
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_an_architecture_that_has_no_graph_is_one_line(tmp_path, monkeypatch):
    def no_graph(*arguments, **settings):
        raise RuntimeError("no operator\nfor this")

    source = exported.checkpoint("small", tmp_path / "from")
    monkeypatch.setattr(onnx_graphs.torch.onnx, "export", no_graph)
    with pytest.raises(
        CheckpointError, match="torch cannot write the image tower as ONNX .no operator for this.; use another"
    ):
        export(source, tmp_path / "out", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["from"]
