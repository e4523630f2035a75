"""Read a dual encoder in open_clip's format: `open_clip_config.json` beside its weights. open_clip itself is not needed.

Its own ViT and text transformer are those of CLIP, so they become CLIP's towers of the `transformers` library (SigLIP's text tower, where
the text is not causal). Its timm towers become ours of kind `timm`, its Hugging Face text towers ours of kind `transformers`.

Tested in tests/pretrain/weights/test_open_clip_import.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.model.config import ImageEncoderConfig, PreprocessingConfig, TextEncoderConfig
from pretrain.model.timm_tower import TimmTower
from pretrain.weights.architecture import architecture_of, read_part
from pretrain.weights.dual_encoder import DualEncoder, Projection
from pretrain.weights.tower import COUNTER
from runtime.errors import CheckpointError
from runtime.files import read_json

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
UNKNOWN = (
    "ls_init_value", "attentional_pool", "no_ln_pre", "embed_cls", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner",
    "scale_attn", "scale_fc",
)  # fmt: skip
"""Switches of open_clip's own transformers that no tower here has."""
OUTSIDE = r"(visual|logit_scale|logit_bias|attn_mask)\b"
"""Names that are not of the text tower where it is not under `text.`."""
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""open_clip's names within a layer, and those of `transformers`."""
VISION = {
    "conv1.weight": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
}
POOLINGS = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "class"}
"""open_clip's poolings of Hugging Face text towers that we have, by its names."""


def read_open_clip(source: str) -> DualEncoder:
    """Read a dual encoder.

    Args:
        source: The folder.

    Raises:
        CheckpointError: The folder is not whole, or holds a model that our towers cannot be.
    """
    folder = Path(source)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"import: {folder} holds no {CONFIG}; give a folder in open_clip's format")
    described = read_json(folder / CONFIG)
    model, pixels = described["model_cfg"], described.get("preprocess_cfg", {})
    if "multimodal_cfg" in model:
        _refuse(folder, "a CoCa, whose captioning decoder has no place here")
    vision, text = model["vision_cfg"], model["text_cfg"]
    tensors = _read_weights(folder)
    image_tensors = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
    # `custom_text` puts the text tower under a name of its own.
    apart = any(name.startswith("text.") for name in tensors)
    text_tensors = {
        name.removeprefix("text."): tensor
        for name, tensor in tensors.items()
        if (name.startswith("text.") if apart else not re.match(OUTSIDE, name)) and not name.endswith("attn_mask")
    }
    quick = bool(model.get("quick_gelu", False))
    preprocessing = _preprocessing(folder, pixels)
    if vision.get("timm_model_name"):
        image = _timm_tower(folder, vision, image_tensors, preprocessing)
    else:
        image = _clip_image(folder, vision, image_tensors, preprocessing, quick)
    dimension = int(model["embed_dim"])
    words = _hugging_face_text(folder, text, text_tensors) if text.get("hf_model_name") else None
    words = words or _own_text(folder, text, text_tensors, dimension, quick)
    left_out = []
    if "logit_bias" in tensors:
        left_out.append(f"the logit bias {float(tensors['logit_bias']):.3f}, which moves all logits alike")
    return DualEncoder(
        f"open_clip with {vision.get('timm_model_name') or 'its own ViT'} and {text.get('hf_model_name') or 'its own text tower'}",
        image[0],
        words[0],
        dimension,
        image[1],
        words[1],
        image[2],
        words[2],
        float(tensors["logit_scale"].exp()),
        left_out,
    )


