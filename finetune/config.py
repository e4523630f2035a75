"""Recipes of fine-tuning and of evaluation: dataclasses that import nothing heavy. `configs/finetune/` holds recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from data_tools.config import ReadConfig
from pretrain.config import MatchingConfig, TextEncoderConfig
from runtime.errors import RecipeError
from runtime.recipe import check_name
from training.config import LoopConfig, OptimizerConfig


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


@dataclass
class FinetuneRecipe:
    """Fine-tune for retrieval: dual head by contrast within the batch, fusion head by matching; HAT by triplets; VLDeformer."""

    name: str = "finetune"
    """Names the run folder: the same name is the same run, and goes on where it stopped."""
    runs: str = "runs"
    """Folder of run folders."""
    head: Literal["dual", "hat", "vldeformer"] = "dual"
    """`dual` trains the pretraining's projections and, with `matching_weight`, the fusion encoder; `hat` is HAT; `vldeformer`
    takes the fusion encoder apart."""
    checkpoint: str = ""
    """What to start from: a run's folder (its best checkpoint, else its latest) or a checkpoint's."""
    dataset: str = ""
    """Name of the data, for score records: `fine-tuned-on <dataset>`."""
    image_size: int | None = None
    """Pixels a side, where it differs from pretraining's; position embeddings are interpolated."""
    contrastive_weight: float = 1.0
    matching_weight: float = 1.0
    """0 trains the dual head alone; the fusion head then no longer fits the encoders, and re-ranking by it means little."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    exchanged: ExchangedWordsConfig = field(default_factory=ExchangedWordsConfig)
    """Read where `head` is `dual`; needs `matching_weight`."""
    hat: HatConfig = field(default_factory=HatConfig)
    """Read where `head` is `hat`."""
    vldeformer: VLDeformerConfig = field(default_factory=VLDeformerConfig)
    """Read where `head` is `vldeformer`."""
    data: ReadConfig = field(default_factory=ReadConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, min_lr=1e-6, warmup_steps=0))
    training: LoopConfig = field(default_factory=lambda: LoopConfig(global_batch=256, epochs=10))

    def __post_init__(self) -> None:
        without_checkpoint = self.head == "hat" and self.hat.encoders == "backbones"
        if without_checkpoint and self.checkpoint:
            raise RecipeError("checkpoint is set, but hat.encoders is `backbones`, which reads none; set one of them")
        for key in ("dataset",) if without_checkpoint else ("checkpoint", "dataset"):
            if not getattr(self, key):
                raise RecipeError(f"{key} is not set; give --{key}")
        if without_checkpoint and self.image_size:
            raise RecipeError("image_size is for a checkpoint's encoders; backbones have hat.image.image_size")
        if without_checkpoint and self.training.checkpoint_activations:
            raise RecipeError(
                "training.checkpoint_activations is for a checkpoint's encoders, and hat.encoders is `backbones`; set it to false"
            )
        check_name("name", self.name)
        if self.optimizer.schedule != "step":
            raise RecipeError(
                f"optimizer.schedule is {self.optimizer.schedule}, which pretraining knows; fine-tuning goes by `step`"
            )
        if self.matching.weight != 1:
            raise RecipeError("matching.weight is of pretraining; fine-tuning has matching_weight")
        if self.matching.negatives != "nearby" or self.matching.same_codeword:
            raise RecipeError(
                "matching.negatives and matching.same_codeword are of pretraining: fine-tuning draws negatives nearby, and has no codebook"
            )
        if self.exchanged.weight and (self.head != "dual" or not self.matching_weight):
            raise RecipeError(
                "exchanged.weight trains the fusion head by matching: set head to dual and matching_weight above 0"
            )
        if self.head == "dual" and not self.contrastive_weight:
            raise RecipeError("contrastive_weight is 0; the dual head learns by it, give it a weight")


@dataclass
class EvaluateRecipe:
    """Score a checkpoint, or scores of your own, on a shard folder or a caption file."""

    checkpoint: str = ""
    """A run's folder (its best checkpoint, else its latest) or a checkpoint's."""
    scores: str = ""
    """In place of a checkpoint, a file of any model's: a matrix (images, captions) as .npy; or .npz or .safetensors with
    `scores` (and `text_to_image`, where it is no transpose), or with the embeddings `image` and `text`."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """How embeddings of a file are compared."""
    data: str = ""
    """Shard folder, or caption file (COCO, Karpathy, …), in whose order images and captions are scored. A file of scores that
    holds `caption_image`, the image number of each caption, needs none."""
    images: str = ""
    """Folder or uncompressed tar of a caption file's images; empty: its own folder."""
    dataset: str = ""
    """Name of the data, for the record."""
    split: str = ""
    """Name of the split, for the record; and the split to take of a Karpathy file."""
    protocol: Literal["full", "coco_5k", "coco_1k", "flickr30k_1k", "flickr8k_1k"] = "full"
    """`coco_1k` is the mean of five consecutive folds of 1,000 images."""
    captions_per_image: int | None = None
    """Take the first so many captions of each image; none: all. The record says which (COCO's test file holds 25,010
    captions of 5,000 images; papers score the first five of each)."""
    heads: list[Literal["dual", "fusion", "hat", "vldeformer"]] | None = None
    """`dual` scores by the features' cosine; `fusion` re-ranks the dual head's shortlist by matching; `hat` is a HAT
    checkpoint's only head, on all pairs or, with `shortlist_from`, as a re-ranker. `vldeformer` is a VLDeformer checkpoint's
    only head; of an alignment model it scores by the fusion encoder taken apart and not tuned (the paper's "w/o decompose").
    None: the checkpoint's first."""
    shortlist: int = 128
    """Candidates that a re-ranker is given, per query (ALBEF: 256 on COCO, 128 on Flickr30K)."""
    shortlist_from: str = ""
    """The checkpoint, with a dual head or VLDeformer's, that makes the shortlists. Empty: HAT scores all pairs, fusion re-ranks its
    own dual head's shortlists."""
    ensemble: str = ""
    """For HAT: a second HAT checkpoint; the two matrices of scores are averaged."""
    extended: bool = False
    """Also score by COCO's extended positives (CxC, ECCV Caption), with the package eccv_caption."""
    training: str = "unknown"
    """What a file of scores came from: untrained, pretrained, or `fine-tuned-on X`. A checkpoint knows it."""
    out: str = "scores.json"
    """Record of the first head; further heads' go beside it, as `scores-<head>.json`. Each has its queries' ranks beside it."""
    save_scores: bool = False
    """Also write the matrices that were ranked, as `<record>.scores.npz`."""
    batch_size: int = 64
    workers: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "tf32"] = "fp32"
    """`tf32`: a GPU's tensor cores multiply with 10 bits of mantissa, several times faster; scores differ in about the third digit."""

    def __post_init__(self) -> None:
        if bool(self.checkpoint) == bool(self.scores):
            raise RecipeError("give either --checkpoint or --scores, what is to be scored")
        for key in ("dataset", "split") if self.scores else ("data", "dataset", "split"):
            if not getattr(self, key):
                raise RecipeError(f"{key} is not set; give --{key}")
        if self.scores and (self.heads or self.shortlist_from or self.ensemble):
            raise RecipeError(
                "heads, shortlist_from and ensemble are a checkpoint's; scores of a file are ranked as they are"
            )
        if self.extended and self.protocol == "coco_1k" and (self.shortlist_from or "fusion" in (self.heads or [])):
            raise RecipeError(
                "extended positives are on the whole split, but a re-ranker's lists are made within coco_1k's folds; use --protocol coco_5k"
            )
        if self.scores and self.precision != "fp32":
            raise RecipeError("precision is of a checkpoint's encoders; scores of a file are ranked as they are")
        if self.scores and not self.data and self.captions_per_image is not None:
            raise RecipeError("captions_per_image is about data; give --data, or leave it to the file's caption_image")
        if self.heads is not None and (not self.heads or len(set(self.heads)) != len(self.heads)):
            raise RecipeError(f"heads is {self.heads}; name each head once: dual, fusion, vldeformer, or hat alone")
        if self.heads and "hat" in self.heads and len(self.heads) > 1:
            raise RecipeError(f"heads is {self.heads}; a HAT checkpoint has one head, use --heads '[hat]'")
        for key in ("shortlist", "batch_size", "captions_per_image"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise RecipeError(f"{key} is {value}; it must be 1 or more")
