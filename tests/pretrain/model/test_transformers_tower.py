"""Towers of the transformers library give the library's own output, whole weights or an error, and are rebuilt without their folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    BertConfig,
    BertModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipImageProcessor,
    ViTForImageClassification,
    ViTImageProcessor,
)

from launch.cli import main
from pretrain import load_model
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from pretrain.model.transformers_tower import TransformersTower
from pretrain.weights.load import at_resolution, describe_model
from pretrain.weights.tower import load_transformers_weights
from runtime.checkpoint import write_checkpoint
from runtime.errors import CheckpointError, RecipeError

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
SMALL = SIZES | {"image_size": 32, "patch_size": 8}
FAMILIES = {  # name: architecture, further arguments, prefix tokens
    "CLIP": ("clip_vision_model", {}, 1),
    "SigLIP": ("siglip_vision_model", {}, 0),
    "SigLIP 2": ("siglip2_vision_model", {"num_patches": 16}, 0),
    "DINOv2": ("dinov2", {}, 1),
    "DINOv2 with registers": ("dinov2_with_registers", {"num_register_tokens": 4}, 5),
    "DINOv3": ("dinov3_vit", {"num_register_tokens": 4}, 5),
    "ViT": ("vit", {}, 1),
    "DeiT": ("deit", {}, 2),
    "BEiT": ("beit", {"use_relative_position_bias": True}, 1),
}
PROCESSORS = {
    "CLIP": CLIPImageProcessor(size={"shortest_edge": 36}, crop_size=32),
    "SigLIP": SiglipImageProcessor(size={"height": 32, "width": 32}),
    "DINOv2": BitImageProcessor(size={"shortest_edge": 40}, crop_size=32, image_mean=[0.1, 0.2, 0.3]),
    "ViT": ViTImageProcessor(size={"height": 32, "width": 32}, image_std=[0.2, 0.3, 0.4]),
}


def arguments(name: str) -> dict:
    known = CONFIG_MAPPING[FAMILIES[name][0]]().to_dict()
    return {key: value for key, value in (SMALL | FAMILIES[name][1]).items() if key in known}


def published(name: str, seed: int = 1) -> torch.nn.Module:
    """A model of the library, all its tensors random, norms and biases among them."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(CONFIG_MAPPING[FAMILIES[name][0]](**arguments(name)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tower(name: str, **changes) -> TransformersTower:
    settings = {"architecture": FAMILIES[name][0], "image_size": 32, "arguments": arguments(name)}
    encoder = TransformersTower(ImageEncoderConfig(kind="transformers", **settings | changes)).eval()
    own = encoder.vit.state_dict()
    encoder.vit.load_state_dict({key: value for key, value in published(name).state_dict().items() if key in own})
    return encoder