def _clip_image(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], preprocessing: PreprocessingConfig, quick: bool
) -> tuple[ImageEncoderConfig, dict[str, Tensor], Projection]:
    """Return open_clip's own ViT as CLIP's of `transformers`."""
    if isinstance(config.get("layers", 12), list):
        _refuse(folder, "CLIP's ResNet, which no image tower here is")
    _check_switches(folder, "vision_cfg", config)
    if config.get("pool_type", "tok") != "tok":
        _refuse(folder, f"a ViT with vision_cfg.pool_type {config['pool_type']}, not its class token")
    width = config.get("width", 768)
    settings = {
        "hidden_size": width,
        "num_hidden_layers": config.get("layers", 12),
        "num_attention_heads": width // config.get("head_width", 64),
        "intermediate_size": int(width * config.get("mlp_ratio", 4.0)),
        "image_size": config.get("image_size", 224),
        "patch_size": config.get("patch_size", 16),
        "hidden_act": _activation(folder, config, quick),
        "layer_norm_eps": (config.get("norm_kwargs") or {}).get("eps", 1e-5),
    }
    projection = Projection(tensors.pop("proj").T)
    encoder = ImageEncoderConfig(
        kind="transformers",
        architecture="clip_vision_model",
        image_size=_side(folder, settings["image_size"]),
        arguments=settings,
        preprocessing=preprocessing,
    )
    return encoder, rename(tensors, VISION), projection


def _timm_tower(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], preprocessing: PreprocessingConfig
) -> tuple[ImageEncoderConfig, dict[str, Tensor], Projection]:
    """Return a timm tower. Its projection is open_clip's own, or timm's classifier in its place."""
    pool, map_kind = config.get("timm_pool", "avg"), config.get("timm_proj", "linear")
    if pool in ("abs_attn", "rot_attn") or map_kind == "mlp":
        _refuse(
            folder, f"a timm tower with timm_pool {pool} and timm_proj {map_kind}; only linear projections have a place"
        )
    encoder = ImageEncoderConfig(
        kind="timm",
        architecture=config["timm_model_name"],
        image_size=_side(folder, config.get("image_size", 224)),
        arguments={"global_pool": pool} if pool else {},
        preprocessing=preprocessing,
    )
    trunk = {
        name.removeprefix("trunk."): tensor
        for name, tensor in tensors.items()
        if name.startswith("trunk.") and not name.endswith(COUNTER)
    }
    projection = Projection(tensors.get("head.proj.weight"), tensors.get("head.proj.bias"))
    if projection.weight is None and map_kind != "none":
        classifier = TimmTower(encoder).vit.pretrained_cfg["classifier"]
        projection = Projection(trunk.pop(f"{classifier}.weight", None), trunk.pop(f"{classifier}.bias", None))
    return encoder, trunk, projection


def _own_text(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], dimension: int, quick: bool
) -> tuple[TextEncoderConfig, dict[str, Tensor], Projection]:
    """Return open_clip's own text transformer: CLIP's where it is causal, SigLIP's where it reads all words and pools the last."""
    _check_switches(folder, "text_cfg", config)
    causal, pool = not config.get("no_causal_mask", False), config.get("pool_type", "argmax")
    if (causal, pool) not in ((True, "argmax"), (True, "eos"), (False, "last")):
        _refuse(
            folder,
            f"a text tower with no_causal_mask {not causal} and pool_type {pool}; only CLIP's and SigLIP's have a place",
        )
    width = config.get("width", 512)
    settings = {
        "model_type": "clip_text_model" if causal else "siglip_text_model",
        "vocab_size": config.get("vocab_size", 49408),
        "hidden_size": width,
        "num_hidden_layers": config.get("layers", 12),
        "num_attention_heads": config.get("heads", 8),
        "intermediate_size": int(width * config.get("mlp_ratio", 4.0)),
        "max_position_embeddings": config.get("context_length", 77),
        "hidden_act": _activation(folder, config, quick),
        "layer_norm_eps": (config.get("norm_kwargs") or {}).get("eps", 1e-5),
    }
    if not causal:
        settings["projection_size"] = dimension
    if causal:  # CLIP's first and last token are the last two of its vocabulary
        settings |= {"bos_token_id": settings["vocab_size"] - 2, "eos_token_id": settings["vocab_size"] - 1}
    weight = tensors.pop("text_projection", None)
    weight = tensors.pop("text_projection.weight", None) if weight is None else weight.T
    projection = Projection(weight, tensors.pop("text_projection.bias", None))
    named = rename(tensors, TEXT)
    if not causal:  # SigLIP's projection is a part of its tower
        if projection.weight is None or projection.bias is None:
            _refuse(folder, "a text tower of SigLIP's kind without a projection with bias")
        named |= {"head.weight": projection.weight, "head.bias": projection.bias}  # type: ignore[dict-item]
        projection = Projection()
    return TextEncoderConfig(kind="transformers", arguments=settings), named, projection


