"""The heads' own parts of a recipe: one dataclass a head, read where a recipe names that head. They import no torch.

Tested in tests/finetune/heads/test_hat.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pretrain.model.config import TextEncoderConfig
from runtime.checks import check_range
from runtime.errors import RecipeError


@dataclass
class ImageBackboneConfig:
    """A timm image encoder with features at several strides: any Swin, any ResNet."""

    architecture: str = "swin_base_patch4_window7_224"
    """The encoder's name in timm."""
    image_size: int = 224
    """Pixels a side."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the architecture (`depths`, `embed_dim`, …), as timm names them."""
    drop_path: float = 0.1
    """Probability of skipping a residual branch while training."""
    weights: str = "timm"
    """Starting weights: `timm` (downloaded), a safetensors or .pth file, or `none` (random)."""

    def __post_init__(self) -> None:
        check_range(self, "hat.image.", 1, None, "image_size")
        check_range(self, "hat.image.", 0, 1, "drop_path")


@dataclass
class HatConfig:
    """HAT: several levels of an image encoder and a text encoder, compared token by token by stacked cross attention."""

    direction: Literal["image_to_text", "text_to_image"] = "image_to_text"
    """`image_to_text` lets regions attend to words (HAT's i-t); `text_to_image` lets words attend to regions (t-i)."""
    encoders: Literal["checkpoint", "backbones"] = "checkpoint"
    """`checkpoint` takes the encoders of `checkpoint`; `backbones` takes `hat.image` and `hat.text`, Swin and BERT as in the paper."""
    levels: list[list[int]] | None = None
    """Pairs [text layer, image level], counted from 1. An image level is a layer of a ViT, or a stage of a Swin or ResNet.
    null: [[4, 2], [10, 3], [12, 4]] for backbones, [[2, 4], [4, 8], [6, 12]] for a checkpoint's encoders. A pair may
    appear more than once; each has projections of its own."""
    attention: Literal["cross", "mean"] = "cross"
    """`cross` is the paper's. `mean`, an ablation, compares the mean region with the mean word."""
    width: int = 768
    """Width that the tokens of both sides are projected to."""
    sharpness: float = 9.0
    """Factor before the attention's softmax (the paper's lambda)."""
    margin: float = 0.2
    """By how much a matched pair should score above its negatives."""
    hardest_from_epoch: float = 0.0
    """Epochs after which only the hardest negative of a pair counts; before, all count alike. With weak encoders the hardest
    negatives teach little alone: the loss stays near twice the margin."""
    frozen_epochs: float = 10.0
    """Epochs at the start in which only the projections learn."""
    encoder_lr_share: float = 0.1
    """The encoders' learning rate as a share of `optimizer.lr`, once they learn."""
    image: ImageBackboneConfig = field(default_factory=ImageBackboneConfig)
    """The image encoder. Read where `encoders` is `backbones`."""
    text: TextEncoderConfig = field(
        default_factory=lambda: TextEncoderConfig(layers=12, weights="google-bert/bert-base-uncased")
    )
    """The text encoder. Read where `encoders` is `backbones`."""
    tokenizer: str = ""
    """Folder or name of the backbones' tokenizer. Empty: that of `hat.text.weights`."""
    caption_tokens: int = 32
    """Length in tokens that captions are cut to, with backbones. A checkpoint has its own."""

    def __post_init__(self) -> None:
        check_range(self, "hat.", 0, None, "margin", "hardest_from_epoch", "encoder_lr_share")
        levels = self.levels if self.levels is not None else [[1, 1]]
        if not levels or any(len(pair) != 2 or min(pair) < 1 for pair in levels):
            raise RecipeError(
                f"hat.levels is {self.levels}; it must be a list of pairs [text layer, image level], counted from 1"
            )
        if self.encoders == "backbones":
            if self.text.kind != "bert":
                raise RecipeError(
                    "hat.text.kind is transformers, but the backbones' text encoder is a bert; pretrain with that encoder and use its checkpoint"
                )
            for name in ("image", "text"):
                if self.frozen_epochs and getattr(self, name).weights == "none":
                    raise RecipeError(
                        f"hat.frozen_epochs is {self.frozen_epochs:g}, but hat.{name}.weights is none: random encoders "
                        "cannot stay frozen; give weights, or set hat.frozen_epochs to 0"
                    )
            if not self.tokenizer and self.text.weights == "none":
                raise RecipeError("hat.text.weights is none, so hat.tokenizer must name a tokenizer")
            if self.caption_tokens > self.text.positions:
                raise RecipeError(
                    f"hat.caption_tokens {self.caption_tokens} is more than hat.text.positions {self.text.positions}; lower it"
                )
        if not 0 <= self.sharpness <= 40:  # its exponential is squared, in float32, and must not overflow
            raise RecipeError(f"hat.sharpness is {self.sharpness:g}; it must be between 0 and 40")
        if self.frozen_epochs < 0 or self.width < 1:
            raise RecipeError(
                f"hat.frozen_epochs is {self.frozen_epochs:g} and hat.width is {self.width}; they must be 0 or more and 1 or more"
            )

    def pairs(self) -> list[list[int]]:
        """Return the levels, or the default ones of these encoders."""
        default = [[4, 2], [10, 3], [12, 4]] if self.encoders == "backbones" else [[2, 4], [4, 8], [6, 12]]
        return self.levels if self.levels is not None else default


