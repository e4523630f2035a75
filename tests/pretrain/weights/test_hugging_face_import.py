"""CLIP, SigLIP and SigLIP 2 as transformers saves them become checkpoints of ours with the same features and logits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_text_models import CAPTIONS, POSITIONS, write_family
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from launch.cli import main
from pretrain import load_model
from pretrain.weights.load import ImageTextModel
from runtime.files import read_json

PROCESSORS: dict[str, Any] = {
    "CLIP": transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    "SigLIP": transformers.SiglipImageProcessor(size={"height": 32, "width": 32}),
    "SigLIP 2, NaFlex": transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=4),
}
KINDS = {"CLIP": "clip", "SigLIP": "siglip", "SigLIP 2, NaFlex": "siglip"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder a family, written when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            width = {} if name == "CLIP" else {"projection_size": 32}  # SigLIP's images have no projection
            made[name] = write_family(name, tmp_path_factory.mktemp("model"), **width)
            PROCESSORS[name].save_pretrained(made[name])
            model = transformers.AutoModel.from_pretrained(str(made[name]))
            model.logit_scale.data.fill_(3.0)  # a published model's temperature lies within our bounds
            model.save_pretrained(str(made[name]))
        return made[name]

    return folder


@pytest.fixture(scope="module")
def imported(folders, tmp_path_factory):
    """The checkpoint made of each family's folder."""
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("imported") / "model"
            assert main(["import", "hf", str(folders(name)), str(made[name])]) == 0
        return made[name]

    return checkpoint


def images() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def original(name: str, folder: Path, ours: ImageTextModel) -> Any:
    """The library's own output for `images()` and CAPTIONS."""
    model = transformers.AutoModel.from_pretrained(str(folder)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), padding_side="right")
    fixed = name != "CLIP"
    words = tokenizer(CAPTIONS, padding="max_length" if fixed else True, max_length=POSITIONS, return_tensors="pt")
    inputs = {"input_ids": words["input_ids"]} | ({} if fixed else {"attention_mask": words["attention_mask"]})
    pixels = (images() / 255 - torch.tensor(PROCESSORS[name].image_mean)[:, None, None]) / torch.tensor(
        PROCESSORS[name].image_std
    )[:, None, None]
    if name.startswith("SigLIP 2"):
        inputs["pixel_attention_mask"] = torch.ones(4, 4, dtype=torch.int32)
        inputs["spatial_shapes"] = torch.tensor([[2, 2]] * 4)
        pixels = torch.stack([convert_image_to_patches(image, 16) for image in pixels])
    return model(pixel_values=pixels, **inputs), model


@pytest.mark.parametrize("name", PROCESSORS)
@torch.no_grad()
def test_features_and_logits_are_the_originals(folders, imported, name):
    ours = load_model(imported(name))
    theirs, model = original(name, folders(name), ours)
    image, text = ours.encode_image(images()), ours.encode_text(CAPTIONS)
    torch.testing.assert_close(image, theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text, theirs.text_embeds, atol=1e-5, rtol=0)
    assert (image[0] - image[1]).abs().max() > 0.01 and (text[0] - text[1]).abs().max() > 0.01
    logits = image @ text.T / ours.network.temperature()
    bias = float(getattr(model, "logit_bias", torch.zeros(())))  # what our model leaves out
    torch.testing.assert_close(logits + bias, theirs.logits_per_image, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("name", PROCESSORS)
def test_an_image_is_made_ready_as_by_the_folders_processor(folders, imported, name):
    if name.startswith("SigLIP 2"):
        assert load_model(imported(name)).transform.crop is None
        return
    ours = load_model(imported(name))
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC)
    encoder = ours.network.image_encoder
    ready = (ours.transform(image).float() - encoder.mean) / encoder.std
    expected = PROCESSORS[name](images=image, return_tensors="pt")["pixel_values"][0]
    assert (ready - expected).abs().mean() < 0.3 / float(encoder.std.min())


def test_the_report_says_what_is_left_out_and_what_is_random(folders, tmp_path, capsys):
    for name, said in {
        "CLIP": "CLIP of transformers; image clip_vision_model at 32 px, text clip_text_model of 16 tokens, features of 512",
        "SigLIP": "the logit bias",
        "SigLIP 2, NaFlex": "images of other shapes: they are squashed to 32 px a side; the logit bias",
    }.items():
        out = tmp_path / KINDS[name] / name
        assert main(["import", KINDS[name], str(folders(name)), str(out)]) == 0
        printed = capsys.readouterr().out
        assert said in printed and "random, because it has none: masked_language_head, matching_head" in printed
        assert read_json(out / "model.json")["untrained"] == ["masked_language_head", "matching_head"]


