"""The table of export formats. It imports no torch.

To add a format: a file beside `hugging_face.py` with a function that fills a folder, its line here, its test in tests/finetune/export/, and
its lines for readers of the card in `load_*.md`.

Tested in tests/finetune/export/test_export.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One export format."""

    write: str
    """The function that fills an empty folder, `module:name`: (Source, Path) -> lines that report what the format leaves out."""
    about: str
    """Its line of help."""
    heads: tuple[str, ...] = ("dual",)
    """Heads that it can hold."""
    needs: tuple[str, ...] = ()
    """Packages that writing it imports, of the extra `export`."""
    library: str = "ligature"
    """The card's `library_name`."""
    pipeline: str = "feature-extraction"
    """The card's `pipeline_tag`."""
    tags: tuple[str, ...] = ()
    """Further tags of the card."""
    load: str = ""
    """Python that loads the folder, for the card."""
    inputs: str = ""
    """What the model reads and returns, for the card."""


FORMATS = {
    "ligature": Format(
        "finetune.export.plain:write",
        "the model alone, for Ligature: safetensors, model.json and tokenizer",
        load="""from pretrain import load_model

model = load_model("FOLDER")
images = model.encode_image([picture])    # a PIL image
texts = model.encode_text(["a red square left of a blue circle"])
cosines = images @ texts.T""",
        inputs="`encode_image` and `encode_text` return unit-norm features. `match` returns the probability that a pair belongs together.",
    ),
    "hf": Format(
        "finetune.export.hugging_face:write",
        "a Hugging Face folder with its code, for AutoModel and AutoProcessor",
        heads=("dual", "vldeformer"),
        library="transformers",
        tags=("custom_code",),
        load="""from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)
images = model.get_image_features(**processor(images=[picture]))    # a PIL image
texts = model.get_text_features(**processor(text=["a red square left of a blue circle"]))
cosines = images @ texts.T""",
        inputs="`get_image_features` and `get_text_features` return unit-norm features. Where the model has a fusion encoder, "
        "`get_matching_logits(pixel_values, input_ids, attention_mask)` judges pairs: softmax gives no match, match.",
    ),
    "onnx": Format(
        "finetune.export.onnx_graphs:write",
        "graphs of image tower, text tower and matching, for onnxruntime",
        heads=("dual", "vldeformer"),
        needs=("onnx", "onnxscript", "onnxruntime"),
        library="onnx",
        load="""import onnxruntime
from tokenizers import Tokenizer

image, text = (onnxruntime.InferenceSession(f"FOLDER/{name}.onnx") for name in ("image", "text"))
words = Tokenizer.from_file("FOLDER/tokenizer.json").encode("a red square left of a blue circle")
images = image.run(["features"], {"pixels": pixels})[0]    # (batch, 3, size, size) uint8, see preprocessing.json
texts = text.run(["features"], {"input_ids": [words.ids], "attention_mask": [words.attention_mask]})[0]
cosines = images @ texts.T""",
        inputs="Pixels are uint8 and normalised inside the graph; `preprocessing.json` says how an image becomes them. Features have unit norm. "
        "Where there is a `matching.onnx`, it takes `tokens` of image.onnx, `states` of text.onnx and `attention_mask`, row by row, and "
        "returns `logits`: softmax gives no match, match.",
    ),
    "sentence-transformers": Format(
        "finetune.export.sentence_encoder:write",
        "a folder for SentenceTransformer, which encodes texts and images",
        heads=("dual", "vldeformer"),
        library="sentence-transformers",
        tags=("custom_code", "sentence-transformers"),
        load="""from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER", trust_remote_code=True)
images = model.encode([picture])    # a PIL image
texts = model.encode(["a red square left of a blue circle"])
cosines = model.similarity(images, texts)""",
        inputs="`encode` takes texts, PIL images or paths of images, and returns unit-norm features. transformers loads the same folder.",
    ),
    "open_clip": Format(
        "finetune.export.open_clip_model:write",
        "a local-dir for open_clip: the two encoders, where it has their like",
        needs=("open_clip",),
        library="open_clip",
        pipeline="zero-shot-image-classification",
        tags=("open_clip",),
        load="""import open_clip

model, _, transform = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
model.eval()
images = model.encode_image(transform(picture)[None], normalize=True)    # a PIL image
texts = model.encode_text(tokenizer(["a red square left of a blue circle"]), normalize=True)
cosines = images @ texts.T""",
        inputs="The two encoders and the temperature, as a CustomTextCLIP of a timm model and a BERT.",
    ),
}
"""The formats by the name that `--format` takes."""
