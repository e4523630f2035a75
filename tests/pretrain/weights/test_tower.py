"""A tower starts from timm's own file or from one of other names, whole or not at all, and a run of it survives its checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from timm import create_model
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from data_tools.tokenizer import load_tokenizer, train_tokenizer
from launch.cli import main
from pretrain import load_model
from pretrain.model.config import ImageEncoderConfig
from pretrain.model.timm_tower import TimmTower
from pretrain.weights.tower import load_tower_weights
from runtime.errors import CheckpointError

ARCHITECTURE, ARGUMENTS = "resnet18", {"layers": [1, 1, 1, 1]}


def config(weights: str) -> ImageEncoderConfig:
    return ImageEncoderConfig(
        kind="timm", architecture=ARCHITECTURE, image_size=32, arguments=dict(ARGUMENTS), weights=weights
    )


def published() -> torch.nn.Module:
    """A model with a classifier, its batch norms far from their start."""
    torch.manual_seed(5)
    model = create_model(ARCHITECTURE, **ARGUMENTS)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(published().state_dict(), path)
    return path


@torch.no_grad()
def test_features_are_the_published_models(weights):
    tower = TimmTower(config(str(weights))).eval()
    unused = load_tower_weights(tower, config(str(weights)))
    assert unused == ["fc.bias", "fc.weight"]
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    model, pixels = published(), (images.float() - tower.mean) / tower.std
    expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(tower.global_state(tower(images)), expected, atol=1e-5, rtol=1e-5)


def test_a_file_of_other_names_in_timms_order_is_the_same(weights, tmp_path):
    stored = published().state_dict()
    renamed = {f"net{number}.{name.rsplit('.', 1)[1]}": tensor for number, (name, tensor) in enumerate(stored.items())}
    torch.save(renamed, tmp_path / "renamed.pth")
    by_name, by_order = (TimmTower(config(str(path))) for path in (weights, tmp_path / "renamed.pth"))
    load_tower_weights(by_name, config(str(weights)))
    load_tower_weights(by_order, config(str(tmp_path / "renamed.pth")))
    ours = by_order.vit.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in by_name.vit.state_dict().items())


@pytest.mark.parametrize("change", ["missing", "extra", "absent"])
def test_what_does_not_fit_is_one_line(weights, tmp_path, change):
    tensors = load_file(weights)
    if change == "missing":
        del tensors["layer2.0.conv1.weight"]
    if change == "extra":
        tensors["layer9.conv.weight"] = torch.zeros(1)
    path = tmp_path / "changed.safetensors"
    if change != "absent":
        save_file(tensors, path)
    message = {
        "missing": "lacks layer2.0.conv1.weight",
        "extra": "holds layer9.conv.weight",
        "absent": "without network, give a file",
    }
    with pytest.raises(CheckpointError, match=message[change]):
        load_tower_weights(TimmTower(config(str(path))), config(str(path)))


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A sentence encoder as MiniLM is published: a BERT without a word head, with its tokenizer."""
    folder = tmp_path_factory.mktemp("minilm")
    captions = ["a red circle left of a blue square", "two large green triangles above a star", "a small blue circle"]
    tokenizer = train_tokenizer(captions, 200, 16)
    torch.manual_seed(6)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=tokenizer.vocabulary, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def recipe(folder: Path, weights: Path, bert: Path, drawn: Path, **training) -> Path:
    values = {
        "name": "towers",
        "runs": str(folder),
        "data": {
            "train": str(drawn / "train"),
            "tokenizer": str(bert),
            "caption_tokens": 16,
            "workers": 0,
            "augment": {"crop_scale": [1.0, 1.0], "flip": False, "operations": 0},
        },
        "model": {
            "image": {"kind": "timm", "architecture": ARCHITECTURE, "arguments": ARGUMENTS, "image_size": 32, "weights": str(weights), "frozen": True},
            "text": {"width": 32, "layers": 2, "heads": 2, "feed_forward": 64, "positions": 32, "weights": str(bert), "pooling": "mean", "frozen": True},
            "fusion": {"layers": 1},
            "feature_dim": 16,
            "codewords": 8,
        },
        "teacher": {"queue": 16},
        "training": {"global_batch": 8, "micro_batch": 8, "precision": "fp32", "device": "cpu", "checkpoint_every": 2, "keep_last": 9, **training},
    }  # fmt: skip
    path = folder / "towers.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 1), ("bf16", 1), ("bf16", 3)])
