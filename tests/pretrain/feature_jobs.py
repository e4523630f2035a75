"""Encoding the drawn shards once, as a rank of a test does it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file

from data_tools.config import AugmentConfig, FeaturesConfig, ReadConfig
from data_tools.pixels import feature_blocks
from data_tools.shards.reader import ShardReader
from pretrain.feature_cache import training_features
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from runtime.ranks import ranks_from_environment

ARGUMENTS = {"layers": [1, 1, 1, 1]}


def tower_weights(folder: Path) -> Path:
    """Random weights of the small tower, as a file."""
    torch.manual_seed(5)
    tower = timm.create_model("resnet18", num_classes=0, **ARGUMENTS)
    save_file({k: v.contiguous() for k, v in tower.state_dict().items()}, folder / "tower.safetensors")
    return folder / "tower.safetensors"


def model(seed: int = 0) -> AlignmentModel:
    image = ImageEncoderConfig(kind="timm", architecture="resnet18", image_size=32, arguments=ARGUMENTS, frozen=True)
    text = TextEncoderConfig(width=16, layers=1, heads=2, feed_forward=16, positions=8)
    torch.manual_seed(seed)
    return AlignmentModel(ModelConfig(image, text, FusionEncoderConfig(layers=0), 8, 0), 10).eval()


def config(
    kind: Any = "tokens", dtype: Any = "fp16", views: int = 4, flip: bool = False, crop: float = 1.0
) -> ReadConfig:
    augment = AugmentConfig(crop_scale=[crop, 1.0], flip=flip, operations=0)
    return ReadConfig(train="x", workers=0, augment=augment, features=FeaturesConfig(kind, views, dtype))


def cache(train: str, block: int | None = None, seed: int = 0, **settings: Any) -> dict[str, Any]:
    """Encode a shard folder. -> the cache's folder and all its rows, (samples, views, …)."""
    whole, feature_blocks.BLOCK = feature_blocks.BLOCK, block or feature_blocks.BLOCK
    watchdog = SimpleNamespace(enter_phase=lambda *_: None, enter_collective=lambda: None)
    context: Any = SimpleNamespace(
        ranks=ranks_from_environment(), device=torch.device("cpu"), watchdog=watchdog, folder=None
    )
    blocks = training_features(config(**settings), ShardReader(train), model(seed), context)
    assert blocks is not None
    rows = np.stack([blocks.views(sample) for sample in range(len(blocks))])
    feature_blocks.BLOCK = whole
    return {"folder": str(blocks.folder), "rows": rows}
