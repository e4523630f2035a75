"""Small random checkpoints of every kind, inputs for them, and what another library makes of their exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import tiny_images
import torch
from PIL import Image

from finetune.export.export import export
from finetune.heads.decomposed import Decomposed
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import (
    FusionEncoderConfig,
    ImageEncoderConfig,
    ModelConfig,
    PreprocessingConfig,
    TextEncoderConfig,
)
from pretrain.weights.load import describe_model
from runtime.checkpoint import write_checkpoint

VIT = {"architecture": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2}
TOKENS = 12


def timm(architecture, image_size, **more):
    return {"kind": "timm", "architecture": architecture, "image_size": image_size, **more}


MODELS = {
    "vit": (VIT, {}, ("cross_attention", 2)),
    "narrow": (VIT | {"width": 48}, {}, ("cross_attention", 2)),
    "single_stream": (VIT | {"width": 48}, {"pooling": "mean"}, ("single_stream", 2)),
    "cnn": (timm("test_efficientnet", 64), {}, ("cross_attention", 1)),
    "query": (
        timm("test_vit", 64, pooling="query", preprocessing=PreprocessingConfig(resample="bilinear", crop=0.8)),
        {"pooling": "mean"},
        ("cross_attention", 0),
    ),
    "swin": (
        timm("swin_tiny_patch4_window7_224", 56, arguments={"depths": [1, 1], "embed_dim": 16, "num_heads": [1, 2]}),
        {},
        ("cross_attention", 0),
    ),
    "no_text_layers": (VIT, {"layers": 0}, ("single_stream", 2)),
    "small": (timm("test_efficientnet", 64), {"layers": 1, "pooling": "mean"}, ("cross_attention", 1)),
    "clip_vit": ({"architecture": "test_vit", "image_size": 160}, {}, ("cross_attention", 1)),
    "test_size": (timm("test_vit", 64), {}, ("cross_attention", 0)),
    "wide_features": (timm("test_vit", 160), {}, ("cross_attention", 0)),
    "clip_cnn": (timm("test_efficientnet", 160), {"pooling": "mean"}, ("cross_attention", 0)),
}
"""Name -> image settings, text settings, kind and layers of the fusion encoder."""


def network(name: str) -> tuple[AlignmentModel, ModelConfig]:
    image, text, fusion = MODELS[name]
    sizes = {"width": 32, "layers": 2, "heads": 2, "feed_forward": 64, "positions": 16} | text
    config = ModelConfig(
        ImageEncoderConfig(**image),
        TextEncoderConfig(**sizes),
        FusionEncoderConfig(*fusion),
        feature_dim=40 if name == "wide_features" else 16,
        codewords=8,
    )
    torch.manual_seed(0)
    built = AlignmentModel(config, tiny_images.tokenizer().vocabulary)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # fresh biases are zero, and fresh layers hardly tell inputs apart
        for each in [*built.parameters(), *(buffer for key, buffer in built.named_buffers() if "running_mean" in key)]:
            each.add_(0.1 * torch.randn(each.shape, generator=generator))
    return built, config


def checkpoint(name: str, folder: Path, more: dict | None = None) -> Path:
    """Write a checkpoint of an alignment model. -> `folder`."""
    built, config = network(name)
    about = describe_model(config, TOKENS, "pretrained") | (more or {})
    write_checkpoint(folder, {"model": built.state_dict()}, {"model": about}, tiny_images.tokenizer().save)
    return folder


def vldeformer(name: str, pooling: str, folder: Path) -> Path:
    """Write a VLDeformer checkpoint. -> `folder`."""
    built, config = network(name)
    about = describe_model(config, TOKENS, "fine-tuned-on noise") | {
        "head": "vldeformer",
        "vldeformer": {"pooling": pooling},
    }
    tensors = Decomposed(built, pooling).state_dict()
    write_checkpoint(folder, {"model": tensors}, {"model": about}, tiny_images.tokenizer().save)
    return folder


def write_inputs(folder: Path) -> tuple[list[Image.Image], list[str]]:
    """Write images of several shapes and modes, and texts of several lengths, one longer than the model reads."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    noise = [
        draw.integers(0, 256, shape, dtype=np.uint8) for shape in [(40, 70, 3), (90, 50, 3), (64, 64, 4), (37, 41)]
    ]
    for number, (pixels, mode) in enumerate(zip(noise, ("RGB", "RGB", "RGBA", "L"), strict=True)):
        Image.fromarray(pixels, mode).save(folder / f"{number}.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    Image.fromarray(noise[0]).save(folder / "turned.jpg", exif=turned)
    texts = ["w1 w2 w3", "w5", " ".join(f"w{number}" for number in range(30)), "w7 unknown w9", "w1 w1 w4 w8 w20 w21"]
    (folder / "texts.json").write_text(json.dumps(texts))
    return [Image.open(path) for path in [*sorted(folder.glob("*.png")), folder / "turned.jpg"]], texts


def outputs(library: str, checkpoints: dict[str, Path], place: Path) -> dict[str, dict[str, np.ndarray]]:
    """Export checkpoints and load them in a process that has no Ligature. -> name -> what it computed, by name."""
    arguments = []
    for name, source in checkpoints.items():
        export(source, place / name, library)
        arguments += [str(place / name), str(place / f"{name}.npz")]
    inputs = place / "inputs"
    write_inputs(inputs)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home")}
    script = str(Path(__file__).with_name("outsider.py"))
    subprocess.run(
        [sys.executable, "-I", script, library, str(inputs), *arguments], cwd=place, env=environment, check=True
    )
    return {name: dict(np.load(place / f"{name}.npz")) for name in checkpoints}
