"""Two encoders as HAT reads them: token states at several depths. A checkpoint's own encoders, or timm's and BERT's."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from finetune.heads.config import HatConfig
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.text_encoder import TextEncoder
from pretrain.weights.starting import load_bert_encoder
from runtime.errors import CheckpointError, RecipeError


class LevelEncoders(nn.Module):
    """An image encoder and a text encoder. Text layers and image levels are counted from 1."""

    image_widths: list[int]
    """Width of each image level's tokens."""
    image_size: int
    text_encoder: TextEncoder

    def image_levels(self, images: Tensor, levels: list[int]) -> list[Tensor]:
        """images: (batch, 3, size, size) uint8 -> one (batch, regions, width) for each of `levels`, regions row by row."""
        raise NotImplementedError

    def text_levels(self, ids: Tensor, mask: Tensor, layers: list[int]) -> list[Tensor]:
        """ids, mask: (batch, words) -> one (batch, words, width) for each of `layers`."""
        states = self.text_encoder.layer_states(ids, mask)
        return [states[layer] for layer in layers]

    def check(self, pairs: list[list[int]]) -> None:
        """Refuse levels that these encoders do not have."""
        layers, stages = len(self.text_encoder.layers), len(self.image_widths)
        for text, image in pairs:
            if text > layers or image > stages:
                raise RecipeError(
                    f"hat.levels has [{text}, {image}], but the text encoder has {layers} layers and the image encoder "
                    f"{stages} levels; choose [text layer, image level] among them"
                )


class CheckpointEncoders(LevelEncoders):
    """The encoders of an alignment model (a ViT and BERT layers); what stands above them is left behind."""

    def __init__(self, network: AlignmentModel) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder = network.image_encoder, network.text_encoder
        self.image_widths = [self.image_encoder.width] * len(self.image_encoder.vit.blocks)
        self.image_size = network.config.image.image_size

    def image_levels(self, images: Tensor, levels: list[int]) -> list[Tensor]:
        return self.image_encoder.layer_tokens(images, levels)


class BackboneEncoders(LevelEncoders):
    """A timm image encoder whose stages are the levels, and a BERT. `start` loads their starting weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: HatConfig, vocabulary: int, start: bool) -> None:
        super().__init__()
        self.image_size = config.image.image_size
        self.backbone = cast(Any, _timm_model(config, start))
        self.text_encoder = TextEncoder(config.text, vocabulary)
        if start and config.text.weights != "none":
            load_bert_encoder(self.text_encoder, config.text, "hat.text")
        stages = [(number, stage) for number, stage in enumerate(self.backbone.feature_info) if stage["reduction"] >= 4]
        self.stages = [number for number, _ in stages]  # a ResNet's stem is no stage
        self.image_widths = [stage["num_chs"] for _, stage in stages]
        known = self.backbone.pretrained_cfg
        self.register_buffer("mean", torch.tensor(known["mean"]).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(known["std"]).view(3, 1, 1) * 255, persistent=False)

    def train(self, mode: bool = True) -> BackboneEncoders:
        """Batch norms keep the statistics they came with: a fine-tuning batch is too small to make better ones."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def image_levels(self, images: Tensor, levels: list[int]) -> list[Tensor]:
        distinct = sorted(set(levels))
        found = self.backbone.forward_intermediates(
            (images.float() - self.mean) / self.std,
            [self.stages[level - 1] for level in distinct],
            intermediates_only=True,
        )
        tokens = {level: maps.flatten(2).transpose(1, 2) for level, maps in zip(distinct, found, strict=True)}
        return [tokens[level] for level in levels]


def _timm_model(config: HatConfig, start: bool) -> nn.Module:
    image = config.image
    settings: dict[str, Any] = {"num_classes": 0, "global_pool": "", "drop_path_rate": image.drop_path}
    settings |= image.arguments
    weights = image.weights if start else "none"
    if weights != "none":
        settings["pretrained"] = True
        if weights != "timm":
            settings["pretrained_cfg_overlay"] = {"file": weights}
    try:
        try:
            return timm.create_model(image.architecture, img_size=image.image_size, **settings)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(image.architecture, **settings)  # a ResNet takes any size
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(
            f"hat.image: timm cannot make {image.architecture} at {image.image_size} px: {' '.join(str(error).split())}"
        ) from error
    except (RuntimeError, OSError) as error:
        if weights == "none":
            raise RecipeError(f"hat.image: timm cannot make {image.architecture}: {error}") from error
        raise CheckpointError(
            f"hat.image.weights: cannot load `{weights}` into {image.architecture} ({' '.join(str(error).split())[:200]}); "
            "without network, give a file"
        ) from error
