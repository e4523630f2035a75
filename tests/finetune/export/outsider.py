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


def from_sentence_transformers(folder, images, texts, out):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    assert set(model.modalities) == {"text", "image"}
    out["image"], out["text"] = model.encode(images, batch_size=2), model.encode(texts, batch_size=2)
    out["image_alone"], out["text_alone"] = model.encode([images[1]]), model.encode(texts[1:2])
    out["similarity"] = model.similarity(out["image"], out["text"])
    out["width"] = model.get_embedding_dimension()


def from_onnx(folder, images, texts, out):
    import onnxruntime
    from PIL import ImageOps
    from tokenizers import Tokenizer

    about = json.loads((folder / "preprocessing.json").read_text())
    towers = {path.stem: onnxruntime.InferenceSession(path) for path in folder.glob("*.onnx")}

    def run(tower, **inputs):
        names = [output.name for output in towers[tower].get_outputs()]
        return dict(zip(names, towers[tower].run(names, inputs), strict=True))

    def prepare(image):
        """As preprocessing.json says; the images of this test are not transparent."""
        image = ImageOps.exif_transpose(image).convert("RGB")
        if about["centre_crop"] is None:
            image = image.resize((about["resize"]["width"], about["resize"]["height"]), Image.Resampling.BICUBIC)
        else:
            shorter, (width, height) = about["resize"]["shorter_side"], image.size
            size = [int(shorter * edge / min(width, height)) for edge in (width, height)]
            side = about["centre_crop"]["width"]
            left, top = (round((edge - side) / 2) for edge in size)
            image = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
        return np.asarray(image).transpose(2, 0, 1)

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=0)
    rows = tokenizer.encode_batch(texts)
    ids, mask = np.array([row.ids for row in rows]), np.array([row.attention_mask for row in rows])
    pixels = np.stack([prepare(image) for image in images])
    words = {"input_ids": ids, "attention_mask": mask}
    image, text = run("image", pixels=pixels), run("text", **words)
    out["image"], out["text"] = image["features"], text["features"]
    for count in (1, 3):
        out[f"image_{count}"] = run("image", pixels=pixels[:count])["features"]
    length = int(mask[1].sum())  # of one text alone, without padding
    out["text_alone"] = run("text", input_ids=ids[1:2, :length], attention_mask=mask[1:2, :length])["features"]
    if "matching" in towers:
        count = len(images)
        pairs = {"states": text["states"][:count], "attention_mask": mask[:count]}
        out["matching"] = run("matching", tokens=image["tokens"], **pairs)["logits"]
        one = {"states": text["states"][1:2, :length], "attention_mask": mask[1:2, :length]}
        out["matching_alone"] = run("matching", tokens=image["tokens"][2:3], **one)["logits"]
    assert "torch" not in sys.modules


def from_open_clip(folder, images, texts, out):
    import open_clip
    import torch

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        out["image"] = model.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
        out["text"] = model.encode_text(tokenizer(texts), normalize=True)
        out["text_alone"] = model.encode_text(tokenizer(texts[1]), normalize=True)
        out["logits"], _ = model.get_logits(torch.stack([transform(image) for image in images]), tokenizer(texts))


LIBRARIES = {
    "hf": from_hf,
    "sentence-transformers": from_sentence_transformers,
    "onnx": from_onnx,
    "open_clip": from_open_clip,
}


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
