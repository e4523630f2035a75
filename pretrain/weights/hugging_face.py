"""Read a dual encoder that the `transformers` library saved: CLIP, SigLIP or SigLIP 2.

Tested in tests/pretrain/weights/test_hugging_face_import.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pretrain.model.config import ImageEncoderConfig, TextEncoderConfig
from pretrain.weights.architecture import architecture_of, published_folder, quiet, read_part, read_preprocessing
from pretrain.weights.dual_encoder import DualEncoder, Projection
from runtime.errors import CheckpointError

FAMILIES = {"clip": "CLIP", "siglip": "SigLIP", "siglip2": "SigLIP 2"}
"""The library's names of the families, and their authors'."""
OF_KIND = {"hf": ("clip", "siglip", "siglip2"), "clip": ("clip",), "siglip": ("siglip", "siglip2")}
"""The families that each kind of `ligature import` reads."""


def read_hugging_face(source: str, kind: str = "hf") -> DualEncoder:
    """Read a dual encoder.

    Args:
        source: A folder that the library saved, or a name on the hub.
        kind: `hf`, or `clip` or `siglip` for that family alone.

    Raises:
        CheckpointError: It is of another family, a tensor is missing, or nothing can be read.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    source = published_folder(source, "import")
    config = read_part(source, AutoConfig, "configuration", "import")
    if config.model_type not in OF_KIND[kind]:
        known = ", ".join(FAMILIES[name] for name in OF_KIND[kind])
        raise CheckpointError(f"import: {source} is a {config.model_type}; `ligature import {kind}` reads {known}")
    preprocessing = read_preprocessing(read_part(source, AutoImageProcessor, "image processor", "import"), source)
    try:
        with quiet():
            loaded: Any = AutoModel.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32
            )
    except Exception as error:  # a download or a foreign file fails in many ways
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"import: cannot load `{source}` ({reason}); without network, give a folder") from error
    model, report = loaded
    if wrong := sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}):
        raise CheckpointError(
            f"import: {source} lacks {wrong[0]}, or has it in another shape; {len(wrong)} tensors in all"
        )
    vision, text = config.vision_config, config.text_config
    side = getattr(vision, "image_size", None) or 0
    left_out = sorted(report["unexpected_keys"])
    if config.model_type == "siglip2":
        side = math.isqrt(vision.num_patches) * vision.patch_size
        left_out.append(f"images of other shapes: they are squashed to {side} px a side")
    if hasattr(model, "logit_bias"):
        left_out.append(f"the logit bias {float(model.logit_bias.detach()):.3f}, which moves all logits alike")
    return DualEncoder(
        f"{FAMILIES[config.model_type]} of transformers",
        ImageEncoderConfig(
            kind="transformers",
            architecture=vision.model_type,
            image_size=side,
            arguments=architecture_of(vision),
            preprocessing=preprocessing,
        ),
        TextEncoderConfig(kind="transformers", arguments=architecture_of(text) | {"model_type": text.model_type}),
        config.projection_dim if config.model_type == "clip" else text.projection_size,
        model.vision_model.state_dict(),
        model.text_model.state_dict(),
        _projection(model, "visual_projection"),
        _projection(model, "text_projection"),
        float(model.logit_scale.detach().exp()),
        left_out,
    )


def _projection(model: Any, name: str) -> Projection:
    """Return CLIP's projection; SigLIP's is a part of its text tower, and its images have none."""
    linear = getattr(model, name, None)
    return Projection() if linear is None else Projection(linear.weight.detach())