def test_a_run_of_frozen_towers_resumes_to_the_bit_and_keeps_them(weights, bert, drawn, tmp_path, precision, stage):
    path = recipe(tmp_path, weights, bert, drawn, steps=4, precision=precision, zero_stage=stage)
    assert main(["pretrain", "--config", str(path)]) == 0
    run = tmp_path / "towers"
    whole = load_file(run / "checkpoints" / "step-00000004" / "model.safetensors")
    published_weights = load_file(weights)
    for name, tensor in published_weights.items():
        if not name.startswith("fc.") and "num_batches" not in name:
            assert torch.equal(whole[f"image_encoder.vit.{name}"], tensor), f"{name} is the file's, in float32"
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "finished.json").unlink()
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").write_text("step-00000002\n")
    assert main(["pretrain", "--config", str(path)]) == 0
    again = load_file(run / "checkpoints" / "step-00000004" / "model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_is_a_model_and_can_be_tuned_scored_and_exported(weights, bert, drawn, tmp_path, capfd):
    assert main(["pretrain", "--config", str(recipe(tmp_path, weights, bert, drawn, steps=2))]) == 0
    out = capfd.readouterr().out
    assert "are random, because it lacks them" in out and "masked_language_head (5)" in out, (
        "the word head is not in the file"
    )
    run = tmp_path / "towers"
    model = load_model(run)
    picture = Image.effect_noise((48, 64), 90).convert("RGB")
    assert model.transform(picture).shape == (3, 32, 32)
    features = model.encode_image([picture]) @ model.encode_text(["a red circle"]).T
    tune = [
        "--data.train",
        str(drawn / "train"),
        "--dataset",
        "shapes",
        "--runs",
        str(tmp_path),
        "--training.steps",
        "2",
    ]
    tune += [
        "--training.device",
        "cpu",
        "--training.precision",
        "fp32",
        "--training.global_batch",
        "8",
        "--data.workers",
        "0",
    ]
    assert main(["finetune", "--checkpoint", str(run), "--name", "tuned", *tune]) == 0
    before, after = (load_model(tmp_path / name).network.state_dict() for name in ("towers", "tuned"))
    frozen = [name for name in before if name.startswith(("image_encoder.vit.", "text_encoder."))]
    assert all(torch.equal(before[name], after[name]) for name in frozen), "fine-tuning keeps what pretraining froze"
    assert not torch.equal(before["image_projection.weight"], after["image_projection.weight"])
    score = [
        "--data",
        str(drawn / "test"),
        "--dataset",
        "shapes",
        "--split",
        "test",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    assert (
        main(
            [
                "evaluate",
                "--checkpoint",
                str(tmp_path / "tuned"),
                "--out",
                str(tmp_path / "s.json"),
                "--heads",
                "[dual, fusion]",
                *score,
            ]
        )
        == 0
    )
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    exported = load_model(tmp_path / "out")
    assert torch.equal(exported.encode_image([picture]) @ exported.encode_text(["a red circle"]).T, features)


def test_a_text_model_of_another_family_is_refused(bert, drawn, weights, tmp_path, capfd):
    folder = tmp_path / "distilbert"
    size = load_tokenizer(bert, 16).vocabulary
    DistilBertModel(DistilBertConfig(vocab_size=size, dim=32, n_layers=2, n_heads=2, hidden_dim=64)).save_pretrained(
        folder
    )
    path = recipe(tmp_path, weights, bert, drawn, steps=2)
    assert main(["pretrain", "--config", str(path), "--model.text.weights", str(folder)]) == 1
    assert "is a distilbert, but the text encoder is a BERT" in capfd.readouterr().err
