"""A Vision Transformer of the `transformers` library as an image encoder: CLIP, SigLIP 1 and 2, DINOv2 and 3, ViT, BEiT, DeiT.

`image_encoder.py` states the interface. The library's configuration is `model.image.arguments`: a recipe may leave it out where `weights`
names a folder that holds it, and a checkpoint's model.json always has it, so that a checkpoint is rebuilt without that folder.
A new tower encodes one pattern and compares its pooled output with the library's, so a family that pools in another way is refused.
Position embeddings stay as published; the library interpolates them on the way where the image has another size.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.model.config import ImageEncoderConfig
from pretrain.model.image_encoder import CLIP_MEAN, CLIP_STD
from pretrain.model.timm_tower import AttentionPool
from pretrain.weights.architecture import quiet, read_architecture
from runtime.errors import RecipeError

LAYERS = ("encoder.layers", "encoder.layer", "layers", "model.layer")
"""Where the library's models keep their transformer layers."""


class TransformersTower(nn.Module):
    """uint8 pixels -> tokens: a class token and registers where the model has them, then patches row by row, all normalised.

    Attributes:
        width: Width of the tokens.
        pooled_width: Width of the global state.
        prefix_tokens: How many tokens come before the patches.
        grid: Rows and columns of patches.
        level_widths: Width of each layer.
        crop: Share of the shorter side that the centre crop of an evaluation image keeps. None: the image is squashed to a square.
        resample: How an evaluation image is resized.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        read_architecture(config)
        self.pooling, self.architecture = config.pooling, config.architecture
        self.vit = cast(Any, _create(config))
        patch = getattr(self.vit.config, "patch_size", None)
        if not isinstance(patch, int) or not self.layers():
            raise RecipeError(
                f"model.image: {self.architecture} of transformers is no Vision Transformer; look for it in timm (model.image.kind timm)"
            )
        self.patch, stated = patch, config.preprocessing
        # Not in the state: they are constants, and DeepSpeed does not carry buffers between ranks.
        self.register_buffer("mean", torch.tensor(stated.mean or CLIP_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(stated.std or CLIP_STD).view(3, 1, 1) * 255, persistent=False)
        self.crop = stated.crop or None
        self.resample = "bicubic" if stated.resample == "own" else stated.resample
        self._norm_last = False
        self.set_image_size(config.image_size)
        if self.pooling == "class" and not self.prefix_tokens:
            raise RecipeError(
                f"model.image.pooling is class, but {self.architecture} has no class token; use own, mean or query"
            )
        self.attention_pool = AttentionPool(self.width) if self.pooling == "query" else None
        with torch.no_grad():
            self.pooled_width: int = self.global_state(torch.zeros(1, self.tokens, self.width)).shape[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: (batch, 3, size, size) uint8.

        Returns:
            (batch, tokens, width).
        """
        return self._normalised(self._run(self._pixels(images)).last_hidden_state)

    def global_state(self, tokens: Tensor) -> Tensor:
        """Pool tokens (batch, tokens, width) as `model.image.pooling` says, to (batch, pooled_width)."""
        if self.pooling == "mean":
            return tokens[:, self.prefix_tokens :].mean(1)
        if self.attention_pool is not None:
            return self.attention_pool(tokens)
        return tokens[:, 0] if self.pooling == "class" else self._own_pool(tokens)

    def with_levels(self, images: Tensor, levels: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Return `forward(images)` and one (batch, width) state a level: its class token, else the mean of its tokens."""
        tokens, states = self._with_states(images, levels)
        return tokens, [state[:, 0] if self.prefix_tokens else state.mean(1) for state in states]

    def layer_tokens(self, images: Tensor, levels: list[int]) -> list[Tensor]:
        """Return the patches after some layers (from 1), not normalised: (batch, patches, width) each."""
        return [state[:, self.prefix_tokens :] for state in self._with_states(images, levels)[1]]

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def level_widths(self) -> list[int]:
        """Width of each layer."""
        return [self.width] * len(self.layers())

    def layers(self) -> list[nn.Module]:
        """Return the transformer layers."""
        for path in LAYERS:
            home: Any = self.vit
            for name in path.split("."):
                home = getattr(home, name, None)
            if isinstance(home, nn.ModuleList):
                return list(home)
        return []

    def set_image_size(self, image_size: int) -> None:
        """Take images of another size from now on.

        Raises:
            RecipeError: The size is no multiple of the patch, or the model has positions for its own size only.
        """
        if image_size < self.patch or image_size % self.patch:
            raise RecipeError(
                f"model.image.image_size {image_size} is no multiple of the patch of {self.patch} pixels of {self.architecture}; choose one"
            )
        self.image_size = image_size
        self.grid = (image_size // self.patch, image_size // self.patch)
        self._probe()

    def _probe(self) -> None:
        """Encode one pattern: learn the tokens' shape, and check that they pool to the library's own output."""
        training, weight = self.vit.training, next(self.vit.parameters())
        self.vit.eval()
        numbers = torch.linspace(-1, 1, 3 * self.image_size**2, dtype=weight.dtype, device=weight.device)
        try:
            with torch.no_grad():
                output = self._run(numbers.view(1, 3, self.image_size, self.image_size).sin())
        except (ValueError, RuntimeError) as error:
            own = getattr(self.vit.config, "image_size", None)
            raise RecipeError(
                f"model.image: {self.architecture} of transformers refuses images of {self.image_size} px, its own are {own} px "
                f"({' '.join(str(error).split())[:150]})"
            ) from error
        self.vit.train(training)
        tokens, patches = output.last_hidden_state, self.grid[0] * self.grid[1]
        if tokens.ndim != 3 or tokens.shape[1] < patches:
            raise RecipeError(
                f"model.image: {self.architecture} of transformers gives no token a patch; look for it in timm (model.image.kind timm)"
            )
        self.width, self.prefix_tokens = tokens.shape[-1], tokens.shape[1] - patches
        expected = getattr(output, "pooler_output", None)
        if expected is None:
            if self.pooling == "own":
                raise RecipeError(
                    f"model.image.pooling is own, but {self.architecture} of transformers has none; use class, mean or query"
                )
            return  # SigLIP's head or ViT's dense layer was left out: see `_create`
        # CLIP's tokens have no norm yet, but for the class token that it pools.
        for norm_last in (False, True) if hasattr(self.vit, "post_layernorm") else (False,):
            self._norm_last = norm_last
            with torch.no_grad():
                pooled = self._own_pool(self._normalised(tokens))
            if pooled.shape == expected.shape and torch.allclose(pooled, expected, atol=1e-4, rtol=1e-4):
                return
        raise RecipeError(f"model.image: how {self.architecture} of transformers pools its tokens is not known here")

    def _own_pool(self, tokens: Tensor) -> Tensor:
        for name in ("head", "pooler"):  # SigLIP's attention pooling; ViT's dense layer over the class token
            if (pool := getattr(self.vit, name, None)) is not None:
                return pool(tokens)
        return tokens[:, 0]

    def _normalised(self, tokens: Tensor) -> Tensor:
        return self.vit.post_layernorm(tokens) if self._norm_last else tokens

    def _run(self, pixels: Tensor) -> Any:
        """Return the library's output for normalised pixels (batch, 3, size, size)."""
        if "spatial_shapes" in inspect.signature(self.vit.forward).parameters:
            return self.vit(**_as_patches(pixels, self.patch))
        options = {}
        if "interpolate_pos_encoding" in inspect.signature(self.vit.forward).parameters:
            options["interpolate_pos_encoding"] = self.image_size != self.vit.config.image_size
        return self.vit(pixel_values=pixels, **options)

    def _with_states(self, images: Tensor, levels: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Return `forward(images)`, and all tokens after each of `levels`."""
        states: dict[int, Tensor] = {}
        layers = self.layers()

        def keep(level: int) -> Any:
            def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
                states[level] = output[0] if isinstance(output, tuple) else output

            return hook

        # The library's own list of hidden states has the final norm on its last entry in some families and not in others.
        hooks = [layers[level - 1].register_forward_hook(keep(level)) for level in set(levels)]
        try:
            tokens = self(images)
        finally:
            for handle in hooks:
                handle.remove()
        return tokens, [states[level] for level in levels]

    def _pixels(self, images: Tensor) -> Tensor:
        pixels = (images.float() - self.mean.float()) / self.std.float()
        return pixels.to(next(self.vit.parameters()).dtype)


def _create(config: ImageEncoderConfig) -> nn.Module:
    """Build the architecture with random weights. Raises RecipeError where the library cannot."""
    from transformers import CONFIG_MAPPING, AutoModel

    name = config.architecture
    if name not in CONFIG_MAPPING:
        raise RecipeError(
            f"model.image.architecture: transformers has no {name}; name a family, such as dinov2, or a folder in model.image.weights"
        )
    kind = CONFIG_MAPPING[name]
    if unknown := sorted(config.arguments.keys() - kind().to_dict().keys()):
        raise RecipeError(f"model.image.arguments: {unknown[0]} is no entry of {kind.__name__} of transformers")
    try:
        with quiet():
            settings = kind(**config.arguments)
            if config.pooling != "own" and hasattr(settings, "vision_use_head"):
                settings.vision_use_head = False
            model = cast(Any, AutoModel.from_config(settings))
    except Exception as error:  # the library checks its entries by several means
        raise RecipeError(
            f"model.image: transformers cannot make {name} with these arguments ({' '.join(str(error).split())[:200]})"
        ) from error
    if getattr(model, "main_input_name", "") != "pixel_values":
        raise RecipeError(f"model.image: {name} of transformers does not encode images")
    # No loss would reach these, and an optimizer must not decay them.
    if config.pooling != "own" and hasattr(model, "pooler"):
        model.pooler = None
    if hasattr(getattr(model, "embeddings", None), "mask_token"):
        model.embeddings.mask_token = None
    return model


def _as_patches(pixels: Tensor, patch: int) -> dict[str, Tensor]:
    """Return SigLIP 2's arguments: each image as a row of patches, whose numbers come row by row, then column, then colour."""
    batch, _, height, width = pixels.shape
    patches = pixels.unflatten(2, (-1, patch)).unflatten(4, (-1, patch)).permute(0, 2, 4, 3, 5, 1)
    rows, columns = height // patch, width // patch
    device = pixels.device
    return {
        "pixel_values": patches.reshape(batch, rows * columns, -1),
        "pixel_attention_mask": torch.ones(batch, rows * columns, dtype=torch.int64, device=device),
        "spatial_shapes": torch.tensor([[rows, columns]], device=device).expand(batch, 2),
    }
