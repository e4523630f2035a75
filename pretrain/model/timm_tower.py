"""Any timm model that gives features, as an image encoder: ViTs with or without a class token, Swin, ConvNeXt, CNNs.

`image_encoder.py` states the interface, and builds ViTs of any size to train from random weights. A tower is a published architecture
as its authors made it: its own sizes, pooling, pixel statistics and crop. Batch norms are frozen, statistics and scale: the
micro-batch of a device is too small to estimate better ones, and a teacher must not see other statistics than its student.

To take part in another kind of tower: copy this file, and name the class where `alignment_model.py` chooses by `model.image.kind`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import timm
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn

from pretrain.model.config import ImageEncoderConfig
from runtime.errors import RecipeError


class TimmTower(nn.Module):
    """uint8 pixels -> tokens: a class token and other prefix tokens where the model has them, then patches row by row.

    Attributes:
        width: Width of the tokens.
        pooled_width: Width of the global state.
        prefix_tokens: How many of them come before the patches.
        grid: Rows and columns of patches.
        level_widths: Width of each level, a ViT's layer or a CNN's stage.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.image_size, self.pooling = config.image_size, config.pooling
        self.vit = cast(Any, freeze_batch_norm_2d(_create(config)))
        own, stated = self.vit.pretrained_cfg, config.preprocessing
        # Not in the state: they are constants, and DeepSpeed does not carry buffers between ranks.
        self.register_buffer("mean", torch.tensor(stated.mean or own["mean"]).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(stated.std or own["std"]).view(3, 1, 1) * 255, persistent=False)
        self.crop: float | None = own.get("crop_pct") if stated.crop is None else stated.crop or None
        """Share of the shorter side that the centre crop of an evaluation image keeps."""
        self.resample = "bicubic" if stated.resample == "own" else stated.resample
        with torch.no_grad():
            features = self._probe()
            tokens = self._to_tokens(features)
            self.width: int = tokens.shape[-1]
            self.prefix_tokens: int = getattr(self.vit, "num_prefix_tokens", 0)
            self.grid = self._grid_of(features)
            if self.pooling == "class" and getattr(self.vit, "cls_token", None) is None:
                raise RecipeError(
                    f"model.image.pooling is class, but {config.architecture} has no class token; use own, mean or query"
                )
            self.attention_pool = AttentionPool(self.width) if self.pooling == "query" else None
            self.pooled_width: int = self.global_state(tokens).shape[-1]
        self._levels, self.level_widths = _levels_of(self.vit, self.width)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: (batch, 3, size, size) uint8.

        Returns:
            (batch, tokens, width).
        """
        return self._to_tokens(self.vit.forward_features(self._pixels(images)))

    def global_state(self, tokens: Tensor) -> Tensor:
        """Pool tokens (batch, tokens, width) as `model.image.pooling` says, to (batch, pooled_width)."""
        if self.pooling == "mean":
            return tokens[:, self.prefix_tokens :].mean(1)
        if self.pooling == "class":
            return tokens[:, 0]
        if self.attention_pool is not None:
            return self.attention_pool(tokens)
        features = tokens
        if self._is_map():
            features = tokens.unflatten(1, self.grid)
            features = features if self._channels_last() else features.permute(0, 3, 1, 2)
        return self.vit.forward_head(features, pre_logits=True)

    def with_levels(self, images: Tensor, levels: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Return `forward(images)` and one (batch, level width) state a level: its class token, else the mean of its tokens."""
        tokens, found = self._intermediates(images, levels)
        return tokens, [prefix[:, 0] if prefix is not None else patches.mean(1) for patches, prefix in found]

    def layer_tokens(self, images: Tensor, levels: list[int]) -> list[Tensor]:
        """Return the patches after some levels (from 1), not normalised: (batch, patches of the level, level width) each."""
        return [patches for patches, _ in self._intermediates(images, levels)[1]]

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]

    def layers(self) -> list[nn.Module]:
        """Return the blocks whose activations are worth computing again, and that are compiled one by one."""
        return list(_blocks(self.vit))

    def set_image_size(self, image_size: int) -> None:
        """Take images of another size from now on. Position embeddings are interpolated where the model has them."""
        if hasattr(self.vit, "set_input_size"):
            self.vit.set_input_size(image_size)
        self.image_size = image_size
        with torch.no_grad():
            self.grid = self._grid_of(self._probe())

    def _intermediates(self, images: Tensor, levels: list[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
        distinct = sorted(set(levels))
        options = {"return_prefix_tokens": True} if self.prefix_tokens else {}
        features, found = self.vit.forward_intermediates(
            self._pixels(images), [self._levels[level - 1] for level in distinct], **options
        )
        pairs = {}
        for level, each in zip(distinct, found, strict=True):
            patches, prefix = each if self.prefix_tokens else (each, None)
            pairs[level] = (patches.flatten(2).transpose(1, 2), prefix)  # timm returns maps, channels first
        return self._to_tokens(features), [pairs[level] for level in levels]

    def _grid_of(self, features: Tensor) -> tuple[int, int]:
        if features.ndim == 4:
            rows, columns = features.shape[1:3] if self._channels_last() else features.shape[2:4]
            return rows, columns
        side = math.isqrt(features.shape[1] - self.prefix_tokens)
        return side, side

    def _probe(self) -> Tensor:
        """Return the features of one black image, to learn their shape."""
        training = self.vit.training
        self.vit.eval()
        weight = next(self.vit.parameters())
        features = self.vit.forward_features(
            torch.zeros(1, 3, self.image_size, self.image_size, dtype=weight.dtype, device=weight.device)
        )
        self.vit.train(training)
        return features

    def _is_map(self) -> bool:
        """Return whether timm's features are maps, as a CNN's and Swin's, and not tokens."""
        return not hasattr(self.vit, "num_prefix_tokens")

    def _channels_last(self) -> bool:
        return getattr(self.vit, "output_fmt", "NCHW") == "NHWC"

    def _to_tokens(self, features: Tensor) -> Tensor:
        if features.ndim == 3:
            return features
        return features.flatten(1, 2) if self._channels_last() else features.flatten(2).transpose(1, 2)

    def _pixels(self, images: Tensor) -> Tensor:
        pixels = (images.float() - self.mean.float()) / self.std.float()
        dtype = next(self.vit.parameters()).dtype
        # Whoever casts the weights to bf16 (DeepSpeed, the teacher) may leave buffers, and a frozen batch norm is made of buffers.
        for buffer in self.vit.buffers():
            if buffer.is_floating_point() and buffer.dtype != dtype:
                buffer.data = buffer.data.to(dtype)
        return pixels.to(dtype)


class AttentionPool(nn.Module):
    """One learned query that attends to all tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool tokens (batch, tokens, width) to (batch, width)."""
        key, value = self.key_value(self.norm(tokens)).chunk(2, dim=-1)
        query = self.query.to(key.dtype).expand(len(key), -1, -1)
        return nn.functional.scaled_dot_product_attention(query, key, value)[:, 0]


def _create(config: ImageEncoderConfig) -> nn.Module:
    """Build the architecture at its own sizes. Raises RecipeError where timm cannot."""
    settings: dict[str, Any] = {"drop_path_rate": config.drop_path, "num_classes": 0, "img_size": config.image_size}
    settings |= config.arguments
    where = f"model.image: timm cannot make {config.architecture} at {config.image_size} px"
    try:
        try:
            return timm.create_model(config.architecture, **settings)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            del settings["img_size"]  # a CNN takes any size
            return timm.create_model(config.architecture, **settings)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise RecipeError(f"{where}: {' '.join(str(error).split())[:200]}") from error


def _levels_of(model: Any, width: int) -> tuple[list[int], list[int]]:
    """Return timm's indices of the levels and their widths: a ViT's layers, or the stages at stride 4 and beyond."""
    if hasattr(model, "num_prefix_tokens"):
        count = len(model.blocks)
        return list(range(count)), [width] * count
    stages = [(index, stage) for index, stage in enumerate(model.feature_info) if stage["reduction"] >= 4]
    return [index for index, _ in stages], [stage["num_chs"] for _, stage in stages]


def _blocks(model: Any) -> Iterator[Any]:
    """Yield the blocks of any timm model, in order: a ViT's layers, a CNN's residual blocks."""
    for name in ("blocks", "stages", "layers"):
        if isinstance(home := getattr(model, name, None), (nn.Sequential, nn.ModuleList)):
            for stage in home:
                blocks: Any = getattr(stage, "blocks", stage)
                yield from blocks if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else [stage]
            return
    for name in ("layer1", "layer2", "layer3", "layer4"):  # a ResNet
        yield from getattr(model, name, ())
