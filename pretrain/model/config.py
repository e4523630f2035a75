"""The model part of a recipe: image, text and fusion encoder. Imports no torch.

Tested in tests/runtime/test_recipe.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.checks import check_range
from runtime.errors import RecipeError


@dataclass
class PreprocessingConfig:
    """How an image is made ready for a published image encoder, where that differs from the encoder's own files."""

    mean: list[float] = field(default_factory=list)
    """Mean of each colour, black 0 and white 1. Empty: the encoder's own."""
    std: list[float] = field(default_factory=list)
    """Standard deviation of each colour, black 0 and white 1. Empty: the encoder's own."""
    crop: float | None = None
    """Share of the shorter side that the centre crop of an evaluation image keeps. 0 squashes the whole image to a square.
    null: the encoder's own."""
    resample: Literal["own", "bicubic", "bilinear"] = "own"
    """How an evaluation image is resized. `own`: as the encoder's files say, else bicubic."""

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != 3:
                raise RecipeError(f"model.image.preprocessing.{name} is {values}; give three numbers, or none")
        if self.std and min(self.std) <= 0:
            raise RecipeError(f"model.image.preprocessing.std is {self.std}; deviations must be above 0")
        check_range(self, "model.image.preprocessing.", 0, 1, "crop")


@dataclass
class ImageEncoderConfig:
    """A timm or transformers model that encodes images."""

    architecture: str = "vit_base_patch16_224"
    """Name of a timm model; with kind `vit`, one that has a class token. With kind `transformers` the library's name of the family, such
    as clip_vision_model, siglip_vision_model or dinov2; `weights` tells it, where there are any."""
    image_size: int = 256
    """Pixels a side. Position embeddings of starting weights are interpolated to it."""
    patch: int | None = None
    """Pixels a side of a patch. null: the architecture's own."""
    width: int | None = None
    """Width of the tokens. null: the architecture's own."""
    depth: int | None = None
    """Transformer layers. null: the architecture's own."""
    heads: int | None = None
    """Attention heads. null: the architecture's own."""
    position_std: float = 0.02
    """Standard deviation of fresh position embeddings. A small model from random weights needs 1.0 to learn where things are (docs/decisions.md)."""
    drop_path: float = 0.0
    """Share of residual branches that training skips at random (stochastic depth)."""
    weights: str = "none"
    """Starting weights: `none` (random), `timm` (the architecture's own, downloaded), a safetensors or .pth file, or `package:NAME`, an
    installed Python package that holds one. With kind `transformers` a folder, a name on the hub or `package:NAME`."""
    pooling: Literal["own", "class", "mean", "query"] = "own"
    """What becomes the global feature of a published model: `own`, the model's own pooling; its class token; the mean of its patches; or
    `query`, one learned query that attends to all tokens."""
    frozen: bool = False
    """Keep the starting weights. Projections and a learned query still train."""
    kind: Literal["vit", "timm", "transformers"] = "vit"
    """`vit`: a Vision Transformer with a class token, of any size, initialised as ALBEF does. `timm`: any timm model as its authors made it,
    such as SigLIP, DINOv3, Swin, ConvNeXt or EfficientNet, with its own sizes, pixel statistics and crop. `transformers`: a Vision
    Transformer of that library, such as CLIP, SigLIP 2 or DINOv2."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of a `timm` architecture by timm's names, such as `depths`, or the entries of a `transformers` configuration.
    Empty with `transformers`: those of `weights`."""
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    """Pixel statistics and crop of a published model, where they differ from its own."""

    def __post_init__(self) -> None:
        check_range(self, "model.image.", 1, None, "image_size", "patch", "width", "depth", "heads")
        check_range(self, "model.image.", 0, None, "position_std")
        check_range(self, "model.image.", 0, 1, "drop_path")
        if self.kind == "vit":
            own = self.pooling in ("own", "class") and self.preprocessing == PreprocessingConfig()
            if self.arguments or not own:
                raise RecipeError(
                    "model.image.arguments, pooling and preprocessing are for model.image.kind timm or transformers; a vit has patch, "
                    "width, depth and heads, its class token and CLIP's statistics"
                )
            return
        sizes = [name for name in ("patch", "width", "depth", "heads") if getattr(self, name) is not None]
        if self.kind == "transformers" and self.drop_path:
            sizes.append("drop_path")
        if sizes:
            raise RecipeError(
                f"model.image.{sizes[0]} is set, but a model of kind {self.kind} has its architecture's sizes; use model.image.arguments"
            )


