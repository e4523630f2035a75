"""The image encoder: a timm Vision Transformer that returns all its tokens."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from pretrain.config import ImageEncoderConfig
from pretrain.model.bert_layers import initial_std
from runtime.errors import RecipeError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder(nn.Module):
    """uint8 pixels -> tokens, the class token first. Pixels are normalised here, on the device, in CLIP's statistics (as ALBEF)."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        sizes = {
            "patch_size": config.patch,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
        }
        stated: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        try:
            made = timm.create_model(
                config.architecture,
                img_size=config.image_size,
                num_classes=0,
                global_pool="",
                drop_path_rate=config.drop_path,
                **stated,
            )
        except (RuntimeError, TypeError, AssertionError, ValueError) as error:
            raise RecipeError(
                f"model.image: timm cannot make {config.architecture} with {stated} at {config.image_size} px: {error}"
            ) from error
        self.vit = cast(Any, made)  # timm's classes share these attributes, not a type
        if getattr(self.vit, "cls_token", None) is None:
            raise RecipeError(
                f"model.image.architecture {config.architecture} has no class token; choose a timm ViT that has one"
            )
        self.width: int = self.vit.embed_dim
        with torch.no_grad():
            for module in self.vit.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=initial_std(self.width))
            if self.vit.pos_embed is not None:  # some of timm's rotate instead
                self.vit.pos_embed.normal_(std=config.position_std)
        self.tokens: int = self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens
        # Not in the state: they are constants, and DeepSpeed does not carry buffers between ranks.
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1) * 255, persistent=False)

    def set_image_size(self, image_size: int) -> None:
        """Take images of so many pixels a side from now on, position embeddings interpolated."""
        positions = self.vit.pos_embed
        self.vit.set_input_size(image_size)
        if positions is not None:  # timm's own interpolation smooths as well (antialias)
            first = 0 if getattr(self.vit, "no_embed_class", False) else self.vit.num_prefix_tokens
            self.vit.pos_embed.data = interpolate_positions(positions.data, self.vit.patch_embed.grid_size[0], first)

    def forward(self, images: Tensor) -> Tensor:
        """images: (batch, 3, size, size) uint8 -> (batch, 1 + patches, width)."""
        return self.vit(self._pixels(images))

    def with_levels(self, images: Tensor, layers: list[int]) -> tuple[Tensor, list[Tensor]]:
        """`forward`, and the class token after each of some layers (from 1): (batch, width) each, not yet normalised."""
        distinct = sorted(set(layers))  # as timm returns them
        tokens, found = self.vit.forward_intermediates(
            self._pixels(images), [layer - 1 for layer in distinct], return_prefix_tokens=True, output_fmt="NLC"
        )
        tops = {layer: prefix[:, 0] for layer, (_, prefix) in zip(distinct, found, strict=True)}
        return tokens, [tops[layer] for layer in layers]

    def layer_tokens(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        """Patch tokens after some layers (from 1), not yet normalised: (batch, patches, width) each, the class token left out."""
        distinct = sorted(set(layers))
        found = self.vit.forward_intermediates(
            self._pixels(images), [layer - 1 for layer in distinct], output_fmt="NLC", intermediates_only=True
        )
        tokens = dict(zip(distinct, found, strict=True))
        return [tokens[layer] for layer in layers]

    def _pixels(self, images: Tensor) -> Tensor:
        pixels = (images.float() - self.mean.float()) / self.std.float()
        return pixels.to(self.vit.patch_embed.proj.weight.dtype)


def interpolate_positions(embedding: Tensor, side: int, first: int = 1) -> Tensor:
    """(1, first + patches, width) -> (1, first + side * side, width), the `first` tokens' as they are; bicubic, as ALBEF does it:
    corners not aligned, nothing smoothed."""
    return resample_abs_pos_embed(embedding, [side, side], num_prefix_tokens=first, antialias=False)
