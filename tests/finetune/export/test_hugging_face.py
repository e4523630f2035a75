"""`--format hf`: transformers alone makes the same features and matching logits of the exported folder."""

from __future__ import annotations

import json

import exported
import numpy as np
import pytest
import torch

from finetune.export.export import export
from finetune.heads.decomposed import LoadedVLDeformer
from pretrain.weights.load import load_model
from runtime.errors import CheckpointError

MODELS = ("vit", "narrow", "single_stream", "cnn", "query", "swin", "no_text_layers")
VLDEFORMERS = {"apart": ("vit", "mean"), "apart_single": ("single_stream", "cls"), "apart_wide": ("narrow", "mean")}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    place = tmp_path_factory.mktemp("hf")
    folders = {name: exported.checkpoint(name, place / "from" / name) for name in MODELS}
    for name, (start, pooling) in VLDEFORMERS.items():
        folders[name] = exported.vldeformer(start, pooling, place / "from" / name)
    return place, folders


@pytest.fixture(scope="module")
def theirs(places):
    place, folders = places
    return exported.outputs("hf", folders, place)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return exported.write_inputs(tmp_path_factory.mktemp("inputs") / "inputs")


def close(actual, expected):
    return actual.shape == tuple(expected.shape) and np.abs(actual - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("name", [*MODELS, *VLDEFORMERS])
def test_another_process_makes_the_same_features(places, theirs, inputs, name):
    (images, texts), actual = inputs, theirs[name]
    model = LoadedVLDeformer(places[1][name]) if name in VLDEFORMERS else load_model(places[1][name])
    with torch.no_grad():
        if name == "no_text_layers":
            assert "text" not in actual
        else:
            image, text = model.encode_image(images), model.encode_text(texts)
            assert close(actual["image"], image) and close(actual["image_alone"], image[1:2])
            assert "saved_again" not in actual or close(actual["saved_again"], image)
            assert close(actual["text"], text) and close(actual["text_alone"], model.encode_text(texts[1:2]))
            assert np.abs(actual["text"][0] - actual["text"][1]).max() > 1e-2, "the features tell texts apart"
            scale = 1.0 if name in VLDEFORMERS else 1 / model.network.temperature()
            assert np.abs(actual["logits"] - (image @ text.T * scale).numpy()).max() < 1e-3
        fused = name in MODELS and exported.MODELS[name][2][1] > 0
        assert ("matching" in actual) == fused
        if fused:
            probability = torch.softmax(torch.from_numpy(actual["matching"]), -1)[:, 1]
            assert torch.allclose(probability, model.match(images, texts), atol=1e-5)


def test_the_folder_holds_no_more_than_it_needs(theirs, places):
    assert sorted(path.name for path in (places[0] / "vit").iterdir() if path.is_file()) == [
        "README.md", "config.json", "model.safetensors", "modeling_ligature.py", "preprocessor_config.json",
        "processing_ligature.py", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((places[0] / "cnn" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_ligature.LigatureModel" and config["image"]["weights"] == "none"


def test_an_export_that_computes_something_else_is_not_kept(places, tmp_path, monkeypatch):
    from finetune.export import modeling_ligature

    monkeypatch.setattr(modeling_ligature, "masked_mean", lambda states, mask: states.mean(1))
    with pytest.raises(CheckpointError, match="transformers makes other text features"):
        export(places[1]["single_stream"], tmp_path / "out", "hf")
    assert not list(tmp_path.iterdir())