@dataclass
class TextEncoderConfig:
    """The encoder that reads words alone. The fusion encoder continues from its states."""

    width: int = 768
    """Width of the word states."""
    layers: int = 6
    """Transformer layers. With 0 a caption has no feature of its own, and `model.fusion.kind` must be single_stream."""
    heads: int = 12
    """Attention heads. They must divide the width."""
    feed_forward: int = 3072
    """Width of the feed-forward parts."""
    dropout: float = 0.1
    """Share of values that training sets to 0, in the fusion encoder too. Kind `transformers` keeps its own in the text encoder."""
    positions: int = 512
    """Position embeddings: tokens in the longest caption the model can read."""
    weights: str = "none"
    """Starting weights: `none` (random), a model's folder or name on the hub, or `package:NAME`, an installed Python package that holds a
    folder. With kind `bert`, the BERT's layers after `layers` start the fusion encoder."""
    pooling: Literal["class", "mean", "last", "own"] = "own"
    """What becomes a caption's global feature: the state of its first token ([CLS]), the mean of all states, the state of its last token,
    or `own`, the model's own way: a BERT's [CLS], a sentence encoder's pooling, CLIP's and SigLIP's last token."""
    frozen: bool = False
    """Keep the starting weights."""
    stretch_positions: bool = False
    """Stretch the starting weights' position embeddings to `positions`, where that is more (Long-CLIP): the first 20 stay, the others are
    interpolated."""
    kind: Literal["bert", "transformers"] = "bert"
    """`bert`: our own BERT, of any size. `transformers`: any text encoder of the `transformers` library, such as RoBERTa, XLM-R, MPNet,
    ModernBERT or CLIP's text model, in its own sizes."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The configuration of kind `transformers`, by the names of its config.json. Empty: that of `weights`. What is set here goes before it."""

    @property
    def is_described(self) -> bool:
        """Whether the sizes are known: always those of a BERT, those of another encoder once `arguments` are complete."""
        return self.kind == "bert" or "model_type" in self.arguments

    def __post_init__(self) -> None:
        if self.stretch_positions and self.weights == "none":
            raise RecipeError(
                "model.text.stretch_positions is for starting weights, but model.text.weights is none; set one of them"
            )
        check_range(self, "model.text.", 1, None, "width", "heads", "feed_forward", "positions")
        check_range(self, "model.text.", 0, None, "layers")
        check_range(self, "model.text.", 0, 1, "dropout")
        if self.kind != "bert" and self.stretch_positions:
            raise RecipeError(
                "model.text.stretch_positions is for model.text.kind bert; a transformers encoder keeps its positions: set it to false"
            )
        if not self.is_described:
            sizes = ("width", "layers", "heads", "feed_forward", "positions")
            if changed := [name for name in sizes if getattr(self, name) != getattr(TextEncoderConfig, name)]:
                raise RecipeError(
                    f"model.text.{changed[0]} is set, but an encoder of kind transformers has its own sizes; use model.text.arguments"
                )
        if self.width % self.heads:
            raise RecipeError(
                f"model.text.width {self.width} is not a multiple of model.text.heads {self.heads}; change one of them"
            )
        if self.kind == "bert" and self.arguments:
            raise RecipeError(
                "model.text.arguments is for model.text.kind transformers; a bert has width, layers, heads, feed_forward and positions"
            )

    def settle_pooling(self) -> None:
        """Name a BERT's own pooling, so that a recipe's file says it.

        Recipes do this, not `__post_init__`: defaults are made without knowing the kind, and another encoder's own is not the first token.
        """
        if self.kind == "bert" and self.pooling == "own":
            self.pooling = "class"


@dataclass
class FusionEncoderConfig:
    """BERT layers that join words and image tokens. Width, heads and dropout are the text encoder's."""

    kind: Literal["cross_attention", "single_stream"] = "cross_attention"
    """`cross_attention`: words attend to image tokens (CODIS, ALBEF). `single_stream`: one self-attention stack reads both (ViLT,
    VinVL), and VLDeformer can decompose it."""
    layers: int = 6
    """Transformer layers. 0: no fusion encoder; matching and masked_language must be off."""

    def __post_init__(self) -> None:
        check_range(self, "model.fusion.", 0, None, "layers")


@dataclass
class ModelConfig:
    """Image, text and fusion encoder, and what joins them."""

    image: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    """The image encoder."""
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """The text encoder."""
    fusion: FusionEncoderConfig = field(default_factory=FusionEncoderConfig)
    """The fusion encoder."""
    feature_dim: int = 256
    """Width of the projected, unit-norm features."""
    codewords: int = 4000
    """Rows of the codebook. 0: a model without one."""
    temperature: float = 0.07
    """Starting temperature of the contrastive losses. It is learned, within 0.001 and 0.5."""
    levels: list[list[int]] = field(default_factory=list)
    """Pairs of [text layer, image layer], counted from 1, that `objectives.levels` aligns in addition to the last layers."""

    feature_dropout: float = 0.0
    """Share of the pooled image and text states that training sets to 0 before the projections. It keeps projections of strong frozen
    encoders from learning a small dataset by heart."""
    codebook_update: Literal["gradient", "average"] = "gradient"
    """How codewords move. `gradient`: the codebook's loss trains them (CODIS). `average`: each follows the mean of the features that the
    transport plans assign to it, as in k-means, without a gradient; before they start they are 0."""
    codebook_centered: bool = False
    """Subtract each modality's running mean from features before they meet codewords, and normalise again. Features of one modality lie
    in a cone, and so around its axis they hardly differ."""

    def __post_init__(self) -> None:
        check_range(self, "model.", 0, 1, "feature_dropout")
        if not 0.001 < self.temperature < 0.5:
            raise RecipeError(f"model.temperature is {self.temperature}; it must lie between 0.001 and 0.5")
        if self.codewords < 0:
            raise RecipeError(f"model.codewords is {self.codewords}; it must be 0 or more")
        if self.feature_dim < 1:
            raise RecipeError(f"model.feature_dim is {self.feature_dim}; it must be 1 or more")
        for pair in self.levels:
            if len(pair) != 2 or min(pair) < 1 or (self.text.is_described and pair[0] > self.text.layers):
                raise RecipeError(
                    f"model.levels holds {pair}; a level is a pair [text layer, image layer] of existing layers, counted from 1"
                )
