"""HAT's encoders: token states at several depths, from a checkpoint's own encoders or from timm's and BERT's.

Tested in tests/finetune/heads/test_hat.py.
"""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from finetune.heads.config import HatConfig
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.parts import Part, encoder_parts
from pretrain.model.text_encoder import TextEncoder
from pretrain.model.transformers_text import TransformersText
from pretrain.weights.starting import load_bert_encoder
from runtime.errors import CheckpointError, RecipeError


class LevelEncoders(nn.Module):
    """An image encoder and a text encoder. Text layers and image levels are counted from 1."""

    image_widths: list[int]
    """Width of each image level's tokens."""
    image_size: int
    """Pixels a side."""
    text_encoder: TextEncoder | TransformersText

    def image_levels(self, images: Tensor, levels: list[int]) -> list[Tensor]:
        """Encode images, (batch, 3, size, size) uint8, into one (batch, regions, width) for each of `levels`, regions row by row."""
        raise NotImplementedError

    def text_levels(self, ids: Tensor, mask: Tensor, layers: list[int]) -> list[Tensor]:
        """Encode captions, ids and mask of shape (batch, words), into one (batch, words, width) for each of `layers`."""
        states = self.text_encoder.layer_states(ids, mask)
        return [states[layer] for layer in layers]

    def parts(self) -> dict[str, Part]:
        """Return both encoders as parts, for learning rates and freezing."""
        raise NotImplementedError

    def check(self, pairs: list[list[int]]) -> None:
        """Refuse levels that these encoders do not have.

        Args:
            pairs: [text layer, image level], counted from 1.

        Raises:
            RecipeError: a layer or a level is too high.
        """
        layers, stages = len(self.text_encoder.layers), len(self.image_widths)
        for text, image in pairs:
            if text > layers or image > stages:
                raise RecipeError(
                    f"hat.levels has [{text}, {image}], but the text encoder has {layers} layers and the image encoder "
                    f"{stages} levels; choose [text layer, image level] among them"
                )


class CheckpointEncoders(LevelEncoders):
    """The encoders of an alignment model, a ViT and BERT layers, without the parts above them."""

    def __init__(self, network: AlignmentModel) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder = network.image_encoder, network.text_encoder
        self.image_widths = self.image_encoder.level_widths
        self.image_size = network.config.image.image_size

    def parts(self) -> dict[str, Part]:
        """Return the alignment model's encoders."""
        return encoder_parts(self.image_encoder, self.text_encoder)

    def image_levels(self, images: Tensor, levels: list[int]) -> list[Tensor]:
        """Return the tokens after each of the ViT's layers in `levels`."""
        return self.image_encoder.layer_tokens(images, levels)


class BackboneEncoders(LevelEncoders):
    """A timm image encoder, its stages the levels, and a BERT. `start` says whether to load their starting weights."""

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
        self.stages = [number for number, _ in stages]  # a ResNet's stem, at half the resolution, is no stage
        self.image_widths = [stage["num_chs"] for _, stage in stages]
        normalisation = self.backbone.pretrained_cfg
        self.register_buffer("mean", torch.tensor(normalisation["mean"]).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(normalisation["std"]).view(3, 1, 1) * 255, persistent=False)

    def train(self, mode: bool = True) -> BackboneEncoders:
        """Set the mode, but keep batch norms in evaluation mode: a fine-tuning batch is too small for better statistics."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def parts(self) -> dict[str, Part]:
        """Return timm's model, which knows its layers itself, and the BERT."""
        return {"image": Part(self.backbone, []), "text": Part(self.text_encoder, list(self.text_encoder.layers))}

    def image_levels(self, images: Tensor, levels: list[int]) -> list[Tensor]:
        """Return the maps of each of the stages in `levels` as tokens."""
        distinct = sorted(set(levels))
        stage_maps = self.backbone.forward_intermediates(
            (images.float() - self.mean) / self.std,
            [self.stages[level - 1] for level in distinct],
            intermediates_only=True,
        )
        tokens = {level: maps.flatten(2).transpose(1, 2) for level, maps in zip(distinct, stage_maps, strict=True)}
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
            return timm.create_model(image.architecture, **settings)  # a ResNet takes any size, and no argument for it
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(
            f"hat.image: timm cannot build {image.architecture} at {image.image_size} px: {' '.join(str(error).split())}"
        ) from error
    except (RuntimeError, OSError) as error:
        if weights == "none":
            raise RecipeError(f"hat.image: timm cannot build {image.architecture}: {error}") from error
        raise CheckpointError(
            f"hat.image.weights is `{weights}`, which cannot be loaded into {image.architecture} "
            f"({' '.join(str(error).split())[:200]}); without a network, give a file"
        ) from error
