"""The image encoder: a timm Vision Transformer that returns all its tokens.

The interface that the rest of the model uses:

- `forward(images)` returns tokens (images, 1 + patches, width), the class token first.
- `global_state(tokens)` pools them, here to the class token, and `AlignmentModel.image_features` projects the result.
- `with_levels(images, layers)` returns the tokens and the class token after inner layers, for levels. `layer_tokens` returns the patch
  tokens after inner layers. `level_widths` has the width of each.
- `width`; `pooled_width`, that of the global state; `tokens`, how many tokens an image has; `grid`, rows and columns of patches.
- `layers()`, for compiling and activation checkpointing; `set_image_size(image_size)`; `crop` and `resample`, for scoring.

`timm_tower.py` and `transformers_tower.py` have the same interface for other models.

Tested in tests/pretrain/model/test_alignment_model.py.
"""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from pretrain.model.bert_layers import initial_std
from pretrain.model.config import ImageEncoderConfig
from runtime.errors import RecipeError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder(nn.Module):
    """Encodes uint8 pixels into tokens, the class token first.

    Pixels are normalised here, on the device, by CLIP's mean and deviation (as in ALBEF).

    Raises:
        RecipeError: timm cannot make the architecture, or it has no class token.
    """

    mean: Tensor
    std: Tensor
    crop: float | None = None
    """Share of the shorter side that an evaluation image's centre crop keeps. None: the whole image is squashed to a square."""
    resample = "bicubic"
    """How an evaluation image is resized."""

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
            vit = timm.create_model(
                config.architecture,
                img_size=config.image_size,
                num_classes=0,
                global_pool="",
                drop_path_rate=config.drop_path,
                **stated,
            )
        except (RuntimeError, TypeError, AssertionError, ValueError) as error:
            raise RecipeError(
                f"model.image: timm cannot make {config.architecture} with {stated} at {config.image_size} px ({error}); change these settings"
            ) from error
        self.vit = cast(Any, vit)  # timm's classes share these attributes, not a type
        if getattr(self.vit, "cls_token", None) is None:
            raise RecipeError(
                f"model.image.architecture {config.architecture} has no class token; choose a timm ViT that has one"
            )
        self.width: int = self.vit.embed_dim
        self.pooled_width = self.width
        self.level_widths = [self.width] * len(self.vit.blocks)
        with torch.no_grad():
            for module in self.vit.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=initial_std(self.width))
            if self.vit.pos_embed is not None:  # some of timm's models have rotary positions instead
                self.vit.pos_embed.normal_(std=config.position_std)
        # Not persistent: they are constants, and DeepSpeed does not copy buffers between ranks.
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1) * 255, persistent=False)

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return int(self.vit.patch_embed.img_size[0])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.vit.patch_embed.grid_size
        return rows, columns

    @property
    def tokens(self) -> int:
        """Tokens of an image: patches, the class token, and registers where the architecture has them."""
        return self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens

    def layers(self) -> list[nn.Module]:
        """Return the transformer layers."""
        return list(self.vit.blocks)

    def set_image_size(self, image_size: int) -> None:
        """Take images of `image_size` pixels a side from now on, and interpolate the position embeddings."""
        positions = self.vit.pos_embed
        self.vit.set_input_size(image_size)
        if positions is not None:  # again, from the original: timm's own interpolation also smooths (antialias)
            first = 0 if getattr(self.vit, "no_embed_class", False) else self.vit.num_prefix_tokens
            self.vit.pos_embed.data = interpolate_positions(positions.data, self.vit.patch_embed.grid_size[0], first)

    def forward(self, images: Tensor) -> Tensor:
        """Return tokens (batch, 1 + patches, width) of images (batch, 3, size, size) uint8."""
        return self.vit(self._pixels(images))

    def global_state(self, tokens: Tensor) -> Tensor:
        """Return the class token, (batch, width), of tokens (batch, 1 + patches, width)."""
        return tokens[:, 0]

    def with_levels(self, images: Tensor, layers: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Return `forward`'s tokens, and the class token after inner layers.

        Args:
            images: (batch, 3, size, size) uint8.
            layers: counted from 1; one may come twice.

        Returns:
            Tokens (batch, 1 + patches, width), and for each of `layers` (batch, width), not yet normalised.
        """
        distinct = sorted(set(layers))  # timm returns each layer once, in order
        tokens, outputs = self.vit.forward_intermediates(
            self._pixels(images), [layer - 1 for layer in distinct], return_prefix_tokens=True, output_fmt="NLC"
        )
        tops = {layer: prefix[:, 0] for layer, (_, prefix) in zip(distinct, outputs, strict=True)}
        return tokens, [tops[layer] for layer in layers]

    def layer_tokens(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        """Return the patch tokens after inner layers, without the class token.

        Args:
            images: (batch, 3, size, size) uint8.
            layers: counted from 1; one may come twice.

        Returns:
            For each of `layers` (batch, patches, width), not yet normalised.
        """
        distinct = sorted(set(layers))
        outputs = self.vit.forward_intermediates(
            self._pixels(images), [layer - 1 for layer in distinct], output_fmt="NLC", intermediates_only=True
        )
        tokens = dict(zip(distinct, outputs, strict=True))
        return [tokens[layer] for layer in layers]

    def _pixels(self, images: Tensor) -> Tensor:
        pixels = (images.float() - self.mean.float()) / self.std.float()
        return pixels.to(self.vit.patch_embed.proj.weight.dtype)


def interpolate_positions(embedding: Tensor, side: int, first: int = 1) -> Tensor:
    """Interpolate position embeddings to another resolution: bicubic, corners not aligned, not smoothed, as in ALBEF.

    Args:
        embedding: (1, first + patches, width)
        side: patches a side of the new resolution.
        first: tokens before the patches; their embeddings stay as they are.

    Returns:
        (1, first + side * side, width)
    """
    return resample_abs_pos_embed(embedding, [side, side], num_prefix_tokens=first, antialias=False)
