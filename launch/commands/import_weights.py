"""`ligature import`: convert a published checkpoint into one of ours. The module has another name: `import` is a keyword.

Tested in tests/pretrain/weights/test_albef.py.
"""

from __future__ import annotations

from pathlib import Path

from runtime.checks import output_folder
from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Convert the checkpoint and print what was used and what was not."""
    parser = OptionParser(
        "ligature import",
        description="Convert a published checkpoint into one of ours, to pretrain, fine-tune or evaluate with --checkpoint. "
        "(Weights of BERT and timm are named in a recipe: model.text.weights, model.image.weights.)",
    )
    parser.add_argument("kind", choices=["albef"], help="format of the published checkpoint")
    parser.add_argument("checkpoint", type=Path, help="the published .pth file")
    parser.add_argument("out", type=output_folder, help="folder to make")
    parser.add_argument("--tokenizer", default="bert-base-uncased", help="folder or name (default bert-base-uncased)")
    parser.add_argument(
        "--bert-config", type=Path, help="ALBEF's config_bert.json (default: the one beside CHECKPOINT)"
    )
    parser.add_argument("--image-size", type=int, help="pixels a side, to interpolate position embeddings to")
    parser.add_argument("--caption-tokens", type=int, default=30, help="longest caption, in tokens (default 30)")
    parser.add_argument(
        "--image-heads",
        type=int,
        help="attention heads of the image encoder (default: the number that makes a head as wide as the text encoder's)",
    )
    parser.add_argument(
        "--fine-tuned-on", metavar="DATASET", help="dataset that a fine-tuned checkpoint was fine-tuned on"
    )
    options = parser.parse_args(arguments)
    from pretrain.weights.albef import import_albef

    lines = import_albef(
        options.checkpoint,
        options.out,
        options.tokenizer,
        options.bert_config,
        options.image_size,
        options.caption_tokens,
        f"fine-tuned-on {options.fine_tuned_on}" if options.fine_tuned_on else "pretrained",
        options.image_heads,
    )
    print("\n".join(lines))
