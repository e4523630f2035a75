"""A process without Ligature that loads exports with another library and writes what they compute.

`python -I outsider.py LIBRARY INPUTS EXPORT OUT [EXPORT OUT …]`; INPUTS holds images and texts.json. Run by `exported.outputs`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

OURS = {"configs", "runtime", "data_tools", "retrieval", "training", "pretrain", "finetune", "launch"}


class Blocked:
    """Refuses to import Ligature, which may be installed in this environment."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in OURS:
            raise ImportError(f"{name} is Ligature's: an export must not need it")


sys.meta_path.insert(0, Blocked)

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402


def from_hf(folder, images, texts, out):
    import torch
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        out["image"] = model.get_image_features(**processor(images=images))
        out["image_alone"] = model.get_image_features(**processor(images=images[1]))
        if model.config.head == "vldeformer" or model.config.text["layers"]:
            out["text"] = model.get_text_features(**processor(text=texts))
            out["text_alone"] = model.get_text_features(**processor(text=texts[1]))
            out["logits"] = model(**processor(images=images, text=texts)).logits_per_image
        if hasattr(model, "fusion_encoder"):
            pairs = processor(images=images, text=texts[: len(images)])
            out["matching"] = model.get_matching_logits(**pairs)
    if model.config.head == "vldeformer" or model.config.image["kind"] == "timm":
        return
    again = folder / "again"  # what transformers itself saves loads too, code and all
    model.save_pretrained(again)
    processor.save_pretrained(again)
    model = AutoModel.from_pretrained(again, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(again, trust_remote_code=True)
    with torch.no_grad():
        out["saved_again"] = model.get_image_features(**processor(images=images))


LIBRARIES = {"hf": from_hf}


def main(library, inputs, *folders):
    inputs = Path(inputs)
    images = [Image.open(path) for path in sorted(inputs.glob("*.png")) + sorted(inputs.glob("*.jpg"))]
    texts = json.loads((inputs / "texts.json").read_text())
    for folder, file in zip(folders[::2], folders[1::2], strict=True):
        out = {}
        LIBRARIES[library](Path(folder), images, texts, out)
        np.savez(file, **{name: np.asarray(value) for name, value in out.items()})
    assert not OURS & {name.split(".")[0] for name in sys.modules}


if __name__ == "__main__":
    main(*sys.argv[1:])
