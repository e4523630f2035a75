"""`--format open_clip`: open_clip alone makes the same features, or the export is refused with the reason."""

from __future__ import annotations

import exported
import numpy as np
import pytest
import torch

from finetune.export.export import export
from finetune.export.open_clip_model import to_bert
from pretrain.weights.load import load_model
from pretrain.weights.starting import from_bert
from runtime.errors import CheckpointError


def test_another_process_makes_the_same_features(tmp_path):
    folders = {name: exported.checkpoint(name, tmp_path / "from" / name) for name in ("clip_vit", "clip_cnn")}
    theirs = exported.outputs("open_clip", folders, tmp_path)
    images, texts = exported.write_inputs(tmp_path / "again")
    # open_clip makes images RGB, but neither turns them by their EXIF orientation nor puts transparent parts on white.
    plain = [number for number, image in enumerate(images) if image.mode != "RGBA" and not image.getexif()]
    for name, folder in folders.items():
        model, actual = load_model(folder), theirs[name]
        model.transform.crop = model.transform.crop and 1.0  # its transform has no share to crop
        with torch.no_grad():
            image, text = model.encode_image(images).numpy(), model.encode_text(texts).numpy()
            scale = float(1 / model.network.temperature())
        assert np.abs(actual["image"] - image)[plain].max() < 1e-5, name
        assert np.abs(actual["text"] - text).max() < 1e-5 and np.abs(actual["text_alone"] - text[1:2]).max() < 1e-5
        assert np.abs(actual["logits"] - scale * image @ text.T)[plain].max() < 1e-3


def test_what_is_lost_is_told(tmp_path):
    notes = export(exported.checkpoint("clip_vit", tmp_path / "vit"), tmp_path / "out", "open_clip")
    assert any("fusion encoder is dropped" in note for note in notes)
    assert any(str(tmp_path / "out") in note and "hf_model_name" in note for note in notes)
    notes = export(exported.checkpoint("clip_cnn", tmp_path / "cnn"), tmp_path / "other", "open_clip")
    assert any("for a share of 0.95" in note for note in notes)
    assert "for a share of 0.95" in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit", "it makes vit_tiny_patch16_224 in timm's own sizes, and this model has others"),
        ("query", "a pooling that it does not have"),
        ("no_text_layers", "texts have no features"),
        ("test_size", "open_clip cannot build it .*size mismatch.*use --format hf"),
        ("wide_features", "its text projection has no bias, and one to 40 from 32 cannot do without"),
    ],
)
def test_what_open_clip_cannot_hold_is_one_line(tmp_path, name, reason):
    source = exported.checkpoint(name, tmp_path / "from")
    with pytest.raises(CheckpointError, match=reason) as error:
        export(source, tmp_path / "out", "open_clip")
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["from"]


def test_names_of_a_bert_go_out_as_they_come_in():
    encoder, _ = exported.network("vit")
    ours = encoder.text_encoder.state_dict()
    back = from_bert({f"bert.{name}": tensor for name, tensor in to_bert(ours).items()}, text_layers=2)
    assert {f"text_encoder.{name}" for name in ours} == back.keys()
    assert all(back[f"text_encoder.{name}"].equal(tensor) for name, tensor in ours.items())
