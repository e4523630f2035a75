"""Format `ligature`: a plain safetensors folder with weights, `model.json` and tokenizer, and nothing of the training.

Tested in tests/pretrain/weights/test_albef.py.
"""

from __future__ import annotations

from pathlib import Path

from finetune.export.source import Source
from pretrain.weights.load import describe_model
from runtime.checkpoint import write_checkpoint


def write(source: Source, folder: Path) -> list[str]:
    """Fill `folder`, which is empty, with what `load_model`, fine-tuning and evaluation read."""
    exported = describe_model(source.config, source.tokenizer.caption_tokens, source.training)
    # Whether fine-tuning trained the fusion encoder, and which parts of an imported model are random.
    exported |= {key: source.description[key] for key in ("fusion_tuned", "untrained") if key in source.description}
    # It renames its folder over this one, which an empty folder allows.
    write_checkpoint(folder, {"model": source.network.state_dict()}, {"model": exported}, source.tokenizer.save)
    return []
