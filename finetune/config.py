"""Recipes of fine-tuning and of evaluation: dataclasses that import nothing heavy. `configs/finetune/` holds recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_tools.config import ReadConfig
from pretrain.config import LoopConfig, MatchingConfig, OptimizerConfig
from runtime.errors import RecipeError


@dataclass
class FinetuneRecipe:
    """Fine-tune a checkpoint for retrieval: the dual head by contrast within the batch, the fusion head by matching."""

    name: str = "finetune"
    """Names the run folder: the same name is the same run, and goes on where it stopped."""
    runs: str = "runs"
    """Folder of run folders."""
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
    data: ReadConfig = field(default_factory=ReadConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, min_lr=1e-6, warmup_steps=0))
    training: LoopConfig = field(default_factory=lambda: LoopConfig(global_batch=256, epochs=10))

    def __post_init__(self) -> None:
        for key in ("checkpoint", "dataset"):
            if not getattr(self, key):
                raise RecipeError(f"{key} is not set; give --{key}")
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise RecipeError(
                f"name is {self.name!r}; it becomes a folder's name, so it has no slash and no leading dot"
            )
        if not self.contrastive_weight:
            raise RecipeError("contrastive_weight is 0; the dual head learns by it, give it a weight")


@dataclass
class EvaluateRecipe:
    """Score a checkpoint on a shard folder: every image against every caption."""

    checkpoint: str = ""
    """A run's folder (its best checkpoint, else its latest) or a checkpoint's."""
    data: str = ""
    """Shard folder to score on."""
    dataset: str = ""
    """Name of the data, for the record."""
    split: str = ""
    """Name of the split, for the record."""
    heads: list[Literal["dual", "fusion"]] = field(default_factory=lambda: ["dual"])
    """`dual` scores by the features' cosine; `fusion` re-ranks the dual head's shortlist by matching."""
    shortlist: int = 128
    """Candidates that the fusion head re-ranks, per query."""
    captions_per_image: int | None = None
    """Take the first so many captions of each image; none: all."""
    out: str = "scores.json"
    """Record of the first head; further heads' go beside it, as `scores-<head>.json`."""
    batch_size: int = 64
    workers: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for key in ("checkpoint", "data", "dataset", "split"):
            if not getattr(self, key):
                raise RecipeError(f"{key} is not set; give --{key}")
        if not self.heads or len(set(self.heads)) != len(self.heads):
            raise RecipeError(f"heads is {self.heads}; name each head once: dual, fusion")
        for key in ("shortlist", "batch_size"):
            if getattr(self, key) < 1:
                raise RecipeError(f"{key} is {getattr(self, key)}; it must be 1 or more")
