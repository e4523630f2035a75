"""Format `open_clip`: a folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")`.

open_clip holds a timm model as its authors made it and a BERT, each with a projection. Three things need care:

- Its text projection has no bias. Ours goes into the last layer norm, whose shift reaches the projection as it is: a shift d with
  projection(d) = bias exists where the projection has as many rows as rank, and neither pooling changes it.
- The configuration of the BERT is looked up by path or hub name, so the folder knows its own path.
- Its transform squashes an image, or takes the whole shorter side; it has no share to crop.

What is written is loaded again by open_clip before the export counts as done, and must give the same features.

Tested in tests/finetune/export/test_open_clip_model.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.export.hugging_face import left_behind, pixel_statistics, write_tokenizer
from finetune.export.probe import compare, probe
from finetune.export.source import Source, require_copied_towers
from pretrain.model.alignment_model import AlignmentModel
from runtime.errors import CheckpointError
from runtime.files import write_json

LAYER = {
    "self_attention.output": "attention.output.dense",
    "self_attention.norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "norm": "output.LayerNorm",
}
EMBEDDINGS = {
    "words": "word_embeddings",
    "positions": "position_embeddings",
    "segments": "token_type_embeddings",
    "norm": "LayerNorm",
}
"""Our names of a BERT's parts -> transformers' names."""


def write(source: Source, folder: Path) -> list[str]:
    """Fill `folder`; return what the format leaves out.

    Raises:
        CheckpointError: open_clip cannot hold the architecture, or makes other features of it.
    """
    require_copied_towers(source, "open_clip")
    _refuse_what_does_not_fit(source)
    weights = {name: tensor.contiguous().clone() for name, tensor in weights_of(source).items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    write_tokenizer(source, folder)
    write_json(folder / "config.json", bert_config(source))
    config = {"model_cfg": model_config(source, folder), "preprocess_cfg": transform_config(source)}
    write_json(folder / "open_clip_config.json", config)
    _check(source, folder)
    config["model_cfg"] = model_config(source, source.out.resolve())
    write_json(folder / "open_clip_config.json", config)
    notes = left_behind(source) + [
        f"the folder's path, {source.out.resolve()}, stands in open_clip_config.json as text_cfg.hf_model_name: after moving it or for the hub, "
        "write the new path or name there"
    ]
    if source.has_matching:
        notes.append("the fusion encoder is dropped: open_clip has no matching")
    if (crop := source.network.image_encoder.crop) not in (None, 1.0):
        notes.append(
            f"open_clip's transform takes the whole shorter side of an image, this model was trained for a share of {crop}"
        )
    return notes


def _refuse_what_does_not_fit(source: Source) -> None:
    """Raise CheckpointError where open_clip's configuration has no key for a part of the architecture."""
    image, text = source.config.image, source.config.text
    reason = ""
    if not text.layers:
        reason = "the model has no text layers, so texts have no features"
    elif image.kind == "timm" and image.pooling == "query":
        reason = "model.image.pooling is query, a pooling that it does not have"
    elif image.arguments or any(getattr(image, name) is not None for name in ("patch", "width", "depth", "heads")):
        reason = f"it makes {image.architecture} in timm's own sizes, and this model has others"
    elif source.config.feature_dim > text.width:
        reason = f"its text projection has no bias, and one to {source.config.feature_dim} from {text.width} cannot do without"
    if reason:
        raise CheckpointError(f"--format open_clip cannot hold {source.folder}: {reason}; use --format hf")


def weights_of(source: Source) -> dict[str, Tensor]:
    """Return open_clip's tensors by name."""
    network = source.network
    assert isinstance(network, AlignmentModel)
    weights = {f"visual.trunk.{name}": tensor for name, tensor in network.image_encoder.vit.state_dict().items()}
    weights |= {f"visual.head.proj.{name}": tensor for name, tensor in network.image_projection.state_dict().items()}
    text = to_bert(network.text_encoder.state_dict())
    projection = network.text_projection
    shift = torch.linalg.lstsq(projection.weight.detach().double(), projection.bias.detach().double()[:, None]).solution
    last = f"encoder.layer.{source.config.text.layers - 1}.output.LayerNorm.bias"
    text[last] = (text[last].double() + shift[:, 0]).float()
    weights |= {f"text.transformer.{name}": tensor for name, tensor in text.items()}
    weights["text.proj.weight"] = projection.weight.detach()
    weights["logit_scale"] = -network.temperature().detach().log()[0]
    return weights


def to_bert(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a text encoder's tensors under the names of transformers' `BertModel`, query, key and value apart."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        stem, kind = name.rsplit(".", 1)
        if not stem.startswith("layers."):
            theirs[f"embeddings.{EMBEDDINGS[stem]}.{kind}"] = tensor
            continue
        _, number, part = stem.split(".", 2)
        if part == "self_attention.query_key_value":
            for which, share in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs[f"encoder.layer.{number}.attention.self.{which}.{kind}"] = share
        else:
            theirs[f"encoder.layer.{number}.{LAYER[part]}.{kind}"] = tensor
    return theirs


def bert_config(source: Source) -> dict[str, Any]:
    """Return config.json of the text tower."""
    text = source.config.text
    return {
        "model_type": "bert",
        "vocab_size": source.tokenizer.vocabulary,
        "hidden_size": text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "intermediate_size": text.feed_forward,
        "max_position_embeddings": text.positions,
        "pad_token_id": source.tokenizer.pad,
    }


def model_config(source: Source, folder: Path) -> dict[str, Any]:
    """Return open_clip's `model_cfg`; `folder` is where it finds config.json."""
    image, text = source.config.image, source.config.text
    own = "token" if image.kind == "vit" else ""  # an empty name keeps the architecture's own pooling
    pools = {"own": own, "class": "token", "mean": "avg"}
    return {
        "embed_dim": source.config.feature_dim,
        "vision_cfg": {
            "timm_model_name": image.architecture,
            "timm_model_pretrained": False,
            "timm_pool": pools[image.pooling],
            "timm_proj": "linear",
            "timm_proj_bias": True,
            "image_size": image.image_size,
        },
        "text_cfg": {
            "hf_model_name": str(folder),
            "hf_tokenizer_name": str(folder),
            "hf_model_pretrained": False,
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler" if text.pooling == "mean" else "cls_last_hidden_state_pooler",
            "context_length": source.tokenizer.caption_tokens,
            "vocab_size": source.tokenizer.vocabulary,
        },
    }


def transform_config(source: Source) -> dict[str, Any]:
    """Return open_clip's `preprocess_cfg`."""
    encoder = source.network.image_encoder
    return {
        "size": source.config.image.image_size,
        "mean": pixel_statistics(encoder.mean),
        "std": pixel_statistics(encoder.std),
        "interpolation": encoder.resample,
        "resize_mode": "squash" if encoder.crop is None else "shortest",
    }


@torch.no_grad()
def _check(source: Source, folder: Path) -> None:
    import open_clip

    pixels, ids, mask = probe(source)
    encoder = source.network.image_encoder
    try:
        model = open_clip.create_model(f"local-dir:{folder}").eval()
        image = model.encode_image((pixels.float() - encoder.mean) / encoder.std, normalize=True)
        text = model.encode_text(ids, normalize=True)
    except Exception as error:  # the library raises many kinds
        raise CheckpointError(
            f"--format open_clip cannot hold {source.folder}: open_clip cannot build it ({' '.join(str(error).split())[:200]}); use "
            "--format hf"
        ) from error
    compare(source.image_features(pixels), image, "open_clip", "image features")
    compare(source.text_features(ids, mask), text, "open_clip", "text features")