def _hugging_face_text(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[TextEncoderConfig, dict[str, Tensor], Projection]:
    """Return a text tower of the `transformers` library. Its configuration is not in the folder, only its name."""
    from transformers import AutoConfig

    pooler = config.get("hf_pooler_type", "mean_pooler")
    if pooler not in POOLINGS:
        _refuse(folder, f"a text tower with hf_pooler_type {pooler}; {' and '.join(POOLINGS)} have a place")
    if any(name.startswith("proj.") for name in tensors) and "proj.weight" not in tensors:
        _refuse(folder, "a text tower with hf_proj_type mlp; only linear projections have a place")
    settings = read_part(config["hf_model_name"], AutoConfig, "configuration", "import")
    named = {
        name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if name.startswith("transformer.")
    }
    named.pop("embeddings.position_ids", None)  # a constant, which older versions saved
    encoder = TextEncoderConfig(
        kind="transformers",
        arguments=architecture_of(settings) | {"model_type": settings.model_type},
        pooling=POOLINGS[pooler],  # type: ignore[arg-type]
    )
    return encoder, named, Projection(tensors.get("proj.weight"))


def rename(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Return the tensors of open_clip's transformer under the names of CLIP's in `transformers`; unknown names stay.

    Args:
        tensors: By open_clip's name.
        names: Names outside the layers, whole or without `.weight` and `.bias`.
    """
    renamed = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        home = f"encoder.layers.{layer[1]}" if layer else ""
        if layer and layer[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
            ending = layer[2].rpartition("_")[2]
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{home}.self_attn.{part}_proj.{ending}"] = piece
        elif layer:
            inner = layer[2].rpartition(".")[0]
            renamed[f"{home}.{LAYER.get(inner, inner)}.{kind}"] = tensor
        elif name in names:
            renamed[names[name]] = tensor
        else:
            renamed[f"{names[stem]}.{kind}" if stem in names else name] = tensor
    return renamed


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"import: {folder} holds no weights, neither {' nor '.join(WEIGHTS)}")
    try:
        if path.suffix == ".safetensors":
            stored = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            stored = stored.get("state_dict", stored)
    except Exception as error:  # a file of another kind fails in many ways
        raise CheckpointError(f"import: {path} cannot be read ({' '.join(str(error).split())[:160]})") from error
    return {name.removeprefix("module."): tensor.float() for name, tensor in stored.items()}


def _preprocessing(folder: Path, pixels: dict[str, Any]) -> PreprocessingConfig:
    """Return open_clip's preparation of an evaluation image; CLIP's where the file does not say."""
    mode, resample = pixels.get("resize_mode", "shortest"), pixels.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or resample not in ("bicubic", "bilinear"):
        _refuse(
            folder,
            f"images prepared by resize_mode {mode} and interpolation {resample}, which evaluation here does not",
        )
    from pretrain.model.image_encoder import CLIP_MEAN, CLIP_STD

    crop = 1.0 if mode == "shortest" else 0.0
    return PreprocessingConfig(list(pixels.get("mean", CLIP_MEAN)), list(pixels.get("std", CLIP_STD)), crop, resample)


def _activation(folder: Path, config: dict[str, Any], quick: bool) -> str:
    given = config.get("act_kwargs") or {}
    if given and (given != {"approximate": "tanh"} or quick):
        _refuse(folder, f"an activation with act_kwargs {given}")
    return "gelu_pytorch_tanh" if given else "quick_gelu" if quick else "gelu"


def _check_switches(folder: Path, part: str, config: dict[str, Any]) -> None:
    for name in UNKNOWN:
        if config.get(name):
            _refuse(folder, f"a model with {part}.{name} {config[name]}, which no tower here has")


def _side(folder: Path, size: Any) -> int:
    if isinstance(size, list) and len(set(size)) != 1:
        _refuse(folder, f"images of {size} px, which are not square")
    return int(size[0] if isinstance(size, list) else size)


def _refuse(folder: Path, what: str) -> NoReturn:
    raise CheckpointError(f"import: {folder} holds {what}")
