"""The image encoder: a timm Vision Transformer that returns all its tokens."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from pretrain.config import ImageEncoderConfig
from runtime.errors import CheckpointError, RecipeError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder(nn.Module):
    """uint8 pixels -> tokens, the class token first. Pixels are normalised here, on the device, in CLIP's statistics (as ALBEF)."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        sizes = {"patch_size": config.patch, "embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
        stated = {name: size for name, size in sizes.items() if size is not None}
        try:
            self.vit = timm.create_model(
                config.architecture, img_size=config.image_size, num_classes=0, global_pool="", drop_path_rate=config.drop_path, **stated
            )
        except (RuntimeError, TypeError, AssertionError, ValueError) as error:
            raise RecipeError(f"model.image: timm cannot make {config.architecture} with {stated} at {config.image_size} px: {error}") from error
        if getattr(self.vit, "cls_token", None) is None:
            raise RecipeError(f"model.image.architecture {config.architecture} has no class token; choose a timm ViT that has one")
        self.width: int = self.vit.embed_dim
        # Not in the state: they are constants, and DeepSpeed does not carry buffers between ranks.
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1) * 255, persistent=False)
        if config.weights != "none":
            self._load(config)

    def forward(self, images: Tensor) -> Tensor:
        """images: (batch, 3, size, size) uint8 -> (batch, 1 + patches, width)."""
        pixels = (images.float() - self.mean.float()) / self.std.float()
        return self.vit(pixels.to(self.vit.patch_embed.proj.weight.dtype))

    def _load(self, config: ImageEncoderConfig) -> None:
        from timm.models import load_checkpoint

        source = config.weights
        try:
            if source == "timm":
                start = timm.create_model(config.architecture, pretrained=True, img_size=config.image_size, num_classes=0, global_pool="")
                self.vit.load_state_dict(start.state_dict())
            elif Path(source).is_file():
                load_checkpoint(self.vit, source, strict=True)
            else:
                raise CheckpointError(f"model.image.weights: no file {source}; give a safetensors or .pth file, `timm` or `none`")
        except CheckpointError:
            raise
        except Exception as error:  # a download or a file of another shape fails in many ways: all of them stop the run
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"model.image.weights: cannot load `{source}` into {config.architecture} ({reason}); without network, give a file") from error
