"""Recipes of fine-tuning and of evaluation: dataclasses that import nothing heavy. `configs/finetune/` holds recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_tools.config import ReadConfig
from finetune.heads.config import ExchangedWordsConfig, HatConfig, VLDeformerConfig
from pretrain.config import MatchingConfig
from runtime.errors import RecipeError
from runtime.recipe import check_name, free
from training.config import LoopConfig, OptimizerConfig


@dataclass
class FinetuneRecipe:
    """Fine-tune for retrieval: dual head by contrast within the batch, fusion head by matching; HAT by triplets; VLDeformer."""

    name: str = "finetune"
    """Names the run folder: the same name is the same run, and goes on where it stopped."""
    runs: str = free("runs")
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
