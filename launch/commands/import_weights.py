"""`ligature import`: convert a published model into a checkpoint of ours. The module has another name: `import` is a keyword.

Tested in tests/pretrain/weights/test_hugging_face_import.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime.checks import output_folder
from runtime.errors import CheckpointError, RecipeError
from runtime.recipe import OptionParser

OF_ALBEF = ("bert_config", "image_heads", "text_heads")
"""Options that only ALBEF's files need."""
REFUSED = {
    "meter": "its two streams that attend to each other are not supported",
    "blip": "its text encoder, which also fuses all of its layers with the image, is not supported yet",
}
"""Families that are asked for and cannot be imported, and why."""


def run(arguments: list[str]) -> None:
    """Convert the checkpoint and print what was used and what was not."""
    parser = OptionParser(
        "ligature import",
        description="Convert a published model into a checkpoint of ours, to pretrain, fine-tune, evaluate, index or search with. "
        "(An encoder alone is named in a recipe: model.text.weights, model.image.weights.)",
    )
    parser.add_argument(
        "kind",
        type=_family,
        choices=["albef", "hf", "clip", "siglip", "open_clip"],
        help="albef: its .pth file. hf: CLIP, SigLIP or SigLIP 2 as transformers saves them; clip and siglip: that family alone. "
        "open_clip: a folder with open_clip_config.json",
    )
    parser.add_argument("checkpoint", type=Path, help="the published file or folder; with hf also a name on the hub")
    parser.add_argument("out", type=output_folder, help="folder to make")
    parser.add_argument(
        "--tokenizer", help="folder or name of the tokenizer (default: CHECKPOINT; of albef bert-base-uncased)"
    )
    parser.add_argument(
        "--bert-config", type=Path, help="ALBEF's config_bert.json (default: the one beside CHECKPOINT)"
    )
    parser.add_argument("--image-size", type=int, help="pixels a side, to interpolate position embeddings to")
    parser.add_argument(
        "--caption-tokens",
        type=int,
        help="longest caption, in tokens (default: as many as the model has positions; of albef 30)",
    )
    parser.add_argument(
        "--image-heads",
        type=int,
        help="attention heads of ALBEF's image encoder (default: 12 of a ViT-B, else you must say)",
    )
    parser.add_argument(
        "--text-heads",
        type=int,
        help="attention heads of ALBEF's text and fusion encoders (default: config_bert.json's; without one 12 of a BERT-base, "
        "else you must say)",
    )
    parser.add_argument(
        "--fine-tuned-on", metavar="DATASET", help="dataset that a fine-tuned checkpoint was fine-tuned on"
    )
    options = parser.parse_args(arguments)
    training = f"fine-tuned-on {options.fine_tuned_on}" if options.fine_tuned_on else "pretrained"
    lines = _import_albef(options, training) if options.kind == "albef" else _import_dual(options, training)
    print("\n".join(lines))


def _import_albef(options: argparse.Namespace, training: str) -> list[str]:
    from pretrain.weights.albef import Heads, import_albef

    return import_albef(
        options.checkpoint,
        options.out,
        options.tokenizer or "bert-base-uncased",
        options.bert_config,
        options.image_size,
        options.caption_tokens or 30,
        training,
        Heads(options.image_heads, options.text_heads),
    )


def _import_dual(options: argparse.Namespace, training: str) -> list[str]:
    for name in OF_ALBEF:
        if getattr(options, name) is not None:
            raise RecipeError(f"import: --{name.replace('_', '-')} is for albef; {options.kind} needs none")
    if options.out.exists():
        raise CheckpointError(f"{options.out} exists; choose another folder, or remove it")
    source = str(options.checkpoint)
    from pretrain.weights.dual_encoder import import_dual_encoder

    if options.kind == "open_clip":
        from pretrain.weights.open_clip import read_open_clip

        published = read_open_clip(source)
    else:
        from pretrain.weights.hugging_face import read_hugging_face

        published = read_hugging_face(source, options.kind)
    return import_dual_encoder(
        published,
        options.out,
        options.tokenizer or source,
        options.image_size,
        options.caption_tokens,
        training,
    )


def _family(text: str) -> str:
    """Return the name of a family, for argparse, or refuse one that is known not to be supported, saying why."""
    if text in REFUSED:
        raise argparse.ArgumentTypeError(
            f"{text}: {REFUSED[text]}; of the fusion models import an ALBEF, or start a new one from a ViT and a BERT "
            "(model.image.weights, model.text.weights)"
        )
    return text
