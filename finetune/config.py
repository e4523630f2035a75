"""Recipes of fine-tuning and evaluation: dataclasses that import no torch. `configs/finetune/` holds recipes.

Tested in tests/finetune/test_train.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_tools.config import ReadConfig
from finetune.heads.config import ExchangedWordsConfig, HatConfig, VLDeformerConfig
from finetune.heads.registry import ScoredHead, TrainedHead
from pretrain.config import MatchingConfig
from runtime.checks import check_given, check_name, check_range
from runtime.errors import RecipeError
from runtime.recipe import free
from training.config import LoopConfig, OptimizerConfig


@dataclass
class FinetuneLoopConfig(LoopConfig):
    """The loop of fine-tuning."""

    micro_batch: int | None = free(None)
    """Most samples that a device takes at once. The gradient is that of the whole batch, and the encoders run once more for it.
    Default: a rank's whole share of the batch. Read where `head` is `dual`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "training.", 1, None, "micro_batch")


@dataclass
class FrozenConfig:
    """Which encoders keep the checkpoint's weights for the whole fine-tuning, whatever pretraining did."""

    image: bool | None = None
    """Keep the image encoder; a learned query still trains. null: as the checkpoint's `model.image.frozen` says, where `head` is
    dual; with the other heads the encoder learns."""
    text: bool | None = None
    """Keep the text encoder. null: as `image`."""


@dataclass
class FinetuneRecipe:
    """Fine-tune a head: dual by contrast within the batch and fusion by matching, HAT by triplets, or VLDeformer."""

    name: str = "finetune"
    """Name of the run's folder. A run of the same name resumes where it stopped."""
    runs: str = free("runs")
    """Folder that holds the run folders."""
    head: TrainedHead = "dual"
    """Which head to train. `dual` trains the pretrained projections and, with `matching_weight`, the fusion encoder. `hat` is
    HAT. `vldeformer` takes the fusion encoder apart."""
    checkpoint: str = ""
    """Where to start from: a run's folder (its best checkpoint, else its latest) or a checkpoint's."""
    dataset: str = ""
    """Name of the dataset. Score records call the model `fine-tuned-on <dataset>`."""
    image_size: int | None = None
    """Pixels a side. null: the pretraining's. Position embeddings are interpolated to another size."""
    contrastive_weight: float = 1.0
    """Weight of the contrastive loss. Read where `head` is `dual`."""
    matching_weight: float = 1.0
    """Weight of the matching loss. 0 trains the dual head alone. The fusion head then no longer fits the encoders, and
    re-ranking by it means little."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    """How matching draws its negatives. Read where `head` is `dual`."""
    exchanged: ExchangedWordsConfig = field(default_factory=ExchangedWordsConfig)
    """Matching against captions with words exchanged. Read where `head` is `dual`; it needs `matching_weight`."""
    hat: HatConfig = field(default_factory=HatConfig)
    """HAT. Read where `head` is `hat`."""
    vldeformer: VLDeformerConfig = field(default_factory=VLDeformerConfig)
    """VLDeformer. Read where `head` is `vldeformer`."""
    data: ReadConfig = field(default_factory=ReadConfig)
    """Training data, validation data and how they are read."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, min_lr=1e-6, warmup_steps=0))
    """AdamW and its learning rate."""
    training: FinetuneLoopConfig = field(default_factory=lambda: FinetuneLoopConfig(global_batch=256, epochs=10))
    """Batch size, length, checkpoints and device of the run."""
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    """Which encoders keep the checkpoint's weights."""

    def __post_init__(self) -> None:
        self.hat.text.settle_pooling()
        for side, kept in vars(self.frozen).items():
            if kept and (epoch := self.optimizer.freeze_until.of(side)):
                raise RecipeError(
                    f"optimizer.freeze_until.{side} is {epoch:g}, but frozen.{side} is true for the whole run; set one of them"
                )
        without_checkpoint = self.head == "hat" and self.hat.encoders == "backbones"
        if without_checkpoint and self.checkpoint:
            raise RecipeError(
                "checkpoint is set, but hat.encoders is `backbones`, which reads none; leave one of them out"
            )
        needed = ["dataset"] if without_checkpoint else ["checkpoint", "dataset"]
        if not all(getattr(self, key) for key in needed):
            # A recipe may lack its training data until it is run. Named here so that one answer has all that is missing.
            check_given(self, *needed, "data.train")
        check_range(self, "", 0, None, "contrastive_weight", "matching_weight")
        check_range(self, "", 1, None, "image_size")
        if without_checkpoint and self.image_size:
            raise RecipeError("image_size is for a checkpoint's encoders; set hat.image.image_size for backbones")
        if without_checkpoint and self.training.checkpoint_activations:
            raise RecipeError(
                "training.checkpoint_activations is for a checkpoint's encoders, and hat.encoders is `backbones`; set it to false"
            )
        check_name("name", self.name)
        if self.optimizer.schedule != "step":
            raise RecipeError(
                f"optimizer.schedule is {self.optimizer.schedule}, which is for pretraining; set it to `step` for fine-tuning"
            )
        if self.matching.weight != 1:
            raise RecipeError("matching.weight is for pretraining; set matching_weight for fine-tuning")
        if self.matching.negatives != "nearby" or self.matching.same_codeword:
            raise RecipeError(
                "matching.negatives and matching.same_codeword are for pretraining; fine-tuning draws negatives `nearby` and has no codebook, "
                "so leave them out"
            )
        if self.exchanged.weight and (self.head != "dual" or not self.matching_weight):
            raise RecipeError(
                "exchanged.weight trains the fusion head by matching: set head to dual and matching_weight above 0"
            )
        if self.data.features.kind != "live" and self.head != "dual":
            raise RecipeError(
                f"data.features.kind is {self.data.features.kind}, but the {self.head} head reads pixels; set it to live"
            )
        if self.data.features.kind == "pooled" and self.matching_weight:
            raise RecipeError(
                "data.features.kind is pooled, but matching reads image tokens; set it to tokens, or matching_weight to 0"
            )
        if self.training.micro_batch and self.head != "dual":
            raise RecipeError(
                f"training.micro_batch is for the dual head; {self.head} compares the whole batch in one pass, so lower training.global_batch, "
                "or set training.checkpoint_activations"
            )
        if self.head == "dual" and not self.contrastive_weight:
            raise RecipeError("contrastive_weight is 0, but the dual head learns by it; set it above 0")


