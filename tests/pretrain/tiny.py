"""A pretraining small enough to run in a test: recipe, tokenizer, model, batches. Everything is a function of seeds."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from data_tools.tokenizer import SPECIAL, CaptionTokenizer
from pretrain.config import PretrainRecipe
from pretrain.feature_queue import FeatureQueue
from pretrain.model.alignment_model import AlignmentModel, TextBatch
from pretrain.objectives.state import Keys, MicroBatch, StudentState
from pretrain.task import PretrainTask
from runtime.ranks import Ranks
from runtime.recipe import build_config

WORDS = "a red green blue small large square circle triangle star left right of above below near and two three".split()  # noqa: SIM905 (twenty quoted words read worse)
CAPTION_WORDS = 10
IMAGE = 32


def tokenizer() -> CaptionTokenizer:
    """A WordPiece tokenizer with a vocabulary written down here: 5 special tokens and 19 words."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    pipeline = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    pipeline.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return CaptionTokenizer(pipeline, CAPTION_WORDS)


def recipe(**changes: Any) -> PretrainRecipe:
    """The tiny recipe; `changes` are sections or keys by dotted name with `__` for the dot: `training__zero_stage=2`."""
    values: dict[str, Any] = {
        "name": "tiny",
        "data": {"train": "none", "caption_tokens": CAPTION_WORDS},
        "model": {
            "image": {
                "architecture": "vit_tiny_patch16_224",
                "image_size": IMAGE,
                "patch": 16,
                "width": 32,
                "depth": 2,
                "heads": 2,
            },
            "text": {"width": 32, "layers": 1, "heads": 2, "feed_forward": 64, "dropout": 0.0, "positions": 16},
            "fusion": {"layers": 1},
            "feature_dim": 16,
            "codewords": 16,
        },
        "objectives": {"matching": {"pool": 4}, "masked_language": {"share": 0.3}},
        "teacher": {"queue": 24, "ema_momentum": 0.9},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "training": {"global_batch": 16, "micro_batch": 8, "precision": "fp32", "device": "cpu", "zero_stage": 1},
    }
    for name, value in changes.items():
        *sections, key = name.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return build_config(PretrainRecipe, values)


def model(settings: PretrainRecipe | None = None, seed: int = 0) -> AlignmentModel:
    """A model with random weights that are a function of the seed, biases among them, so that features differ."""
    torch.manual_seed(seed)
    made = AlignmentModel((settings or recipe()).model, tokenizer().vocabulary)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return made


def captions(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random ids (count, CAPTION_WORDS) between [CLS] and [SEP], padded, with their mask."""
    ids = torch.randint(len(SPECIAL), len(SPECIAL) + len(WORDS), (count, CAPTION_WORDS), generator=generator)
    lengths = torch.randint(4, CAPTION_WORDS + 1, (count, 1), generator=generator)
    places = torch.arange(CAPTION_WORDS)
    ids[:, 0] = SPECIAL.index("[CLS]")
    ids = torch.where(places == lengths - 1, SPECIAL.index("[SEP]"), ids)
    return torch.where(places < lengths, ids, 0), places < lengths


def batch(size: int, step: int = 0, rows: slice = slice(None)) -> dict[str, Tensor]:
    """Rows of the global batch of a step, as ShardStream yields them. Images come in few ids, so that some are the same."""
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randint(0, 256, (2, size, 3, IMAGE, IMAGE), generator=generator, dtype=torch.uint8)
    ids, mask = captions(size, generator)
    # No two neighbours (a pool of 4) share an image, and every image comes twice in a batch of 16.
    image_ids = (torch.arange(size) * 3 + step) % 8
    positions = torch.arange(size) + step * size
    return {
        "images": images[:, rows],
        "ids": ids[rows],
        "mask": mask[rows],
        "image_ids": image_ids[rows],
        "positions": positions[rows],
    }


def task(settings: PretrainRecipe, ranks: Ranks | None = None, seed: int = 0) -> PretrainTask:
    return PretrainTask(settings, model(settings, seed), tokenizer(), ranks or Ranks(), torch.device("cpu"))


def state(network: AlignmentModel, inputs: MicroBatch) -> StudentState:
    """What the student makes of a micro-batch."""
    tokens = network.image_encoder(inputs.images)
    return StudentState(network, inputs, tokens, network.text_encoder(inputs.text.ids, inputs.text.mask))


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random unit-norm rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


__all__ = [
    "FeatureQueue",
    "Keys",
    "TextBatch",
    "batch",
    "captions",
    "model",
    "recipe",
    "state",
    "task",
    "tokenizer",
    "unit",
]
