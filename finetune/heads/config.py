"""The heads' own parts of a recipe: one dataclass a head, read where a recipe names that head. They import no torch.

Tested in tests/finetune/heads/test_hat.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pretrain.config import TextEncoderConfig
from runtime.errors import RecipeError


@dataclass
class ImageBackboneConfig:
    """A timm image encoder that gives features at several strides: any Swin, any ResNet."""

    architecture: str = "swin_base_patch4_window7_224"
    image_size: int = 224
    """Pixels a side."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """More arguments of the architecture (`depths`, `embed_dim`, …), as timm names them."""
    drop_path: float = 0.1
    weights: str = "timm"
    """Starting weights: `timm` (downloaded), a safetensors or .pth file, or `none` (random)."""


@dataclass
class HatConfig:
    """HAT: several levels of an image encoder and of a text encoder, compared token by token (stacked cross attention)."""

    direction: Literal["image_to_text", "text_to_image"] = "image_to_text"
    """`image_to_text` lets regions attend to words (HAT's i-t), `text_to_image` words to regions (t-i)."""
    encoders: Literal["checkpoint", "backbones"] = "checkpoint"
    """`checkpoint`: the encoders of `checkpoint`; `backbones`: `hat.image` and `hat.text`, Swin and BERT as in the paper."""
    levels: list[list[int]] | None = None
    """Pairs [text layer, image level], counted from 1; an image level is a layer of a ViT, a stage of a Swin or ResNet.
    None: [[4, 2], [10, 3], [12, 4]] for backbones, [[2, 4], [4, 8], [6, 12]] for a checkpoint's encoders. A pair may come
    more than once: each has projections of its own."""
    attention: Literal["cross", "mean"] = "cross"
    """`mean` compares the mean region with the mean word instead (an ablation)."""
    width: int = 768
    """Width that both sides' tokens are projected to."""
    sharpness: float = 9.0
    """Factor before the attention's softmax (lambda)."""
    margin: float = 0.2
    """Of the triplet loss."""
    hardest_from_epoch: float = 0.0
    """All negatives of a pair count alike before, the hardest alone from then on. From weak encoders the hardest alone teach
    little: the loss stays near twice the margin."""
    frozen_epochs: float = 10.0
    """Epochs in which the projections alone learn."""
    encoder_lr_share: float = 0.1
    """The encoders' share of the learning rate, once they learn."""
    image: ImageBackboneConfig = field(default_factory=ImageBackboneConfig)
    text: TextEncoderConfig = field(
        default_factory=lambda: TextEncoderConfig(layers=12, weights="google-bert/bert-base-uncased")
    )
    tokenizer: str = ""
    """Folder or name of the backbones' tokenizer; empty: that of `text.weights`."""
    caption_tokens: int = 32
    """Tokens a caption is cut to, with backbones; a checkpoint has its own."""

    def __post_init__(self) -> None:
        levels = self.levels if self.levels is not None else [[1, 1]]
        if not levels or any(len(pair) != 2 or min(pair) < 1 for pair in levels):
            raise RecipeError(
                f"hat.levels is {self.levels}; it is a list of pairs [text layer, image level], from 1 up"
            )
        if self.encoders == "backbones":
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
                    f"hat.caption_tokens {self.caption_tokens} is more than hat.text.positions {self.text.positions}"
                )
        if not 0 <= self.sharpness <= 40:  # its exponential is squared, in float32
            raise RecipeError(f"hat.sharpness is {self.sharpness:g}; it lies between 0 and 40")
        if self.frozen_epochs < 0 or self.width < 1:
            raise RecipeError(f"hat.frozen_epochs {self.frozen_epochs:g}, hat.width {self.width}: 0 or more, 1 or more")

    def pairs(self) -> list[list[int]]:
        """The levels, or the default ones of these encoders."""
        default = [[4, 2], [10, 3], [12, 4]] if self.encoders == "backbones" else [[2, 4], [4, 8], [6, 12]]
        return self.levels if self.levels is not None else default


@dataclass
class HardNegativesConfig:
    """Altered captions and images that join the denominators of VLDeformer's loss (the paper's section 3.4)."""

    text: bool = True
    """Captions with words exchanged."""
    image: bool = True
    """Images with patches exchanged. Costs two more image encodings a step, one of them without gradient."""
    text_ratio: float = 0.5
    """Probability for each noun (-> an object word), verb, adjective and adverb (-> its antonym)."""
    lexicon: str = "auto"
    """Which words are what, and their antonyms: a WordNet `dict` folder; `built-in`, a few hundred words; or `auto`, WordNet
    where Debian's wordnet-base put it, else `built-in`. The run's first line says which."""
    objects: list[str] = field(default_factory=list)
    """Words that nouns give way to; none: COCO's 80 objects."""
    attended: float = 0.25
    """Share of the patches, those that the caption's nouns attend to most in the model as it started, that give way to
    another image's."""
    rest: float = 0.5
    """Share of the other patches that do."""

    def __post_init__(self) -> None:
        for name in ("text_ratio", "attended", "rest"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise RecipeError(f"vldeformer.negatives.{name} is {value}; it is a share, from 0 to 1")
        if self.image and not self.attended and not self.rest:
            raise RecipeError(
                "vldeformer.negatives.attended and rest are both 0, so no patch is exchanged; set image to false"
            )


@dataclass
class VLDeformerConfig:
    """VLDeformer: a fusion model's joint layers run on each modality alone, and tuned by contrast to give embeddings."""

    pooling: Literal["mean", "cls"] = "mean"
    """What of the last layer's tokens represents a caption or an image: their mean, or [CLS] and the image's class token."""
    loss: Literal["contrastive", "cosine"] = "contrastive"
    """`contrastive` is the paper's; `cosine` (its ablation) draws each pair's cosine to 1 and every other pair's down to 0."""
    temperature: float = 0.005
    """Fixed."""
    start: Literal["checkpoint", "unpretrained", "fresh_joint"] = "checkpoint"
    """`fresh_joint` (a control) makes the joint layers' weights anew and keeps the encoders'; `unpretrained` (an ablation) takes the checkpoint's sizes and tokenizer alone, and the weights that its pretraining began
    from: timm's and BERT's where its recipe names them, else random ones."""
    negatives: HardNegativesConfig = field(default_factory=HardNegativesConfig)

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise RecipeError(f"vldeformer.temperature is {self.temperature}; it is above 0")


@dataclass
class ExchangedWordsConfig:
    """Matching of each caption against itself with words exchanged (finetune/hard_negatives/exchanged_words.py), beside `matching`."""

    weight: float = 0.0
    words: list[str] = field(default_factory=list)
    """Pairs of words, such as `left right`, each word one token of the checkpoint's vocabulary."""

    def __post_init__(self) -> None:
        if wrong := [pair for pair in self.words if len(set(pair.split())) != 2]:
            raise RecipeError(
                f"exchanged.words holds {wrong[0]!r}; a pair is two different words, such as 'left right'"
            )
        if self.weight and not self.words:
            raise RecipeError("exchanged.weight is set but exchanged.words is empty; name pairs such as 'left right'")
