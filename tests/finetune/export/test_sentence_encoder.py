"""`--format sentence-transformers`: SentenceTransformer alone makes the same features of texts and of images."""

from __future__ import annotations

import exported
import numpy as np
import pytest
import torch

from finetune.export.export import export
from finetune.heads.decomposed import LoadedVLDeformer
from pretrain.weights.load import load_model
from runtime.errors import CheckpointError


def test_another_process_makes_the_same_features(tmp_path):
    folders = {"vit": exported.checkpoint("vit", tmp_path / "from" / "vit")}
    folders["apart"] = exported.vldeformer("single_stream", "mean", tmp_path / "from" / "apart")
    theirs = exported.outputs("sentence-transformers", folders, tmp_path)
    images, texts = exported.write_inputs(tmp_path / "again")
    models = {"vit": load_model(folders["vit"]), "apart": LoadedVLDeformer(folders["apart"])}
    for name, model in models.items():
        with torch.no_grad():
            image, text = model.encode_image(images).numpy(), model.encode_text(texts).numpy()
        actual = theirs[name]
        assert np.abs(actual["image"] - image).max() < 1e-5 and np.abs(actual["text"] - text).max() < 1e-5
        assert np.abs(actual["image_alone"] - image[1:2]).max() < 1e-5
        assert np.abs(actual["text_alone"] - text[1:2]).max() < 1e-5
        assert np.abs(actual["similarity"] - image @ text.T).max() < 1e-5
        assert actual["width"] == image.shape[1]


def test_a_model_without_text_features_is_refused(tmp_path):
    source = exported.checkpoint("no_text_layers", tmp_path / "from")
    with pytest.raises(CheckpointError, match="a text has no vector"):
        export(source, tmp_path / "out", "sentence-transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["from"]
