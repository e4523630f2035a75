"""Format `hf`: a Hugging Face folder with the model's code, for `AutoModel` and `AutoProcessor` with `trust_remote_code`.

What is written is loaded again by that code before the export counts as done, and must give the same features.

Tested in tests/finetune/export/test_hugging_face.py.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from finetune.export import modeling_ligature, processing_ligature
from finetune.export.probe import compare, probe
from finetune.export.source import Source, require_copied_towers
from pretrain.model.alignment_model import AlignmentModel
from runtime.files import write_json

CODE = (modeling_ligature, processing_ligature)
"""The modules that are copied into the folder."""
TRAINING_ONLY = {
    "codebook": "codebook",
    "feature_centres": "the codebook's centres",
    "masked_language_head": "word head",
    "level_projections": "projections of levels",
}
"""Parts of a model that serve training alone."""


def write(source: Source, folder: Path) -> list[str]:
    """Fill `folder`; return what the format leaves out.

    Raises:
        CheckpointError: the code has no such tower, or transformers makes other features of what was written.
    """
    require_copied_towers(source, "hf")
    write_model(source, folder)
    write_preprocessing(source, folder)
    _check(source, folder)
    return left_behind(source)


def write_model(source: Source, folder: Path) -> None:
    """Write config, weights and code."""
    write_json(folder / "config.json", config_of(source))
    weights = {name: tensor.contiguous().clone() for name, tensor in weights_of(source).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for module in CODE:
        assert module.__file__
        shutil.copy(module.__file__, folder / Path(module.__file__).name)


def config_of(source: Source) -> dict[str, Any]:
    """Return the content of config.json."""
    config, encoder = source.config, source.network.image_encoder
    pooling = "class" if config.text.pooling == "own" else config.text.pooling  # of a BERT
    config_json = {
        "model_type": "ligature",
        "architectures": ["LigatureModel"],
        "auto_map": {
            "AutoConfig": "modeling_ligature.LigatureConfig",
            "AutoModel": "modeling_ligature.LigatureModel",
            "AutoProcessor": "processing_ligature.LigatureProcessor",
        },
        "dtype": "float32",
        "head": source.head,
        "image": dataclasses.asdict(config.image)
        | {"token_width": encoder.width, "pooled_width": encoder.pooled_width, "weights": "none"},
        "text": dataclasses.asdict(config.text)
        | {"vocabulary": source.tokenizer.vocabulary, "weights": "none", "pooling": pooling},
        "fusion": dataclasses.asdict(config.fusion),
        "projection_dim": config.feature_dim if source.head == "dual" else config.text.width,
    }
    if source.head == "vldeformer":
        config_json["pooling"] = source.description["vldeformer"]["pooling"]
    return config_json


def left_behind(source: Source) -> list[str]:
    """Return a line that names the parts which are not exported, or none."""
    parts = {name.split(".")[0] for name in source.network.state_dict()}
    names = [text for part, text in TRAINING_ONLY.items() if part in parts]
    return [f"left behind, since it serves training alone: {', '.join(names)}"] if names else []


def weights_of(source: Source) -> dict[str, Tensor]:
    """Return the weights under their names in `modeling_ligature.py`, which are our own."""
    unused = {*TRAINING_ONLY, "temperature"} | (set() if source.has_matching else {"fusion_encoder", "matching_head"})
    weights = {name: tensor for name, tensor in source.network.state_dict().items() if name.split(".")[0] not in unused}
    if isinstance(source.network, AlignmentModel):
        weights["logit_scale"] = -source.network.temperature().detach().log()[0]
    return weights


def write_tokenizer(source: Source, folder: Path) -> None:
    """Write the tokenizer as `AutoTokenizer` reads it."""
    source.tokenizer.save(folder)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": source.tokenizer.caption_tokens}
    write_json(folder / "tokenizer_config.json", kind | names)


def write_preprocessing(source: Source, folder: Path) -> None:
    """Write the tokenizer, and the settings of image processor and processor."""
    write_tokenizer(source, folder)
    encoder = source.network.image_encoder
    automatic = {"AutoProcessor": "processing_ligature.LigatureProcessor"}
    write_json(
        folder / "preprocessor_config.json",
        {
            "auto_map": {"AutoImageProcessor": "processing_ligature.LigatureImageProcessor", **automatic},
            "image_processor_type": "LigatureImageProcessor",
            "processor_class": "LigatureProcessor",
            "image_size": source.config.image.image_size,
            "crop": encoder.crop,
            "resample": encoder.resample,
            "image_mean": pixel_statistics(encoder.mean),
            "image_std": pixel_statistics(encoder.std),
        },
    )
    write_json(folder / "processor_config.json", {"auto_map": automatic, "processor_class": "LigatureProcessor"})


def pixel_statistics(values: Tensor) -> list[float]:
    """Return a mean or deviation of 0..255 as three numbers of 0..1."""
    return [round(value, 8) for value in (values.flatten().double() / 255).tolist()]


@torch.no_grad()
def _check(source: Source, folder: Path) -> None:
    logging.disable_progress_bar()
    model = modeling_ligature.LigatureModel.from_pretrained(folder).eval()
    logging.enable_progress_bar()
    pixels, ids, mask = probe(source)
    encoder = source.network.image_encoder
    normalised = (pixels.float() - encoder.mean) / encoder.std
    if source.has_features:
        compare(source.image_features(pixels), model.get_image_features(normalised), "transformers", "image features")
        compare(source.text_features(ids, mask), model.get_text_features(ids, mask), "transformers", "text features")
    if source.has_matching:
        compare(
            source.matching_logits(pixels, ids, mask),
            model.get_matching_logits(normalised, ids, mask),
            "transformers",
            "matching logits",
        )
