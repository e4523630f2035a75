"""Starting weights of a new run: timm's for the image encoder, a BERT's for text and fusion encoder. Never silently random."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import ImageEncoderConfig, TextEncoderConfig
from pretrain.model.text_encoder import TextEncoder
from pretrain.model.timm_tower import TimmTower
from pretrain.model.transformers_text import TransformersText
from pretrain.model.transformers_tower import TransformersTower
from pretrain.weights.begin_from import count_by_part
from pretrain.weights.packages import model_folder
from pretrain.weights.stretched import KEPT, stretch_positions
from pretrain.weights.text_tower import load_text_tower
from pretrain.weights.tower import load_tower_weights, load_transformers_weights
from runtime.errors import CheckpointError


def load_starting_weights(model: AlignmentModel) -> list[str]:
    """Load the weights that the recipe's `weights` keys name, and return lines that report what was and was not used."""
    config, report = model.config, []
    if config.image.weights != "none":
        unused = _load_image(model, config.image)
        # A dual encoder's folder holds a text encoder too: hundreds of names.
        names = ", ".join(unused) if len(unused) < 9 else count_by_part(set(unused))
        report.append(f"image encoder: started from {config.image.weights}; not used of it: {names or 'nothing'}")
    if config.text.weights != "none":
        report += (
            _load_text(model, config.text) if config.text.kind == "transformers" else _load_bert(model, config.text)
        )
    return report


CLASSIFIER = ("head.", "head_dist.", "fc_norm.", "pre_logits.")
"""Names in timm's files that belong to a classifier, not to the encoder."""


def _load_image(model: AlignmentModel, config: ImageEncoderConfig) -> list[str]:
    """Load the image encoder's weights, and return the names that were not used."""
    if isinstance(model.image_encoder, TimmTower):
        return load_tower_weights(model.image_encoder, config)
    if isinstance(model.image_encoder, TransformersTower):
        return load_transformers_weights(model.image_encoder, config)
    source, vit, unused = config.weights, model.image_encoder.vit, list[str]()
    if source != "timm" and not Path(source).is_file():
        raise CheckpointError(
            f"model.image.weights: no file {source}; give a safetensors or .pth file, `timm` or `none`"
        )
    try:
        if source == "timm":
            sizes: tuple[dict[str, Any], ...] = ({}, {"img_size": config.image_size})
            stored, weights = (
                timm.create_model(
                    config.architecture, pretrained=True, num_classes=0, global_pool="", **size
                ).state_dict()
                for size in sizes
            )
        else:
            stored = load_state_dict(source)
            weights = checkpoint_filter_fn(
                dict(stored), vit
            )  # a copy of the dict: this function removes keys of some files
        # For other sizes of image and patch timm interpolates the patch embeddings. Position embeddings are interpolated
        # without antialiasing, as ALBEF does.
        if "pos_embed" in weights:
            weights["pos_embed"] = checkpoint_filter_fn(stored, vit, antialias=False)["pos_embed"]
        unused = sorted(name for name in weights if name.startswith(CLASSIFIER))
        vit.load_state_dict({name: weight for name, weight in weights.items() if name not in unused})
    except Exception as error:  # downloads and files of another shape fail in many ways, and each must stop the run
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"model.image.weights: cannot load `{source}` into {config.architecture} ({reason}); without network, give a file"
        ) from error
    return unused


POSITIONS = "text_encoder.positions.weight"

# BERT's names and ours, within a layer and elsewhere.
LAYER = {
    "attention.output.dense": "self_attention.output",
    "attention.output.LayerNorm": "self_attention.norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "norm",
}
OTHER = {
    "bert.embeddings.word_embeddings": "text_encoder.words",
    "bert.embeddings.position_embeddings": "text_encoder.positions",
    "bert.embeddings.token_type_embeddings": "text_encoder.segments",
    "bert.embeddings.LayerNorm": "text_encoder.norm",
    "cls.predictions.transform.dense": "masked_language_head.dense",
    "cls.predictions.transform.LayerNorm": "masked_language_head.norm",
    "cls.predictions": "masked_language_head",
}


def from_bert(weights: dict[str, Tensor], text_layers: int) -> dict[str, Tensor]:
    """Return BERT's weights under our names, with query, key and value joined. Names unknown to our model stay as they are.

    Args:
        weights: BERT's tensors by name.
        text_layers: how many first layers become the text encoder; the layers after them become the fusion encoder.
    """
    ours: dict[str, Tensor] = {}
    for name, weight in weights.items():
        stem, kind = name.rsplit(".", 1)
        if stem in OTHER:
            ours[f"{OTHER[stem]}.{kind}"] = weight
        elif match := re.fullmatch(r"bert\.encoder\.layer\.(\d+)\.(.+)", stem):
            number, part = int(match[1]), match[2]
            home = (
                f"text_encoder.layers.{number}"
                if number < text_layers
                else f"fusion_encoder.layers.{number - text_layers}"
            )
            if part in LAYER:
                ours[f"{home}.{LAYER[part]}.{kind}"] = weight
            elif part == "attention.self.query":
                joined = [
                    weights[f"bert.encoder.layer.{number}.attention.self.{which}.{kind}"]
                    for which in ("query", "key", "value")
                ]
                ours[f"{home}.self_attention.query_key_value.{kind}"] = torch.cat(joined)
            elif part not in ("attention.self.key", "attention.self.value"):
                ours[name] = weight
        else:
            ours[name] = weight
    return ours