@dataclass
class EvaluateRecipe:
    """Score a checkpoint, or your own scores, on a shard folder or a caption file."""

    checkpoint: str = ""
    """A run's folder (its best checkpoint, else its latest) or a checkpoint's."""
    scores: str = ""
    """In place of a checkpoint, a file from any model: a matrix (images, captions) as .npy; or .npz or .safetensors with
    `scores` (and `text_to_image`, if it is not the transpose), or with the embeddings `image` and `text`."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """How the embeddings of a file are compared."""
    data: str = ""
    """Shard folder or caption file (COCO, Karpathy, …). Its order is the order of images and captions in the scores. A file
    of scores needs none if it holds `caption_image`, the image number of each caption."""
    images: str = ""
    """Folder or uncompressed tar with a caption file's images. Empty: the file's own folder."""
    dataset: str = ""
    """Name of the dataset, for the record."""
    split: str = ""
    """Name of the split, for the record. Of a Karpathy file, this split is scored."""
    protocol: Literal["full", "coco_5k", "coco_1k", "flickr30k_1k", "flickr8k_1k"] = "full"
    """Which images meet which captions. `full` takes all; `coco_1k` is the mean of five consecutive folds of 1,000 images."""
    captions_per_image: int | None = None
    """Number of captions of each image that are scored, the first ones. null: all. The record says which. (COCO's test file
    holds 25,010 captions of 5,000 images; papers score the first five of each.)"""
    heads: list[ScoredHead] | None = None
    """Which heads to score by. null: the checkpoint's first. `dual` compares features by cosine. `fusion` re-ranks the dual
    head's shortlist by matching. `hat`, the only head of a HAT checkpoint, scores all pairs or, with `shortlist_from`,
    re-ranks. `vldeformer` is the only head of a VLDeformer checkpoint; for an alignment model it is the fusion encoder taken
    apart and not tuned (the paper's "w/o decompose")."""
    shortlist: int = 128
    """Candidates a query that a re-ranker orders (ALBEF: 256 on COCO, 128 on Flickr30K)."""
    shortlist_from: str = ""
    """The checkpoint that makes the shortlists, with a dual or a VLDeformer head. Empty: HAT scores all pairs, and fusion
    re-ranks the shortlists of its own dual head."""
    ensemble: str = ""
    """A second HAT checkpoint; the scores of the two are averaged. Empty: none."""
    extended: bool = False
    """Whether to score also by COCO's extended positives (CxC, ECCV Caption). Needs the package eccv_caption."""
    training: str = "unknown"
    """How the model behind a file of scores was trained: untrained, pretrained, or `fine-tuned-on X`. A checkpoint knows it."""
    out: str = "scores.json"
    """File for the record of the first head. Records of further heads go beside it, as `scores-<head>.json`. The ranks of all
    queries are written beside each record."""
    save_scores: bool = False
    """Whether to write the score matrices too, as `<record>.scores.npz`."""
    batch_size: int = 64
    """Images, or captions, that are encoded at once."""
    workers: int = 2
    """Processes that decode images; 0 decodes in the main process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. `auto` takes a GPU if there is one."""
    precision: Literal["fp32", "tf32"] = "fp32"
    """Precision of float32 products on a GPU. `tf32` keeps 10 bits of mantissa and is several times faster; scores differ in
    about the third digit."""

    def __post_init__(self) -> None:
        if self.checkpoint and self.scores:
            raise RecipeError("give either --checkpoint or --scores, and not both")
        needed = ("dataset", "split") if self.scores else ("checkpoint", "data", "dataset", "split")
        check_given(self, *needed, instead="--scores")
        if self.scores and (self.heads or self.shortlist_from or self.ensemble):
            raise RecipeError("heads, shortlist_from and ensemble are a checkpoint's; leave them out with --scores")
        if self.extended and self.protocol == "coco_1k" and (self.shortlist_from or "fusion" in (self.heads or [])):
            raise RecipeError(
                "extended positives need the whole split, but a re-ranker's lists are made within the folds of coco_1k; use --protocol coco_5k"
            )
        if self.scores and self.precision != "fp32":
            raise RecipeError("precision is for a checkpoint's encoders; leave it out with --scores")
        if self.scores and not self.data and self.captions_per_image is not None:
            raise RecipeError(
                "captions_per_image needs data; give --data, or leave it out and use the file's caption_image"
            )
        if self.heads is not None and (not self.heads or len(set(self.heads)) != len(self.heads)):
            raise RecipeError(f"heads is {self.heads}; name each head once: dual, fusion, vldeformer, or hat alone")
        if self.heads and "hat" in self.heads and len(self.heads) > 1:
            raise RecipeError(f"heads is {self.heads}; a HAT checkpoint has one head, use --heads '[hat]'")
        check_range(self, "", 1, None, "shortlist", "batch_size", "captions_per_image")
        check_range(self, "", 0, None, "workers")