@dataclass
class HardNegativesConfig:
    """Altered captions and images in the denominators of VLDeformer's loss (section 3.4 of the paper)."""

    text: bool = True
    """Whether to alter captions, by exchanging words."""
    image: bool = True
    """Whether to alter images, by exchanging patches. It costs two more image encodings a step, one of them without gradient."""
    text_ratio: float = 0.5
    """Probability of exchanging a word: a noun for an object word; a verb, adjective or adverb for its antonym."""
    lexicon: str = "auto"
    """Source of word kinds and antonyms: a WordNet `dict` folder, or `built-in`, a few hundred words. `auto` takes WordNet
    where Debian's wordnet-base is installed, else `built-in`; the run's first line says which."""
    objects: list[str] = field(default_factory=list)
    """Words that replace nouns. Empty: COCO's 80 objects."""
    attended: float = 0.25
    """Share of an image's patches that are exchanged because the caption's nouns attend to them most. The starting model
    gives the attention."""
    rest: float = 0.5
    """Share of the other patches that are exchanged, at random."""

    def __post_init__(self) -> None:
        for name in ("text_ratio", "attended", "rest"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise RecipeError(f"vldeformer.negatives.{name} is {value}; it must be a share, from 0 to 1")
        if self.image and not self.attended and not self.rest:
            raise RecipeError(
                "vldeformer.negatives.attended and rest are both 0, so no patch is exchanged; set image to false"
            )


@dataclass
class VLDeformerConfig:
    """VLDeformer: a fusion model's joint layers run on each modality alone, tuned by contrast to give embeddings."""

    pooling: Literal["mean", "cls"] = "mean"
    """What represents a caption or an image: the mean of the last layer's tokens, or their first one ([CLS], class token)."""
    loss: Literal["contrastive", "cosine"] = "contrastive"
    """`contrastive` is the paper's. `cosine`, its ablation, draws each pair's cosine to 1 and every other pair's down to 0."""
    temperature: float = 0.005
    """Divides the cosines in the contrastive loss. It does not learn."""
    start: Literal["checkpoint", "unpretrained", "fresh_joint"] = "checkpoint"
    """Which weights to start from. `checkpoint` takes all of them. `fresh_joint`, a control, keeps the encoders' and makes the
    joint layers' anew. `unpretrained`, an ablation, takes the weights that the checkpoint's pretraining began from: timm's and
    BERT's where its recipe names them, else random ones."""
    negatives: HardNegativesConfig = field(default_factory=HardNegativesConfig)
    """Altered captions and images. Read where `loss` is `contrastive`."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise RecipeError(f"vldeformer.temperature is {self.temperature}; it must be above 0")


@dataclass
class ExchangedWordsConfig:
    """Matching of each caption against itself with words exchanged, beside `matching` (finetune/hard_negatives/exchanged_words.py)."""

    weight: float = 0.0
    """Weight of the loss; 0 leaves it out."""
    words: list[str] = field(default_factory=list)
    """Pairs of words to exchange, such as `left right`. Each word is one token of the checkpoint's vocabulary."""

    def __post_init__(self) -> None:
        check_range(self, "exchanged.", 0, None, "weight")
        if wrong := [pair for pair in self.words if len(set(pair.split())) != 2]:
            raise RecipeError(
                f"exchanged.words holds {wrong[0]!r}; a pair must be two different words, such as 'left right'"
            )
        if self.weight and not self.words:
            raise RecipeError("exchanged.weight is set but exchanged.words is empty; name pairs such as 'left right'")