def _read_bert(config: TextEncoderConfig, key: str) -> dict[str, Tensor]:
    """Return the weights of the BERT that `config.weights` names, under our names. `key` is the recipe key, for errors."""
    from transformers import AutoConfig, BertForMaskedLM

    source = model_folder(config.weights, f"{key}.weights")
    try:
        settings = AutoConfig.from_pretrained(source)
        kind = settings.model_type
        if kind != "bert":  # its tensors have other names, and transformers would start a random BERT in their place
            raise CheckpointError(
                f"{key}.weights: {config.weights} is a {kind}, but the text encoder is a BERT; name a BERT, or set {key}.kind to transformers"
            )
        # No tensor's shape shows these, so a wrong value would give wrong features without an error.
        if settings.num_attention_heads != config.heads:
            raise CheckpointError(
                f"{key}.heads is {config.heads}, but {config.weights} has {settings.num_attention_heads}; set {key}.heads to "
                f"{settings.num_attention_heads}"
            )
        if settings.hidden_act != "gelu":
            raise CheckpointError(
                f"{key}.weights: {config.weights} computes with {settings.hidden_act}, but the text encoder with gelu; name "
                "another BERT"
            )
        loaded: Any = BertForMaskedLM.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{key}.weights: cannot load a BERT from `{config.weights}` ({reason}); without network, give a folder"
        ) from error
    # What the file lacks is random here, and must not count as loaded.
    bert, loading = loaded
    weights = {name: weight for name, weight in bert.state_dict().items() if name not in loading["missing_keys"]}
    return from_bert(weights, config.layers)


def _copy_bert(ours: Mapping[str, Tensor], theirs: dict[str, Tensor], config: TextEncoderConfig, key: str) -> list[str]:
    """Copy the tensors that `ours` has under the same name, and return their names."""
    used = [name for name in theirs if name in ours]
    trained, positions = len(theirs[POSITIONS]), len(ours[POSITIONS])
    can_stretch = positions > trained > KEPT + 1
    if can_stretch and config.stretch_positions:
        theirs[POSITIONS] = stretch_positions(theirs[POSITIONS], positions)
    elif positions != trained:
        longer = f", or {key}.stretch_positions true" if can_stretch else ""
        raise CheckpointError(
            f"{key}.positions is {positions}, but {config.weights} has {trained}; set {key}.positions to {trained}{longer}"
        )
    for name in used:
        if theirs[name].shape != ours[name].shape:
            raise CheckpointError(
                f"{key}.weights: {name} is {tuple(theirs[name].shape)} in {config.weights} and {tuple(ours[name].shape)} in the "
                f"recipe; set {key} to that BERT's sizes and data.tokenizer to its tokenizer"
            )
        ours[name].data.copy_(theirs[name])
    return used


def load_bert_encoder(encoder: TextEncoder, config: TextEncoderConfig, key: str) -> None:
    """Load a BERT into a text encoder that stands alone.

    Args:
        encoder: the text encoder to fill.
        config: its recipe; `config.weights` names the BERT.
        key: the recipe key of `config`, for errors.

    Raises:
        CheckpointError: the BERT cannot be read, lacks a tensor of the encoder, or has other sizes.
    """
    ours = {f"text_encoder.{name}": parameter for name, parameter in encoder.named_parameters()}
    used = _copy_bert(ours, _read_bert(config, key), config, key)
    if missing := sorted(ours.keys() - set(used)):
        raise CheckpointError(
            f"{key}.weights: {config.weights} lacks {missing[0]}; is {key}.layers {config.layers} right?"
        )


def _load_text(model: AlignmentModel, config: TextEncoderConfig) -> list[str]:
    """Load a text encoder of `transformers`, and return lines that report on it."""
    assert isinstance(model.text_encoder, TransformersText)
    unused = load_text_tower(model.text_encoder, config)
    fresh = {
        name for name, _ in model.named_parameters() if name.startswith(("fusion_encoder", "masked_language_head"))
    }
    return [
        f"text encoder: started whole from {config.weights}, pooled by {model.text_encoder.pooling}; not used of it: {count_by_part(set(unused))}",
        f"random: {count_by_part(fresh)}; only model.text.kind bert starts the fusion encoder from a BERT's upper layers",
    ]


def _load_bert(model: AlignmentModel, config: TextEncoderConfig) -> list[str]:
    """Load the text encoder, the fusion encoder and the word head from a BERT, and return lines that report on it."""
    theirs, ours = _read_bert(config, "model.text"), dict(model.named_parameters())
    trained = len(theirs[POSITIONS])
    stretched = [f"text positions stretched from {trained} to {config.positions}"] if trained < config.positions else []
    used = _copy_bert(ours, theirs, config, "model.text")
    text_side = [name for name in ours if name.startswith(("text_encoder", "fusion_encoder", "masked_language_head"))]
    fresh = [name for name in text_side if name not in used]
    unused = [name for name in theirs if name not in ours]
    return [
        f"text side: {len(used)} tensors started from {config.weights}, {len(fresh)} are random, because it lacks them: {count_by_part(set(fresh))}",
        f"not used of it: {', '.join(unused) or 'nothing'}",
        *stretched,
    ]