def images(size: int = 32) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def library_output(name: str, encoder: TransformersTower, pixels: Tensor) -> object:
    """The library's own output, called as its documentation says."""
    ready = (pixels.float() - encoder.mean) / encoder.std
    if name == "SigLIP 2":
        from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

        side = pixels.shape[-1] // 8
        patches = torch.stack([convert_image_to_patches(image, 8) for image in ready])
        mask = torch.ones(2, side * side, dtype=torch.int32)
        return published(name)(patches, pixel_attention_mask=mask, spatial_shapes=torch.tensor([[side, side]] * 2))
    options = {"interpolate_pos_encoding": True} if name in ("CLIP", "SigLIP", "ViT", "DeiT") else {}
    return published(name)(ready, output_hidden_states=True, **options)


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_own_pooling_is_the_librarys_output_at_its_size_and_at_another(name, size):
    encoder, pixels = tower(name), images(size)
    encoder.set_image_size(size)
    expected = library_output(name, encoder, pixels)
    tokens = encoder(pixels)
    assert tokens.shape == (2, encoder.tokens, encoder.width)
    assert (encoder.prefix_tokens, encoder.grid) == (FAMILIES[name][2], (size // 8, size // 8))
    torch.testing.assert_close(encoder.global_state(tokens), expected.pooler_output, atol=1e-5, rtol=1e-5)
    last = expected.last_hidden_state
    last = published(name).post_layernorm(last) if name == "CLIP" else last
    torch.testing.assert_close(tokens, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_levels_are_the_librarys_hidden_states(name):
    encoder, pixels = tower(name), images()
    assert encoder.level_widths == [32] * 3 and len(encoder.layers()) == 3
    tokens, tops = encoder.with_levels(pixels, [2, 1, 2])
    torch.testing.assert_close(tokens, encoder(pixels), atol=1e-6, rtol=0)
    patches = encoder.layer_tokens(pixels, [1, 2])
    prefix = encoder.prefix_tokens
    if name != "SigLIP 2":  # its model was called without hidden states above
        states = library_output(name, encoder, pixels).hidden_states
        torch.testing.assert_close(patches[0], states[1][:, prefix:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(patches[1], states[2][:, prefix:], atol=1e-5, rtol=1e-5)
        top = states[2][:, 0] if prefix else states[2].mean(1)
        torch.testing.assert_close(tops[0], top, atol=1e-5, rtol=1e-5)
    assert torch.equal(tops[0], tops[2]) and patches[1].shape == (2, 16, 32)


@pytest.mark.parametrize("pooling", ["own", "class", "mean", "query"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_pooling_leaves_no_parameter_without_gradient(name, pooling):
    if pooling == "class" and not FAMILIES[name][2]:
        with pytest.raises(RecipeError, match=f"pooling is class, but {FAMILIES[name][0]} has no class token"):
            tower(name, pooling=pooling)
        return
    encoder = tower(name, pooling=pooling).train()
    tokens = encoder(images())
    pooled = encoder.global_state(tokens)
    assert pooled.shape == (2, encoder.pooled_width)
    if pooling == "mean":
        torch.testing.assert_close(pooled, tokens[:, encoder.prefix_tokens :].mean(1))
    if pooling == "class":
        torch.testing.assert_close(pooled, tokens[:, 0])
    (pooled.square().sum() + tokens.square().sum()).backward()
    assert [key for key, parameter in encoder.named_parameters() if parameter.grad is None] == []


def config(folder: Path, **changes) -> ImageEncoderConfig:
    return ImageEncoderConfig(kind="transformers", weights=str(folder), **{"image_size": 32} | changes)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A whole CLIP with its image processor, as the hub holds it."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(3)
    text = SIZES | {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=16)).save_pretrained(folder)
    PROCESSORS["CLIP"].save_pretrained(folder)
    return folder


@torch.no_grad()
def test_weights_and_architecture_come_from_a_dual_encoders_folder(clip):
    settings = config(clip)
    encoder = TransformersTower(settings).eval()
    unused = load_transformers_weights(encoder, settings)
    assert settings.architecture == "clip_vision_model" and settings.arguments["hidden_act"] == "quick_gelu"
    assert "visual_projection.weight" in unused and not any(name.startswith("encoder") for name in unused)
    model, pixels = CLIPModel.from_pretrained(clip), images()
    expected = model.vision_model((pixels.float() - encoder.mean) / encoder.std).pooler_output
    torch.testing.assert_close(encoder.global_state(encoder(pixels)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PROCESSORS)
def test_an_image_is_made_ready_as_by_the_librarys_processor(name, tmp_path):
    published(name).save_pretrained(tmp_path)
    PROCESSORS[name].save_pretrained(tmp_path)
    settings = config(tmp_path, pooling="mean")
    encoder = TransformersTower(settings)
    model = AlignmentModel(ModelConfig(settings, TextEncoderConfig(32, 1, 2, 64), FusionEncoderConfig(layers=0)), 9)
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC)
    ready = (model.evaluation_transform()(image).float() - encoder.mean) / encoder.std
    expected = PROCESSORS[name](images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ready, expected, atol=2.01 / 255 / float(encoder.std.min() / 255), rtol=0)
    assert (ready - expected).abs().mean() < 0.2 / 255 / float(encoder.std.min() / 255)


def test_an_image_processor_that_does_something_else_is_refused(clip, tmp_path):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    CLIPImageProcessor(size={"shortest_edge": 36}, do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"resized in a way that is not known here; state crop and resample"):
        TransformersTower(config(tmp_path))
    CLIPImageProcessor(resample=0).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"state crop and resample"):
        TransformersTower(config(tmp_path))


@pytest.mark.parametrize("change", ["missing", "extra", "smaller"])
def test_weights_that_do_not_fit_are_named(clip, tmp_path, change):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "vision_model.encoder.layers.2.mlp.fc1.weight"
    settings = config(tmp_path)
    if change == "missing":
        del tensors[layer]
    if change == "smaller":
        tensors[layer] = tensors[layer][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    encoder = TransformersTower(settings)
    if change == "extra":
        settings = config(
            tmp_path, arguments=settings.arguments | {"num_hidden_layers": 2}, architecture=settings.architecture
        )
        encoder = TransformersTower(settings)
    message = {
        "missing": r"lacks encoder.layers.2.mlp.fc1.weight and 0 more tensors of clip_vision_model$",
        "extra": r"holds encoder.layers.2.\S+ and 15 more tensors that clip_vision_model of the recipe has no place for$",
        "smaller": r"encoder.layers.2.mlp.fc1.weight is \(63, 32\), clip_vision_model of the recipe has \(64, 32\)$",
    }
    with pytest.raises(CheckpointError, match=message[change]):
        load_transformers_weights(encoder, settings)


def test_a_classifier_without_a_pooler_needs_another_pooling(tmp_path):
    ViTForImageClassification(CONFIG_MAPPING["vit"](**arguments("ViT"))).save_pretrained(tmp_path)
    PROCESSORS["ViT"].save_pretrained(tmp_path)
    settings = config(tmp_path)
    with pytest.raises(CheckpointError, match="lacks pooler.dense.bias and 1 more tensors of vit"):
        load_transformers_weights(TransformersTower(settings), settings)
    settings = config(tmp_path, pooling="class")
    assert load_transformers_weights(TransformersTower(settings), settings) == ["classifier.bias", "classifier.weight"]


def refusal(**changes) -> str:
    with pytest.raises((RecipeError, CheckpointError)) as caught:
        TransformersTower(ImageEncoderConfig(**{"kind": "transformers", "image_size": 32} | changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_made_is_one_line(clip, tmp_path):
    assert "transformers has no vit_base_patch16_224; name a family" in refusal()
    assert "hiden_size is no entry of CLIPVisionConfig" in refusal(
        architecture="clip_vision_model", arguments={"hiden_size": 32}
    )
    assert "cannot make clip_vision_model with these arguments" in refusal(
        architecture="clip_vision_model", arguments={"hidden_size": 33}
    )
    assert "no configuration in `nobody/nothing`" in refusal(weights="nobody/nothing")
    assert "without network, give a folder" in refusal(weights="nobody/nothing")
    assert f"no folder {tmp_path / 'gone'}" in refusal(weights=str(tmp_path / "gone"))
    assert "architecture is dinov2, but" in refusal(weights=str(clip), architecture="dinov2")
    assert "image_size 36 is no multiple of the patch of 8 pixels" in refusal(weights=str(clip), image_size=36)
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    assert "look for it in timm" in refusal(architecture="swin", arguments=swin)
    assert "refuses images of 48 px, its own are 32 px" in refusal(
        architecture="aimv2_vision_model", arguments=SMALL, image_size=48
    )
    assert "pooling is own, but ijepa of transformers has none" in refusal(architecture="ijepa", arguments=SMALL)
    BertModel(BertConfig(vocab_size=9, max_position_embeddings=8, **SIZES)).save_pretrained(tmp_path / "bert")
    assert "no image processor in" in refusal(weights=str(tmp_path / "bert"))
    with pytest.raises(RecipeError, match=r"model.image.drop_path is set, but a model of kind transformers"):
        ImageEncoderConfig(kind="transformers", drop_path=0.1)
    with pytest.raises(RecipeError, match=r"preprocessing are for model.image.kind timm or transformers"):
        ImageEncoderConfig(preprocessing={"mean": [0.5] * 3})


def test_a_folder_without_weights_is_one_line(clip, tmp_path):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = config(tmp_path)
    with pytest.raises(CheckpointError, match="cannot load .* into clip_vision_model .*without network, give a folder"):
        load_transformers_weights(TransformersTower(settings), settings)


@torch.no_grad()
def test_at_another_resolution_the_weights_stay(clip):
    settings = config(clip)
    model = AlignmentModel(
        ModelConfig(settings, TextEncoderConfig(32, 1, 2, 64), FusionEncoderConfig(layers=1), codewords=4), 9
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resized = at_resolution(model, 64)
    assert resized.image_encoder.tokens == 65
    assert all(torch.equal(tensor, before[name]) for name, tensor in resized.state_dict().items())


def recipe(folder: Path, clip: Path, drawn: Path) -> list[str]:
    text = """
data: {vocabulary: 200, caption_tokens: 32, workers: 0}
model:
  image: {kind: transformers, image_size: 32}
  text: {width: 32, layers: 1, heads: 2, feed_forward: 64, positions: 32}
  fusion: {layers: 1}
  feature_dim: 16
  codewords: 8
teacher: {queue: 16, ema_momentum: 0.9}
optimizer: {warmup_steps: 0}
training: {global_batch: 8, micro_batch: 8, steps: 2, precision: fp32, device: cpu}
"""
    (folder / "recipe.yaml").write_text(text)
    named = ["--runs", str(folder), "--name", "run", "--model.image.weights", str(clip)]
    return ["pretrain", "--config", str(folder / "recipe.yaml"), "--data.train", str(drawn / "train"), *named]


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_a_run_is_rebuilt_and_goes_on_without_the_folder(clip, drawn, tmp_path, capfd, frozen):
    source = Path(shutil.copytree(clip, tmp_path / "clip"))
    command = [*recipe(tmp_path, source, drawn), "--model.image.frozen", frozen]
    assert main([*command, "--training.checkpoint_every", "1"]) == 0
    assert "image encoder: started from" in (printed := capfd.readouterr().out) and "text_model (" in printed
    shutil.rmtree(source)
    model = load_model(tmp_path / "run")
    stored = model.network.image_encoder.vit.state_dict()
    theirs = CLIPModel.from_pretrained(clip).vision_model.state_dict()
    assert all(torch.equal(stored[name], theirs[name]) for name in theirs) == (frozen == "true")
    assert model.transform.crop == pytest.approx(32 / 36)
    (tmp_path / "run" / "finished.json").unlink()
    assert main([*command, "--training.checkpoint_every", "1"]) == 0
    assert "going on from" in capfd.readouterr().out


def test_only_our_own_format_holds_such_a_tower(clip, tmp_path, capsys):
    settings = config(clip)
    text = TextEncoderConfig(32, 1, 2, 64, positions=16)
    network = AlignmentModel(ModelConfig(settings, text, FusionEncoderConfig(layers=0), codewords=0), 24)
    tensors, about = {"model": network.state_dict()}, describe_model(network.config, 10, "pretrained")
    write_checkpoint(tmp_path / "model", tensors, {"model": about}, tiny.tokenizer().save)
    command = ["export", str(tmp_path / "model"), str(tmp_path / "out")]
    assert main([*command, "--format", "hf"]) == 1
    assert "an image tower of kind transformers, which --format hf cannot hold" in capsys.readouterr().err
    assert main(command) == 0 and load_model(tmp_path / "out").network.image_encoder.prefix_tokens == 1