@torch.no_grad()
def test_another_image_size_interpolates_as_the_library_does(folders, tmp_path):
    out = tmp_path / "large"
    assert main(["import", "clip", str(folders("CLIP")), str(out), "--image-size", "64"]) == 0
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ours = load_model(out)
    model = transformers.CLIPModel.from_pretrained(str(folders("CLIP"))).eval()
    ready = (pixels.float() - ours.network.image_encoder.mean) / ours.network.image_encoder.std
    expected = model.get_image_features(ready, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(
        ours.encode_image(pixels), torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=0
    )


def refusal(capsys, *arguments: object) -> str:
    capsys.readouterr()  # what writing the published folders printed
    assert main(["import", *map(str, arguments)]) != 0
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0
    return message


def test_refusals_are_one_line(folders, tmp_path, capsys):
    clip, out = folders("CLIP"), tmp_path / "out"
    assert "is a clip; `ligature import siglip` reads SigLIP, SigLIP 2" in refusal(capsys, "siglip", clip, out)
    assert "without network, give a folder" in refusal(capsys, "hf", "nobody/nothing", out)
    assert "no folder" in refusal(capsys, "hf", tmp_path / "gone", out)
    assert "--bert-config is for albef" in refusal(capsys, "hf", clip, out, "--bert-config", tmp_path / "x.json")
    assert "no multiple of the patch of 16 pixels" in refusal(capsys, "hf", clip, out, "--image-size", "40")
    assert "more than the 16 that a clip_text_model reads" in refusal(capsys, "hf", clip, out, "--caption-tokens", "17")
    pair = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(), transformers.BertConfig()
    )
    pair.save_pretrained(str(tmp_path / "pair"))
    message = refusal(capsys, "hf", tmp_path / "pair", out)
    assert "is a vision-text-dual-encoder; `ligature import hf` reads CLIP, SigLIP, SigLIP 2" in message
    bare = tmp_path / "bare"
    shutil.copytree(clip, bare, ignore=shutil.ignore_patterns("model.safetensors"))
    assert "cannot load" in refusal(capsys, "hf", bare, out)
    tensors = load_file(clip / "model.safetensors")
    del tensors["text_model.encoder.layers.0.mlp.fc1.bias"]
    save_file(tensors, bare / "model.safetensors", {"format": "pt"})
    assert "lacks text_model.encoder.layers.0.mlp.fc1.bias" in refusal(capsys, "hf", bare, out)
    assert not out.exists()
    out.mkdir()
    assert "exists; choose another folder" in refusal(capsys, "hf", clip, out)


TRAINING = """
data: {caption_tokens: 16, workers: 0}
model:
  image: {kind: transformers, image_size: 32}
  text: {kind: transformers}
  fusion: {layers: 1}
  feature_dim: 512
  codewords: 8
objectives: {masked_language: {weight: 0}}
teacher: {queue: 16, ema_momentum: 0.9}
optimizer: {warmup_steps: 0}
training: {global_batch: 8, micro_batch: 8, steps: 1, precision: fp32, device: cpu}
"""


def test_an_imported_model_is_scored_indexed_searched_fine_tuned_and_pretrained_from(imported, drawn, tmp_path, capsys):
    model = imported("CLIP")
    common = ["--checkpoint", str(model), "--device", "cpu"]
    assert main(["export", str(model), str(tmp_path / "exported")]) == 0
    assert read_json(tmp_path / "exported" / "model.json")["untrained"] == ["masked_language_head", "matching_head"]
    scored = ["--data", str(drawn / "test"), "--dataset", "shapes", "--split", "test", "--workers", "0"]
    assert main(["evaluate", *common, *scored, "--heads", "[dual]", "--out", str(tmp_path / "scores.json")]) == 0
    assert read_json(tmp_path / "scores.json")["training"] == "pretrained"
    assert (
        main(["index", *common, "--data", str(drawn / "test"), "--out", str(tmp_path / "index"), "--workers", "0"]) == 0
    )
    capsys.readouterr()
    assert main(["search", "a red circle", "--index", str(tmp_path / "index"), "--checkpoint", str(model)]) == 0
    assert capsys.readouterr().out
    tuned = [
        "--dataset",
        "shapes",
        "--head",
        "dual",
        "--matching_weight",
        "0",
        "--data.train",
        str(drawn / "train"),
        "--data.workers",
        "0",
    ]
    short = [
        "--training.steps",
        "1",
        "--training.global_batch",
        "8",
        "--training.device",
        "cpu",
        "--training.precision",
        "fp32",
    ]
    assert (
        main(["finetune", "--checkpoint", str(model), *tuned, *short, "--runs", str(tmp_path), "--name", "tuned"]) == 0
    )
    assert load_model(tmp_path / "tuned").network.config.text.kind == "transformers"
    (tmp_path / "recipe.yaml").write_text(TRAINING)
    begun = [
        "--checkpoint",
        str(model),
        "--data.train",
        str(drawn / "train"),
        "--runs",
        str(tmp_path),
        "--name",
        "more",
    ]
    capsys.readouterr()
    assert main(["pretrain", "--config", str(tmp_path / "recipe.yaml"), *begun]) == 0
    printed = capsys.readouterr().out
    for fresh in ("codebook (1)", "fusion_encoder (", "matching_head (2)", "masked_language_head (5)"):
        assert fresh in printed.split("random, because it has none: ")[1].splitlines()[0]
    assert load_model(tmp_path / "more").network.config.fusion.layers == 1
