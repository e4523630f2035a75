"""Folders of small random text encoders and their tokenizers, as `transformers` and sentence-transformers save them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = "a red green blue small large square circle triangle star left right of above below near and two three".split()  # noqa: SIM905
CAPTIONS = ["a red circle", "two small green stars near a large blue square", "star", "a green triangle above a star"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
POSITIONS = 16


@dataclass
class Family:
    """One kind of published text encoder."""

    model_type: str
    special: tuple[str, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    """Its first tokens, in the order of their ids."""
    last: tuple[str, ...] = ()
    """Its tokens after the words."""
    names: tuple[str | None, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    """Padding, unknown, first, last and mask token."""
    pooling: str | None = None
    """What its folder of sentence-transformers says."""
    settings: dict[str, Any] = field(default_factory=dict)
    positions: int = POSITIONS
    """Position embeddings in its config.json."""


ROBERTA: dict[str, Any] = {
    "special": ("<s>", "<pad>", "</s>", "<unk>"),
    "last": ("<mask>",),
    "names": ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
    "positions": POSITIONS + 2,
}
CLIP = {
    "special": (),
    "last": ("<|startoftext|>", "<|endoftext|>"),
    "names": ("<|endoftext|>", "<|endoftext|>", "<|startoftext|>", "<|endoftext|>", None),
}
SIGLIP = {"special": ("<pad>", "</s>", "<unk>"), "names": ("</s>", "<unk>", None, "</s>", None)}
VOCABULARY = 40
FAMILIES = {
    "BERT": Family("bert"),
    "MiniLM (BERT, mean)": Family("bert", pooling="pooling_mode_mean_tokens"),
    "BGE (BERT, class)": Family("bert", pooling="pooling_mode_cls_token"),
    "GTE (BERT, mean)": Family("bert", pooling="pooling_mode_mean_tokens"),
    "GTE 1.5 (rotary, class)": Family("gte", settings={"pad_token_id": 0}, pooling="pooling_mode_cls_token"),
    "RoBERTa": Family("roberta", **ROBERTA),
    "XLM-R": Family("xlm-roberta", **ROBERTA),
    "multilingual E5 (XLM-R, mean)": Family("xlm-roberta", **ROBERTA, pooling="pooling_mode_mean_tokens"),
    "DistilBERT": Family("distilbert"),
    "MPNet": Family("mpnet", **ROBERTA, pooling="pooling_mode_mean_tokens"),
    "ModernBERT": Family(
        "modernbert", special=("[UNK]",), last=("[CLS]", "[SEP]", "[PAD]", "[MASK]"), pooling="pooling_mode_cls_token",
        settings={"pad_token_id": 22, "cls_token_id": 20, "sep_token_id": 21, "bos_token_id": 20, "eos_token_id": 21},
    ),
    "CLIP": Family("clip", **CLIP, settings={"eos_token_id": 20, "bos_token_id": 19}),
    "CLIP, its first configuration": Family("clip", **CLIP, settings={"eos_token_id": 2, "bos_token_id": 0}),
    "SigLIP": Family("siglip", **SIGLIP, settings={"projection_size": 24}),
    "SigLIP 2, NaFlex": Family("siglip2", **SIGLIP, settings={"projection_size": 24}),
}  # fmt: skip


def write_tokenizer(family: Family, folder: Path) -> None:
    """Write a word-level tokenizer with the family's special tokens as `transformers` does."""
    tokens = [*family.special, *WORDS, *family.last]
    pad, unknown, cls, sep, mask = family.names
    ids = {token: number for number, token in enumerate(tokens)}
    pipeline = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    pipeline.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("stars", "star")])
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    around = f"{cls} $A {sep}" if cls else f"$A {sep}"
    pipeline.post_processor = processors.TemplateProcessing(
        around, special_tokens=[(token, ids[token]) for token in dict.fromkeys((cls, sep)) if token]
    )
    named = {"pad_token": pad, "unk_token": unknown, "cls_token": cls, "sep_token": sep, "mask_token": mask}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=pipeline, **{name: token for name, token in named.items() if token}
    ).save_pretrained(str(folder))


def write_family(name: str, folder: Path, **changes: Any) -> Path:
    """Write a random model of a family, its tokenizer, and its pooling where it is a sentence encoder's."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    settings = (
        SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": family.positions} | family.settings | changes
    )
    if family.model_type == "distilbert":
        renamed = {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
        }
        settings = {renamed.get(key, key): value for key, value in settings.items()}
    if family.model_type in ("clip", "siglip", "siglip2"):
        vision = SIZES | {"image_size": 32, "patch_size": 16, "num_patches": 4}
        config = transformers.AutoConfig.for_model(family.model_type, text_config=settings, vision_config=vision)
        model = transformers.AutoModel.from_config(config)
    else:
        config = transformers.AutoConfig.for_model(family.model_type, **settings)
        model = transformers.AutoModelForMaskedLM.from_config(config)
    for parameter in model.parameters():  # far from the start, where all words are nearly alike
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(str(folder))
    write_tokenizer(family, folder)
    if family.pooling:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps({"word_embedding_dimension": 32, family.pooling: True, "pooling_mode_max_tokens": False})
        )
    return folder
